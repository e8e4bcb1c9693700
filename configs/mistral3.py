"""Mistral-Small-3.1-24B (Mistral AI 2025), trained whole on packed rows.

    python -m mmjax.plan mistral3 --topology v5p:8x8x4     # any machine: memory, FLOPs, collectives, step time
    python -m mmjax.train mistral3 --data.sources.0.path chats.jsonl --data.tokenizer mistral-small-3.1

Pixtral's tower over pictures of their own size, 2 × 2 of whose patches become one token, with one more that ends each
row; a decoder of 40 blocks. `mmjax.convert.huggingface.load` reads mistralai/Mistral-Small-3.1-24B-Instruct-2503 as
this model. The defaults are for 256 chips of v5p (`v5p:8x8x4`).

`--model.decoder.vocab` must be at least what the tokenizer has; 131,072 is that of the published weights.
"""

import dataclasses
from pathlib import Path

from mmjax.connectors import merger
from mmjax.core.meshes import MeshConfig
from mmjax.data import sets
from mmjax.encoders.published import ENCODERS
from mmjax.models import decoder, vlm
from mmjax.nn import rope, transformer
from mmjax.sequence import interleave
from mmjax.tokenizers.published import PUBLISHED
from mmjax.train.config import Config, Objective, Optimizer, Packing, Update

CHIPS = 256


def model() -> vlm.Config:
    """24.01 billion parameters."""
    tower = ENCODERS["pixtral-400m"]()
    language = transformer.Config(
        width=5120,
        layers=40,
        heads=32,
        kv_heads=8,
        head=128,
        hidden=32768,
        epsilon=1e-5,
        rope=rope.Config(128, (64,), 1e9),
        remat="full",
    )
    return vlm.Config(
        vision=dataclasses.replace(
            tower,
            embed=dataclasses.replace(tower.embed, patch=14),
            blocks=dataclasses.replace(tower.blocks, activation="gelu", remat="full"),
        ),
        connector=merger.Config(
            tower.blocks.width,
            language.width,
            hidden=language.width,
            norm="rms",
            channels="channel",
            reduce=True,
            bias=False,
            epsilon=language.epsilon,
        ),
        decoder=decoder.Config(131072, language, tied=False),
        placeholder=10,
    )


def config() -> Config:
    return Config(
        model=model(),
        data=sets.Mixed((sets.Files(Path("chats.jsonl")),), Path("mistral-small-3.1"), convention="mistral-3"),
        out=Path("runs/mistral3"),
        steps=1000,
        resolution=PUBLISHED["mistral-small-3.1"].policy,
        # The largest picture has 110 × 110 patches, and takes 3,080 tokens.
        packing=Packing(rows=CHIPS, tokens=4096, shapes=((12100, 4),)),
        sequence=interleave.Config(position="sequential", merge=2),
        optimizer=Optimizer(learning_rate=1e-5, warmup=0.03, final=0.1, b2=0.95, weight_decay=0.1),
        objective=Objective(chunk=2048),
        update=Update(compute="bfloat16"),
        mesh=MeshConfig(data=8, fsdp=32),
    )
