"""LLaVA-OneVision-7B (Li et al. 2024, LLaVA-OneVision: easy visual task transfer), trained whole on packed rows.

    python -m mmjax.plan llava_onevision --topology v5e:16x16     # any machine: memory, FLOPs, collectives, step time
    python -m mmjax.train llava_onevision --data.sources.0.path chats.json --data.tokenizer qwen2

SigLIP So400m at 384 pixels, 26 of its 27 blocks; an MLP of two layers; Qwen2-7B. A picture is shown as a whole and in
tiles, whose map of media tokens is resized where it is larger than nine tiles. `mmjax.convert.huggingface.load` reads
llava-hf/llava-onevision-qwen2-7b-ov-hf as this model. The defaults are for 256 chips with 16 GB or more: a v5e-256
(`v5e:16x16`) or 256 chips of v5p (`v5p:8x8x4`); larger pictures than nine tiles do not fit their rows.

`--model.decoder.vocab` must then be what the tokenizer has; 152,064 is that of the published weights, padded.
"""

import dataclasses
from pathlib import Path

from mmjax.connectors import mlp as connector
from mmjax.core.meshes import MeshConfig
from mmjax.data import sets
from mmjax.encoders.published import ENCODERS
from mmjax.models import decoder, vlm
from mmjax.nn import rope, transformer
from mmjax.sequence import interleave
from mmjax.tokenizers.published import PUBLISHED
from mmjax.train.config import Config, Objective, Optimizer, Packing, Update

CHIPS = 256
VIEWS = 10  # in a row: a picture as a whole and in nine tiles
PATCHES = VIEWS * 27 * 27


def model() -> vlm.Config:
    """8.03 billion parameters."""
    siglip = ENCODERS["siglip-so400m14-384"]()
    seen = dataclasses.replace(siglip.blocks, layers=26, remat="full")
    language = transformer.Config(
        width=3584,
        layers=28,
        heads=28,
        kv_heads=4,
        head=128,
        hidden=18944,
        qkv_bias=True,
        rope=rope.Config(128, (64,), 1_000_000.0),
        remat="full",
    )
    return vlm.Config(
        vision=dataclasses.replace(siglip, blocks=seen, final_norm=False, head=None),
        connector=connector.Config(seen.width, language.width),
        decoder=decoder.Config(152064, language, tied=False),
        placeholder=(151646, 151647),
        newline=True,
    )


def config() -> Config:
    whole = dataclasses.replace(PUBLISHED["llava-onevision"].policy, most=9)
    return Config(
        model=model(),
        data=sets.Mixed((sets.Files(Path("chats.json")),), Path("qwen2"), convention="chatml"),
        out=Path("runs/llava_onevision"),
        steps=1000,
        resolution=dataclasses.replace(whole, sizes=tuple(s for s in whole.sizes if s[0] * s[1] < VIEWS)),
        packing=Packing(rows=CHIPS, tokens=8192, shapes=((PATCHES, VIEWS),)),
        sequence=interleave.Config(position="sequential", mixes=True),
        optimizer=Optimizer(learning_rate=1e-5, warmup=0.03, final=0.0, b2=0.999, weight_decay=0.0),
        objective=Objective(chunk=2048),
        update=Update(compute="bfloat16"),
        mesh=MeshConfig(data=8, fsdp=32),  # not fsdp over all chips: see llava_7b
    )
