"""InstructBLIP with Vicuna-7B (Dai et al. 2023): the Q-Former reads the question, and learns what to tell of a picture.

    python -m mmjax.plan instructblip --topology v5e:16x16       # any machine: memory, FLOPs, collectives, step time
    python -m mmjax.train instructblip --data.sources.0.path chats.json --data.tokenizer vicuna \\
        --data.reader bert

EVA-CLIP's ViT-g/14 and Vicuna stay as they are. The question goes to the language model behind the picture's 32 tokens,
and, in BERT's word pieces (data.reader: a directory with that tokenizer.json), to the Q-Former beside the picture.
`mmjax.convert.huggingface.load` reads Salesforce/instructblip-vicuna-7b as this model. The defaults are for 256 chips
with 16 GB or more, a v5e-256.

`--model.decoder.vocab` must be at least what the tokenizer has; 32,064 is that of the published weights, padded.
"""

import dataclasses
from pathlib import Path

from mmjax.connectors.published import CONNECTORS
from mmjax.core.meshes import MeshConfig
from mmjax.data import sets
from mmjax.encoders.published import ENCODERS
from mmjax.models import decoder, vlm
from mmjax.nn import rope, transformer
from mmjax.sequence import interleave
from mmjax.tokenizers.resolution import Fixed
from mmjax.train.config import Config, Objective, Optimizer, Packing, Update

CHIPS = 256
PATCHES, PICTURES = 16 * 16, 8  # of a picture; in a row


def model() -> vlm.Config:
    """7.91 billion parameters."""
    eva = ENCODERS["eva-g14"]()
    language = transformer.Config(
        width=4096,
        layers=32,
        heads=32,
        kv_heads=32,
        head=128,
        hidden=11008,
        rope=rope.Config(128, (64,)),
        remat="attention",
    )
    return vlm.Config(
        vision=dataclasses.replace(eva, blocks=dataclasses.replace(eva.blocks, remat="attention")),
        connector=CONNECTORS["instructblip-vicuna-7b"](),
        decoder=decoder.Config(32064, language, tied=False),
        placeholder=32001,
    )


def config() -> Config:
    return Config(
        model=model(),
        data=sets.Mixed(
            (sets.Files(Path("chats.json")),), Path("vicuna"), convention="instructblip", reader=Path("bert")
        ),
        out=Path("runs/instructblip"),
        steps=60_000,
        resolution=Fixed(14, 224, 224),
        # A picture, its question and its answer take about 130 tokens.
        packing=Packing(rows=CHIPS, tokens=1024, shapes=((PICTURES * PATCHES, PICTURES),)),
        sequence=interleave.Config(position="sequential", instruction=128),
        optimizer=Optimizer(learning_rate=1e-5, warmup=0.02, final=0.0, weight_decay=0.05),
        objective=Objective(chunk=1024),
        update=Update(compute="bfloat16", frozen=("vision", "decoder")),
        mesh=MeshConfig(data=8, fsdp=32),
    )
