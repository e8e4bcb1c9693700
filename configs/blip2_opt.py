"""BLIP-2 with OPT-2.7B (Li et al. 2023), its second stage: the Q-Former learns to speak to a frozen language model.

    python -m mmjax.plan blip2_opt --topology v5e:16x16          # any machine: memory, FLOPs, collectives, step time
    python -m mmjax.train blip2_opt --data.sources.0.path captions.json --data.tokenizer opt/tokenizer.json

EVA-CLIP's ViT-g/14 and OPT stay as they are; a picture becomes 32 tokens. `mmjax.convert.huggingface.load` reads
Salesforce/blip2-opt-2.7b as this model. The defaults are for 256 chips with 16 GB or more, a v5e-256, and learn from
4,096 pictures with their captions in a step.

`--model.decoder.vocab` must be at least what the tokenizer has; 50,304 is that of the published weights, padded.
"""

import dataclasses
from pathlib import Path

from mmjax.connectors.published import CONNECTORS
from mmjax.core.meshes import MeshConfig
from mmjax.data import sets
from mmjax.encoders.published import ENCODERS
from mmjax.models import decoder, vlm
from mmjax.nn import transformer
from mmjax.sequence import interleave
from mmjax.tokenizers.resolution import Fixed
from mmjax.train.config import Config, Objective, Optimizer, Packing, Update

CHIPS = 256
PATCHES, PICTURES = 16 * 16, 16  # of a picture; in a row


def model() -> vlm.Config:
    """3.74 billion parameters."""
    eva = ENCODERS["eva-g14"]()
    language = transformer.Config(
        width=2560,
        layers=32,
        heads=32,
        kv_heads=32,
        head=80,
        hidden=10240,
        activation="relu",
        gated=False,
        bias=True,
        norm_kind="layer",
        epsilon=1e-5,
        remat="attention",
    )
    return vlm.Config(
        vision=dataclasses.replace(eva, blocks=dataclasses.replace(eva.blocks, remat="attention")),
        connector=CONNECTORS["blip2-opt-2.7b"](),
        decoder=decoder.Config(50304, language, positions=decoder.Positions(2050, first=2)),
        placeholder=50265,
    )


def config() -> Config:
    return Config(
        model=model(),
        data=sets.Mixed((sets.Files(Path("captions.json")),), Path("tokenizer.json"), convention="blip-2"),
        out=Path("runs/blip2_opt"),
        steps=80_000,
        resolution=Fixed(14, 224, 224),
        # A picture and its caption take about 60 tokens.
        packing=Packing(rows=CHIPS, tokens=1024, shapes=((PICTURES * PATCHES, PICTURES),)),
        sequence=interleave.Config(position="sequential"),
        optimizer=Optimizer(learning_rate=1e-4, warmup=0.025, final=0.5, weight_decay=0.05),
        objective=Objective(chunk=1024),
        update=Update(compute="bfloat16", frozen=("vision", "decoder")),
        mesh=MeshConfig(data=8, fsdp=32),
    )
