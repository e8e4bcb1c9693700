"""Qwen2-VL-7B (Wang et al. 2024, Qwen2-VL, table 1), trained whole on packed rows.

    python -m mmjax.plan qwen2_vl --topology v5e:16x16     # any machine: memory, FLOPs, collectives, step time
    python -m mmjax.train qwen2_vl --data.sources.0.path chats.jsonl --data.tokenizer qwen2-vl

Its tower over pictures of native resolution, a merger of 2 × 2 patches, Qwen2-7B with M-RoPE.
`mmjax.convert.huggingface.load` reads Qwen/Qwen2-VL-7B-Instruct as this model. The defaults are for 256 chips with 16
GB or more: a v5e-256 (`v5e:16x16`) or 256 chips of v5p (`v5p:8x8x4`).

`--model.decoder.vocab` must be at least what the tokenizer has (fewer are refused with the right number); 152,064 is
that of the published weights, padded.
"""

import dataclasses
from pathlib import Path

from mmjax.core.meshes import MeshConfig
from mmjax.data import sets
from mmjax.models import decoder, vlm
from mmjax.models.published import TOWERS
from mmjax.nn import rope, transformer
from mmjax.sequence import interleave, positions
from mmjax.tokenizers.published import PUBLISHED
from mmjax.train.config import Config, Objective, Optimizer, Packing, Update

CHIPS = 256


def model() -> vlm.Config:
    """8.29 billion parameters."""
    tower = TOWERS["qwen2-vl-7b"]()
    language = transformer.Config(
        width=3584,
        layers=28,
        heads=28,
        kv_heads=4,
        head=128,
        hidden=18944,
        qkv_bias=True,
        rope=rope.Config(128, (16, 24, 24), 1_000_000.0),
        remat="full",
    )
    vision = dataclasses.replace(tower.vision, blocks=dataclasses.replace(tower.vision.blocks, remat="full"))
    return vlm.Config(vision, tower.merger, decoder.Config(152064, language, tied=False), placeholder=(151655, 151656))


def config() -> Config:
    return Config(
        model=model(),
        data=sets.Mixed((sets.Files(Path("chats.jsonl")),), Path("qwen2-vl"), convention="qwen-vl"),
        out=Path("runs/qwen2_vl"),
        steps=1000,
        resolution=PUBLISHED["qwen2-vl"].policy,
        # Half of a row's tokens are pictures': at most 8 of them, of 2,048 tokens together.
        packing=Packing(rows=CHIPS, tokens=4096, shapes=((8192, 8),)),
        sequence=interleave.Config(rope=positions.QWEN_VL, merge=2),
        optimizer=Optimizer(learning_rate=1e-5, warmup=0.03, final=0.1, b2=0.95, weight_decay=0.1),
        objective=Objective(chunk=2048),
        update=Update(compute="bfloat16"),
        mesh=MeshConfig(data=8, fsdp=32),  # not fsdp over all chips: see llava_7b
    )
