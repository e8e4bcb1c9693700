"""Small models that fuse in every way and with every connector, and batches for them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from tiny import tiny_model

from mmjax.connectors import (
    abstractor,
    linear,
    merger,
    perceiver,
    perceiver_io,
    perceiver_layer,
    pixel_shuffle,
    pool,
    qformer,
    restore,
    wico,
)
from mmjax.encoders import vit
from mmjax.models import vlm
from mmjax.nn import cross_attention
from mmjax.sequence import batch as batches
from mmjax.sequence.document import Document, Image, Text
from mmjax.sequence.interleave import Config, interleave
from mmjax.sequence.layout import layout
from mmjax.tokenizers.vocab import Vocab

VOCAB = Vocab(pad=0, begin=1, end=2, system=3, user=4, assistant=5, image=6, image_start=7, image_end=8, size=40)
VALUES = 4 * 4 * 3
LATENTS = 3


class Letters:
    vocab = VOCAB

    def encode(self, text):
        return [9 + ord(c) % 30 for c in text]


class Quarters:
    def grid(self, height, width):
        return height // 4, width // 4


def systems():
    """name → (model, which descriptors)."""
    plain = tiny_model(vocab=40)
    resampled = dataclasses.replace(plain, connector=perceiver.Config(16, 16, LATENTS, 2, 2, 8, 24))
    cross = cross_attention.Config(16, 16, 2, 8, 24, every=1)
    flamingo = dataclasses.replace(resampled, decoder=dataclasses.replace(plain.decoder, cross=cross))
    beside = dataclasses.replace(plain, decoder=dataclasses.replace(plain.decoder, cross=cross))
    blocks = dataclasses.replace(plain.vision.blocks, windowed=(0,))
    windowed = dataclasses.replace(plain, vision=dataclasses.replace(plain.vision, blocks=blocks))
    return {
        "causal": (plain, Config()),
        "prefix-LM": (plain, Config(see="prefix")),
        "bidirectional images": (plain, Config(see="bidirectional_images")),
        "windows": (windowed, Config(window=2)),
        "segments": (dataclasses.replace(plain, segments=True), Config()),
        "resampled, in the sequence": (resampled, Config(position="sequential")),
        "resampled, last image": (flamingo, Config(cross="last_image")),
        "resampled, all images": (flamingo, Config(cross="all_images")),
        "patches, last image": (beside, Config(cross="last_image")),
    }


def make(rows, bucket, model, cfg, seed=0):
    def one(document):
        laid = layout(
            document,
            Letters(),
            Quarters(),
            model.connector.tokens,
            fuse="sequence" if model.decoder.cross is None else "cross",
        )
        x = interleave(laid, VOCAB, cfg)
        rng = np.random.default_rng([seed, len(document.id), document.id.encode()[0]])
        return x, [rng.integers(0, 256, (int(np.prod(g)), VALUES), dtype=np.uint8) for g in x.grid]

    batch = batches.build([[one(d) for d in row] for row in rows], bucket, VALUES, VOCAB, cfg)
    return jax.tree.map(jnp.asarray, batch)


EVEN = [((4, 2), (2, 2)), ((2, 6),), ((2, 2), (4, 4))]  # rows and columns of the pictures of three documents


def connectors():
    """Every connector behind an encoder with class tokens and a position table: name → (config, its squares)."""
    latent = perceiver_layer.Config(16, None, 2, 16, 16, 20)
    return {
        "linear": linear.Config(16, 16),
        "pixel shuffle": pixel_shuffle.Config(16, 16),
        "merger": merger.Config(16, 16),
        "pool": pool.Config(outputs=16, inputs=16),
        "window concatenation": wico.Config(16, 16),
        "Q-Former": qformer.Config(16, 16, 3, 3, 2, 20, outputs=16),
        "abstractor": abstractor.Config(16, 8, 16, 2, depth=1),
        "Perceiver IO": perceiver_io.Config(3, perceiver_layer.Config(16, 16, 2, 16, 16, 20), latent, 2),
        "restoration": restore.Config(16, 2, 2, 8),
    }


def behind_an_encoder(connector, fuse: str = "sequence") -> tuple[vlm.Config, Config]:
    """The smallest model with this connector, its encoder with class tokens and a position table."""
    plain = tiny_model(vocab=40)
    vision = dataclasses.replace(plain.vision, table=vit.Table(3, 3), classes=1)
    model = dataclasses.replace(plain, vision=vision, connector=connector)
    if fuse == "cross":
        cross = cross_attention.Config(16, 16, 2, 8, 24, every=1)
        model = dataclasses.replace(model, decoder=dataclasses.replace(plain.decoder, cross=cross))
    square = 1 if connector.per_picture else connector.square
    return model, Config(position="sequential", merge=square, cross="last_image" if fuse == "cross" else "none")


def even() -> list[Document]:
    """Documents whose pictures every connector can cut."""
    return [
        Document(str(n), (Text("so"), *(Image(4 * h, 4 * w, b"") for h, w in some), Text("b", "assistant", True)))
        for n, some in enumerate(EVEN)
    ]


def everything() -> dict[str, tuple[vlm.Config, Config]]:
    """Every way of fusing, and every connector: name → (model, which descriptors)."""
    return systems() | {name: behind_an_encoder(connector) for name, connector in connectors().items()}
