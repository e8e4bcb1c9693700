"""BLIP-2 with Flan-T5-XL (Li et al. 2023), its second stage: an encoder–decoder reads pictures that the Q-Former tells.

    python -m mmjax.plan blip2_flan_t5 --topology v5e:16x16      # any machine: memory, FLOPs, collectives, step time
    python -m mmjax.train blip2_flan_t5 --data.sources.0.path captions.json --data.tokenizer flan-t5/tokenizer.json

EVA-CLIP's ViT-g/14 and Flan-T5 stay as they are. T5's encoder reads 32 tokens for a picture and the prompt behind it,
its decoder learns to write the caption. `mmjax.convert.huggingface.load` reads Salesforce/blip2-flan-t5-xl as this
model. The defaults are for 256 chips with 16 GB or more, a v5e-256.

`--model.decoder.vocab` must be at least what the tokenizer has; 32,128 is that of the published weights.
"""

import dataclasses
from pathlib import Path

from mmjax.connectors.published import CONNECTORS
from mmjax.core.meshes import MeshConfig
from mmjax.data import sets
from mmjax.encoders.published import ENCODERS
from mmjax.models import encoder_decoder, vlm
from mmjax.nn import relative, transformer
from mmjax.sequence import interleave
from mmjax.tokenizers.resolution import Fixed
from mmjax.train.config import Config, Objective, Optimizer, Packing, Update

CHIPS = 256
PATCHES, PICTURES = 16 * 16, 16  # of a picture; in a row


def model() -> vlm.Config:
    """3.94 billion parameters."""
    eva = ENCODERS["eva-g14"]()
    reads = transformer.Config(
        width=2048,
        layers=24,
        heads=32,
        kv_heads=32,
        head=64,
        hidden=5120,
        activation="gelu_tanh",
        query_scale=1.0,
        relative=relative.Config(32, both=True),
        remat="attention",
    )
    writes = dataclasses.replace(reads, look=2048, relative=relative.Config(32))
    return vlm.Config(
        vision=dataclasses.replace(eva, blocks=dataclasses.replace(eva.blocks, remat="attention")),
        connector=CONNECTORS["blip2-flan-t5-xl"](),
        decoder=encoder_decoder.Config(32128, reads, writes, tied=False),
        placeholder=32100,
    )


def config() -> Config:
    return Config(
        model=model(),
        data=sets.Mixed((sets.Files(Path("captions.json")),), Path("tokenizer.json"), convention="blip-2-t5"),
        out=Path("runs/blip2_flan_t5"),
        steps=80_000,
        resolution=Fixed(14, 224, 224),
        # A picture and its prompt take about 50 tokens, its caption 20.
        packing=Packing(rows=CHIPS, tokens=1024, shapes=((PICTURES * PATCHES, PICTURES),)),
        sequence=interleave.Config(position="sequential", answer=512),
        optimizer=Optimizer(learning_rate=1e-4, warmup=0.025, final=0.5, weight_decay=0.05),
        objective=Objective(chunk=512),
        update=Update(compute="bfloat16", frozen=("vision", "decoder")),
        mesh=MeshConfig(data=8, fsdp=32),
    )
