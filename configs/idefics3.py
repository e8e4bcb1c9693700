"""Idefics3-8B (Laurençon et al. 2024, "Building and better understanding vision-language models"), trained whole.

    python -m mmjax.plan idefics3 --topology v5e:16x16     # any machine: memory, FLOPs, collectives, step time
    python -m mmjax.train idefics3 --data.sources.0.path chats.jsonl --data.tokenizer idefics3

SigLIP So400m on tiles of 364 pixels and the whole picture at that size, 2 × 2 of whose patches become one of 169 media
tokens; Llama 3.1 8B. `mmjax.convert.huggingface.load` reads HuggingFaceM4/Idefics3-8B-Llama3 as this model. The
defaults are for 256 chips with 16 GB or more, a v5e-256 (`v5e:16x16`).

`--model.decoder.vocab` must be at least what the tokenizer has (fewer are refused with the right number); 128,259 is
that of the published weights.
"""

import dataclasses
from pathlib import Path

from mmjax.connectors.published import CONNECTORS
from mmjax.core.meshes import MeshConfig
from mmjax.data import sets
from mmjax.encoders import vit
from mmjax.encoders.published import ENCODERS
from mmjax.models import decoder, vlm
from mmjax.nn import rope, transformer
from mmjax.nn.rope_scaling import Llama3
from mmjax.sequence import interleave
from mmjax.tokenizers.published import PUBLISHED
from mmjax.train.config import Config, Objective, Optimizer, Packing, Update

CHIPS = 256
SIDE = 26  # patches of a tile
VIEWS = 17  # of a picture: 4 × 4 tiles and the whole


def model() -> vlm.Config:
    """8.46 billion parameters."""
    siglip = ENCODERS["siglip-so400m14-384"]()
    seen = dataclasses.replace(siglip.blocks, remat="full")
    language = transformer.Config(
        width=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head=128,
        hidden=14336,
        epsilon=1e-5,
        rope=rope.Config(128, (64,), 500_000.0, scaling=Llama3(8.0, 1.0, 4.0, 8192)),
        remat="full",
    )
    return vlm.Config(
        vision=dataclasses.replace(siglip, blocks=seen, table=vit.Table(SIDE, SIDE, "bucket"), head=None),
        connector=CONNECTORS["idefics3-8b"](),
        decoder=decoder.Config(128_259, language, tied=False),
        placeholder=128_257,
    )


def config() -> Config:
    return Config(
        model=model(),
        data=sets.Mixed((sets.Files(Path("chats.jsonl")),), Path("idefics3"), convention="idefics3"),
        out=Path("runs/idefics3"),
        steps=1000,
        resolution=PUBLISHED["idefics3"].policy,
        packing=Packing(rows=CHIPS, tokens=4096, shapes=((VIEWS * SIDE * SIDE, VIEWS),)),
        sequence=interleave.Config(position="sequential", merge=2),
        optimizer=Optimizer(learning_rate=1e-5, warmup=0.03, final=0.0, b2=0.999, weight_decay=0.0),
        objective=Objective(chunk=2048),
        update=Update(compute="bfloat16"),
        mesh=MeshConfig(data=8, fsdp=32),  # not fsdp over all chips: see llava_7b
    )
