"""Pixtral-12B (Agrawal et al. 2024, Pixtral 12B), trained whole on packed rows.

    python -m mmjax.plan pixtral --topology v5p:8x8x4     # any machine: memory, FLOPs, collectives, step time
    python -m mmjax.train pixtral --data.sources.0.path chats.jsonl --data.tokenizer pixtral

Its tower over pictures of their own size, with a token that ends each row of patches; an MLP of two layers; Mistral
Nemo 12B. `mmjax.convert.huggingface.load` reads mistral-community/pixtral-12b as this model. The defaults are for 256
chips of v5p (`v5p:8x8x4`).

`--model.decoder.vocab` must be at least what the tokenizer has; 131,072 is that of the published weights.
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


def model() -> vlm.Config:
    """12.68 billion parameters."""
    tower = ENCODERS["pixtral-400m"]()
    language = transformer.Config(
        width=5120,
        layers=40,
        heads=32,
        kv_heads=8,
        head=128,
        hidden=14336,
        epsilon=1e-5,
        rope=rope.Config(128, (64,), 1e9),
        remat="full",
    )
    return vlm.Config(
        vision=dataclasses.replace(tower, blocks=dataclasses.replace(tower.blocks, remat="full")),
        connector=connector.Config(tower.blocks.width, language.width),
        decoder=decoder.Config(131072, language, tied=False),
        placeholder=10,
    )


def config() -> Config:
    return Config(
        model=model(),
        data=sets.Mixed((sets.Files(Path("chats.jsonl")),), Path("pixtral"), convention="pixtral"),
        out=Path("runs/pixtral"),
        steps=1000,
        resolution=PUBLISHED["pixtral-12b"].policy,
        # The largest picture has 64 × 64 patches, and takes 4,160 tokens.
        packing=Packing(rows=CHIPS, tokens=6144, shapes=((4096, 4),)),
        sequence=interleave.Config(position="sequential"),
        optimizer=Optimizer(learning_rate=1e-5, warmup=0.03, final=0.1, b2=0.95, weight_decay=0.1),
        objective=Objective(chunk=2048),
        update=Update(compute="bfloat16"),
        mesh=MeshConfig(data=8, fsdp=32),  # not fsdp over all chips: see llava_7b
    )
