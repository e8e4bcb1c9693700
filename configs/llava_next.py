"""LLaVA-NeXT-7B (Liu et al. 2024, "LLaVA-NeXT: improved reasoning, OCR, and world knowledge"), trained whole.

    python -m mmjax.plan llava_next --topology v5e:16x16          # any machine: memory, FLOPs, collectives, step time
    python -m mmjax.train llava_next --data.sources.0.path chats.json --data.tokenizer vicuna/tokenizer.model

LLaVA-1.5's parts (configs/llava_7b.py), and pictures as a whole and in up to four tiles of 336 pixels, whose rows of
patches end with a learnt vector. `mmjax.convert.huggingface.load` reads llava-hf/llava-v1.6-vicuna-7b-hf as this model.
The defaults are for 256 chips with 16 GB or more: a v5e-256 (`v5e:16x16`) or 256 chips of v5p (`v5p:8x8x4`).

`--model.decoder.vocab` must then be what the tokenizer has; 32,064 is that of the published weights, padded.
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
VIEWS = 5  # of a picture: the whole and up to 2 × 2 tiles
PATCHES = VIEWS * 24 * 24


def model() -> vlm.Config:
    """7.05 billion parameters; the published 7.06 billion count CLIP's last block, which nothing reads."""
    clip = ENCODERS["clip-l14-336"]()
    # Features of the second to last block: the last one, and the head, are not there at all.
    seen = dataclasses.replace(clip.blocks, layers=clip.blocks.layers - 1, remat="attention")
    language = transformer.Config(
        width=4096,
        layers=32,
        heads=32,
        kv_heads=32,
        head=128,
        hidden=11008,
        epsilon=1e-5,
        rope=rope.Config(128, (64,)),
        remat="attention",
    )
    return vlm.Config(
        vision=dataclasses.replace(clip, blocks=seen, head=None),
        connector=connector.Config(seen.width, language.width),
        decoder=decoder.Config(32064, language, tied=False),
        placeholder=32000,
        newline=True,
    )


def config() -> Config:
    return Config(
        model=model(),
        data=sets.Mixed((sets.Files(Path("chats.json")),), Path("tokenizer.model"), convention="llava-v1"),
        out=Path("runs/llava_next"),
        steps=1000,
        resolution=PUBLISHED["llava-next"].policy,
        # A picture takes up to 2,928 tokens.
        packing=Packing(rows=CHIPS, tokens=4096, shapes=((PATCHES, VIEWS),)),
        sequence=interleave.Config(position="sequential"),
        optimizer=Optimizer(learning_rate=2e-5, warmup=0.03, final=0.0, b2=0.999, weight_decay=0.0),
        objective=Objective(chunk=4096),
        update=Update(compute="bfloat16"),
        mesh=MeshConfig(data=8, fsdp=32),  # not fsdp over all chips: see llava_7b
    )
