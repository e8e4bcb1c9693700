"""Patches to vectors: raw bytes, normalised on device, times one matrix (Dosovitskiy et al. 2021, eq. 1)."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from mmjax.core.spec import Spec
from mmjax.nn import linear


@dataclass(frozen=True)
class Config:
    """`mean` and `deviation` are per colour channel, of values in [0, 1]."""

    patch: int
    width: int
    channels: int = 3
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    deviation: tuple[float, ...] = (0.5, 0.5, 0.5)
    bias: bool = True

    @property
    def values(self) -> int:
        return self.patch * self.patch * self.channels

    @property
    def linear(self) -> linear.Config:
        return linear.Config(self.values, self.width, self.bias, (None, "embed"))


def spec(cfg: Config) -> Spec:
    return linear.spec(cfg.linear)


def apply(params: dict, patches: Num[Array, "b p c"], cfg: Config) -> Float[Array, "b p d"]:
    """u8 or f32[B, P, C] → f32[B, P, D].

    C runs over (row, column, channel) of a patch. Bytes mean 0…255; floats are taken as normalised already. A matrix
    product: on every backend faster than the convolution it equals.
    """
    if jnp.issubdtype(patches.dtype, jnp.integer):
        pixels = cfg.patch * cfg.patch
        mean, deviation = (np.tile(np.asarray(v, np.float32), pixels)[None, None] for v in (cfg.mean, cfg.deviation))
        patches = (patches.astype(jnp.float32) / 255.0 - mean) / deviation
    return linear.apply(params, patches, cfg.linear)


def patchify(images: Num[Array, "b h w c"], patch: int) -> Num[Array, "b p values"]:
    """Whole pictures [B, height, width, channels] → [B, rows × columns, patch² × channels], raster order."""
    b, h, w, c = images.shape
    x = images.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(patches: Num[Array, "b p values"], rows: int, columns: int) -> Num[Array, "b h w c"]:
    """The inverse of `patchify`, for three colour channels."""
    b, _, values = patches.shape
    patch = round((values / 3) ** 0.5)
    x = patches.reshape(b, rows, columns, patch, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, rows * patch, columns * patch, 3)
