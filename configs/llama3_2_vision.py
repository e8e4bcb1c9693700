"""Llama 3.2 Vision 11B (Grattafiori et al. 2024, "The Llama 3 herd of models", section 7), trained whole.

    python -m mmjax.plan llama3_2_vision --topology v5p:8x8x4     # any machine: memory, FLOPs, collectives, step time
    python -m mmjax.train llama3_2_vision --data.sources.0.path chats.json --data.tokenizer llama/tokenizer.json

A picture lies on a canvas of up to four tiles of 560 pixels, which two transformers see together; Llama 3.1 8B looks at
it through eight layers of gated cross-attention before each fourth block. `mmjax.convert.huggingface.load` reads
meta-llama/Llama-3.2-11B-Vision as this model. Two quirks are kept, as its weights were trained with them: padding of
canvases is seen (`model.vision.padding`), and what stands before a document's first picture sees all of its media
(`model.decoder.cross.blind`). The defaults are for 256 chips of v5p (`v5p:8x8x4`).

The last 8 of 128,264 ids, the picture's marker among them, are read and never said.
"""

import math
from pathlib import Path

from mmjax.connectors import linear as connector
from mmjax.core.meshes import MeshConfig
from mmjax.data import sets
from mmjax.encoders import tiled
from mmjax.models import decoder, vlm
from mmjax.nn import cross_attention, patch_embed, rope, transformer
from mmjax.nn.rope_scaling import Llama3
from mmjax.sequence import interleave
from mmjax.tokenizers.published import PUBLISHED
from mmjax.train.config import Config, Objective, Optimizer, Packing, Update

CHIPS = 256
SIDE, TILES = 40, 4  # patches a side of a tile, tiles of a canvas
TAPS = (3, 7, 15, 23, 30)


def vision() -> tiled.Config:
    """Two transformers of 32 and 8 blocks; 6,404 features of 7,680 values for every picture."""
    width, heads = 1280, 16

    def blocks(layers: int, gate: float | None = None) -> transformer.Config:
        return transformer.Config(
            width=width,
            layers=layers,
            heads=heads,
            kv_heads=heads,
            head=width // heads,
            hidden=5120,
            activation="gelu",
            gated=False,
            bias=True,
            qkv_bias=False,
            out_bias=False,
            norm_kind="layer",
            epsilon=1e-5,
            gate=gate,
            remat="attention",
        )

    return tiled.Config(
        embed=patch_embed.Config(14, width, 3, *patch_embed.OPENAI, bias=False),
        blocks=blocks(32),
        whole=blocks(8, math.pi / 4),
        side=SIDE,
        tiles=TILES,
        shapes=PUBLISHED["llama-3.2-vision"].policy.shapes,
        taps=TAPS,
    )


def model() -> vlm.Config:
    """10.67 billion parameters."""
    language = transformer.Config(
        width=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head=128,
        hidden=14336,
        epsilon=1e-5,
        rope=rope.Config(128, (64,), theta=500_000.0, scaling=Llama3(8.0, 1.0, 4.0, 8192)),
        remat="attention",
    )
    looks = cross_attention.Config(
        width=language.width,
        media=language.width,
        heads=language.heads,
        head=language.head,
        hidden=language.hidden,
        epsilon=language.epsilon,
        at=tuple(range(3, language.layers, 4)),
        kv_heads=language.kv_heads,
        activation="silu",
        gated=True,
        norm_kind="rms",
        qk_norm=True,
        blind="all",
    )
    seen = vision()
    return vlm.Config(
        vision=seen,
        connector=connector.Config(seen.outputs, language.width, per_picture=seen.per_picture),
        decoder=decoder.Config(128_264, language, tied=False, cross=looks, unsaid=8),
    )


def config() -> Config:
    return Config(
        model=model(),
        data=sets.Mixed((sets.Files(Path("chats.json")),), Path("tokenizer.json"), convention="llama-3.2-vision"),
        out=Path("runs/llama3_2_vision"),
        steps=1000,
        resolution=PUBLISHED["llama-3.2-vision"].policy,
        packing=Packing(rows=CHIPS, tokens=2048, shapes=((TILES * SIDE**2, 1),)),
        sequence=interleave.Config(cross="last_images", position="sequential", window=SIDE, canvas=TILES),
        optimizer=Optimizer(learning_rate=1e-5, warmup=0.03, final=0.0, b2=0.999, weight_decay=0.0),
        objective=Objective(chunk=2048),
        update=Update(compute="bfloat16"),
        mesh=MeshConfig(data=8, fsdp=32),
    )
