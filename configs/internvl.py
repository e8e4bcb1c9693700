"""InternVL3-8B (Zhu et al. 2025, InternVL3: exploring advanced training and test-time recipes), trained whole.

    python -m mmjax.plan internvl --topology v5e:16x16     # any machine: memory, FLOPs, collectives, step time
    python -m mmjax.train internvl --data.sources.0.path chats.jsonl --data.tokenizer internvl3

InternViT-300M over tiles of 448 pixels and a thumbnail, pixel shuffle of 2 × 2 patches, an MLP of two layers,
Qwen2.5-7B. `mmjax.convert.huggingface.load` reads OpenGVLab/InternVL3-8B-hf as this model. The defaults are for 256
chips with 16 GB or more, a v5e-256 (`v5e:16x16`).

`--model.decoder.vocab` must be at least what the tokenizer has; 151,674 is that of the published weights.
"""

import dataclasses
from pathlib import Path

from mmjax.connectors import pixel_shuffle
from mmjax.core.meshes import MeshConfig
from mmjax.data import sets
from mmjax.encoders.published import ENCODERS
from mmjax.models import decoder, vlm
from mmjax.nn import rope, transformer
from mmjax.nn.rope_scaling import Dynamic
from mmjax.sequence import interleave
from mmjax.tokenizers.published import PUBLISHED
from mmjax.train.config import Config, Objective, Optimizer, Packing, Update

CHIPS = 256
VIEWS = 13  # of a picture: up to 12 tiles and the whole
PATCHES = VIEWS * 32 * 32


def model() -> vlm.Config:
    """7.94 billion parameters."""
    intern = ENCODERS["internvit-300m"]()
    language = transformer.Config(
        width=3584,
        layers=28,
        heads=28,
        kv_heads=4,
        head=128,
        hidden=18944,
        qkv_bias=True,
        rope=rope.Config(128, (64,), 1_000_000.0, scaling=Dynamic(2.0, 32768)),
        remat="full",
    )
    seen = dataclasses.replace(intern.blocks, remat="full")
    return vlm.Config(
        vision=dataclasses.replace(intern, blocks=seen, head=None),
        connector=pixel_shuffle.Config(seen.width, language.width),
        decoder=decoder.Config(151674, language, tied=False),
        placeholder=151667,
    )


def config() -> Config:
    return Config(
        model=model(),
        data=sets.Mixed((sets.Files(Path("chats.jsonl")),), Path("internvl3"), convention="internvl"),
        out=Path("runs/internvl"),
        steps=1000,
        resolution=PUBLISHED["internvl-3"].policy,
        # A picture takes up to 3,328 tokens.
        packing=Packing(rows=CHIPS, tokens=4096, shapes=((PATCHES, VIEWS),)),
        sequence=interleave.Config(position="sequential", merge=2),
        optimizer=Optimizer(learning_rate=2e-5, warmup=0.03, final=0.1, b2=0.95, weight_decay=0.05),
        objective=Objective(chunk=2048),
        update=Update(compute="bfloat16"),
        mesh=MeshConfig(data=8, fsdp=32),  # not fsdp over all chips: see llava_7b
    )
