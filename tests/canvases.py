"""The smallest model whose text looks at pictures on canvases from beside, and batches for it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from fused import VALUES, VOCAB, Letters
from tiny import tiny_model

from mmjax.connectors import linear
from mmjax.encoders import tiled
from mmjax.models import vlm
from mmjax.nn import cross_attention, patch_embed, transformer
from mmjax.sequence import batch as batches
from mmjax.sequence.document import Document, Image, Text
from mmjax.sequence.interleave import Config, interleave
from mmjax.sequence.layout import layout
from mmjax.tokenizers.canvas import Canvas

SIDE, TILES = 2, 2
SEQUENCE = Config(cross="last_images", window=SIDE, canvas=TILES)
POLICY = Canvas(4, 4 * SIDE, TILES)
WIDE, SMALL, TALL = (Image(*size, b"") for size in ((8, 16), (8, 8), (16, 8)))


@functools.cache
def model() -> vlm.Config:
    plain = tiny_model(vocab=40)
    blocks = transformer.Config(8, 1, 2, 2, 4, 12, "gelu", gated=False, norm_kind="layer")
    vision = tiled.Config(
        patch_embed.Config(4, 8, bias=False),
        blocks,
        dataclasses.replace(blocks, gate=0.5),
        SIDE,
        TILES,
        POLICY.shapes,
        taps=(0,),
    )
    cross = cross_attention.Config(16, 16, 2, 8, 24, at=(1,), blind="all")
    language = dataclasses.replace(plain.decoder, cross=cross, unsaid=3, tied=False)
    out = vlm.Config(vision, linear.Config(16, 16, per_picture=vision.per_picture), language)
    out.refuse(SEQUENCE)
    return out


def make(rows, bucket):
    def one(document):
        laid = layout(document, Letters(), POLICY, model().connector.tokens, fuse="cross")
        rng = np.random.default_rng(len(document.id))
        x = interleave(laid, VOCAB, SEQUENCE)
        return x, [rng.integers(0, 256, (int(np.prod(g)), VALUES), dtype=np.uint8) for g in x.grid]

    batch = batches.build([[one(d) for d in row] for row in rows], bucket, VALUES, VOCAB, SEQUENCE)
    return jax.tree.map(jnp.asarray, batch)


def documents():
    return [
        Document("a", (Text("see"), WIDE, Text("cat", "assistant", True))),
        Document("bb", (SMALL, TALL, Text("or"), SMALL, Text("so", "assistant", True))),
        Document("ccc", (Text("no"), Text("yes", "assistant", True))),
    ]
