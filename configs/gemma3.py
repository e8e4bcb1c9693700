"""Gemma 3 4B (Gemma Team 2025, "Gemma 3 technical report"), trained whole on packed rows.

    python -m mmjax.plan gemma3 --topology v5e:16x16     # any machine: memory, FLOPs, collectives, step time
    python -m mmjax.train gemma3 --data.sources.0.path chats.json --data.tokenizer gemma-3-4b-it

SigLIP So400m at 896 pixels, whose 64 × 64 patches are averaged to 256 media tokens; an RMS norm and a matrix; a decoder
of which every sixth block sees all that comes before, the others 1,024 tokens. A picture's tokens see each other.
`mmjax.convert.huggingface.load` reads google/gemma-3-4b-it as this model. The defaults are for 256 chips with 16 GB or
more, a v5e-256 (`v5e:16x16`). Pictures are shown once, without the crops of long ones
(`resolution=PUBLISHED["gemma-3"].policy`, which makes up to five of one).

`--model.decoder.vocab` must be at least what the tokenizer has (fewer are refused with the right number); 262,208 is
that of the published weights, padded.
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
from mmjax.nn.rope_scaling import Linear
from mmjax.sequence import interleave
from mmjax.tokenizers.resolution import Fixed
from mmjax.train.config import Config, Objective, Optimizer, Packing, Update

CHIPS = 256
PICTURE = 64 * 64  # patches of a picture
PICTURES = 3  # in a row
LAYERS = 34


def model() -> vlm.Config:
    """4.30 billion parameters."""
    siglip = ENCODERS["siglip-so400m14-384"]()
    seen = dataclasses.replace(siglip.blocks, remat="full")
    language = transformer.Config(
        width=2560,
        layers=LAYERS,
        heads=8,
        kv_heads=4,
        head=256,
        hidden=10240,
        activation="gelu_tanh",
        norm_offset=1.0,
        post_norm=True,
        qk_norm="head",
        query_scale=256**-0.5,
        windowed=tuple(i for i in range(LAYERS) if (i + 1) % 6),
        window_rope=rope.Config(256, (128,)),
        rope=rope.Config(256, (128,), 1_000_000.0, scaling=Linear(8.0)),
        remat="full",
    )
    return vlm.Config(
        vision=dataclasses.replace(siglip, blocks=seen, table=vit.Table(64, 64), head=None),
        connector=CONNECTORS["gemma3-4b"](),
        decoder=decoder.Config(262208, language, window=1024, embed_scale=language.width**0.5),
        placeholder=262144,
    )


def config() -> Config:
    return Config(
        model=model(),
        data=sets.Mixed((sets.Files(Path("chats.json")),), Path("gemma-3-4b-it"), convention="gemma-3"),
        out=Path("runs/gemma3"),
        steps=1000,
        resolution=Fixed(14, 896, 896, filter="bilinear"),
        packing=Packing(rows=CHIPS, tokens=4096, shapes=((PICTURES * PICTURE, PICTURES),)),
        sequence=interleave.Config(position="sequential", see="bidirectional_images", merge=4),
        optimizer=Optimizer(learning_rate=1e-5, warmup=0.03, final=0.1, b2=0.95, weight_decay=0.1),
        objective=Objective(chunk=512),  # of a vocabulary of a quarter of a million
        update=Update(compute="bfloat16"),
        mesh=MeshConfig(data=8, fsdp=32),  # not fsdp over all chips: see llava_7b
    )
