"""LLaVA-1.5-7B (Liu et al. 2023, Improved baselines with visual instruction tuning), trained whole on packed rows.

    python -m mmjax.plan llava_7b --topology v5e:16x16          # any machine: memory, FLOPs, collectives, step time
    python -m mmjax.train llava_7b --data.sources.0.path chats.json --data.tokenizer vicuna/tokenizer.model

CLIP ViT-L/14 at 336 pixels, whose second to last block's features are used; an MLP of two layers; Vicuna-7B. The
defaults are for 256 chips with 16 GB or more: a v5e-256 (`v5e:16x16`) or 256 chips of v5p (`v5p:8x8x4`).

`--model.decoder.vocab` must be at least what the tokenizer has (32,001 ids with `<image>`; fewer are refused with
the right one); 32,064 is that of Hugging Face's weights, padded.
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
PICTURE = 24 * 24  # patches, and media tokens, of a picture
PICTURES = 5  # in a row: LLaVA's documents have one each, and about 240 tokens of text


def model() -> vlm.Config:
    """7.05 billion parameters."""
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
    )


def config() -> Config:
    return Config(
        model=model(),
        data=sets.Mixed((sets.Files(Path("chats.json")),), Path("tokenizer.model"), convention="llava-v1"),
        out=Path("runs/llava_7b"),
        steps=520,  # about one epoch of LLaVA's 665,000 documents
        resolution=PUBLISHED["llava-1.5"].policy,
        packing=Packing(rows=CHIPS, tokens=4096, shapes=((PICTURES * PICTURE, PICTURES),)),
        sequence=interleave.Config(position="sequential"),
        optimizer=Optimizer(learning_rate=2e-5, warmup=0.03, final=0.0, b2=0.999, weight_decay=0.0),
        objective=Objective(chunk=4096),
        update=Update(compute="bfloat16"),
        # Not fsdp over all chips: the TPU compiler then sums gradients whole on every chip, twice the bytes, and so it
        # does where a chip's share of a matrix is no multiple of 16 tiles (11,008 over 64).
        mesh=MeshConfig(data=8, fsdp=32),
    )
