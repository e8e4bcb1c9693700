"""Idefics2-8B (Laurençon et al. 2024, "What matters when building vision-language models?"), trained whole.

    python -m mmjax.plan idefics2 --topology v5e:16x16     # any machine: memory, FLOPs, collectives, step time
    python -m mmjax.train idefics2 --data.sources.0.path chats.jsonl --data.tokenizer idefics2/tokenizer.model

SigLIP So400m over pictures of their own shape, up to 70 patches a side, whose places are shares of the picture; a
resampler that makes 64 tokens of each; Mistral-7B. `mmjax.convert.huggingface.load` reads HuggingFaceM4/idefics2-8b as
this model. The defaults are for 256 chips with 16 GB or more, a v5e-256 (`v5e:16x16`).
`--resolution.split` shows a picture's four quarters as well.

`--model.decoder.vocab` must be at least what the tokenizer has (fewer are refused with the right number); 32,003 is
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
from mmjax.sequence import interleave
from mmjax.tokenizers.published import PUBLISHED
from mmjax.train.config import Config, Objective, Optimizer, Packing, Update

CHIPS = 256
SIDE = 70  # patches of the largest picture
LAYERS = 32


def model() -> vlm.Config:
    """8.40 billion parameters."""
    siglip = ENCODERS["siglip-so400m14-384"]()
    seen = dataclasses.replace(siglip.blocks, remat="full")
    language = transformer.Config(
        width=4096,
        layers=LAYERS,
        heads=32,
        kv_heads=8,
        head=128,
        hidden=14336,
        epsilon=1e-5,
        rope=rope.Config(128, (64,)),
        windowed=tuple(range(LAYERS)),
        remat="full",
    )
    return vlm.Config(
        vision=dataclasses.replace(siglip, blocks=seen, table=vit.Table(SIDE, SIDE, "bucket"), head=None),
        connector=CONNECTORS["idefics2-8b"](),
        decoder=decoder.Config(32003, language, tied=False, window=4096),
        placeholder=32001,
    )


def config() -> Config:
    return Config(
        model=model(),
        data=sets.Mixed((sets.Files(Path("chats.jsonl")),), Path("tokenizer.model"), convention="idefics2"),
        out=Path("runs/idefics2"),
        steps=1000,
        resolution=PUBLISHED["idefics2"].policy,
        # Two pictures of the largest size, or up to 8 smaller ones.
        packing=Packing(rows=CHIPS, tokens=2048, shapes=((2 * SIDE * SIDE, 8),)),
        sequence=interleave.Config(position="sequential"),
        optimizer=Optimizer(learning_rate=1e-5, warmup=0.03, final=0.0, b2=0.999, weight_decay=0.0),
        objective=Objective(chunk=2048),
        update=Update(compute="bfloat16"),
        mesh=MeshConfig(data=8, fsdp=32),  # not fsdp over all chips: see llava_7b
    )
