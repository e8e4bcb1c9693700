"""Patches to vectors: raw bytes, normalised on device, times one matrix (Dosovitskiy et al. 2021, eq. 1).

Or, for small data, through a few small layers inside each patch first: patches still never mix, so packing is free.
"""

import dataclasses
from dataclasses import dataclass
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from mmjax.core import sharding
from mmjax.core.errors import InputError
from mmjax.core.spec import Normal, Spec
from mmjax.nn import linear, norm

Colours = tuple[tuple[float, float, float], tuple[float, float, float]]
# Means and deviations of colours, of values in [0, 1], that published encoders were trained with.
HALF: Colours = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET: Colours = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI: Colours = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

SMOOTH = 1e-2  # variance below which `patch_norm` leaves a patch flat: one colour and some compression noise


@dataclass(frozen=True)
class Config:
    """Sizes and variants.

    mean, deviation: per colour channel, of values in [0, 1].
    frames: a matrix for so many frames of a clip, one after the other in the patch (Qwen2-VL: 2). A patch of a single
      frame is that of a clip that stands still: the frames' matrices are added up and its pixels are not sent twice.
    patch_norm: LayerNorm of a patch's pixel values first (Kumar et al. 2023, Dual PatchNorm): what matters is how they
      differ, not how bright they are.
    stem: hierarchical MLP stem (Touvron et al. 2022, "Three things …", section 5): stages (pixels, width), each
      merging squares of so many pixels a side with one matrix for all of them, LayerNorm and GELU after.
    """

    patch: int
    width: int
    channels: int = 3
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    deviation: tuple[float, ...] = (0.5, 0.5, 0.5)
    bias: bool = True
    frames: int = 1
    patch_norm: bool = False
    stem: tuple[tuple[int, int], ...] = ()

    def __post_init__(self):
        if self.frames > 1 and (self.patch_norm or self.stem):
            raise InputError("Patches of several frames go through one matrix; leave patch_norm and the stem out.")
        sides = [1, *(pixels for pixels, _ in self.stem), self.patch]
        if any(big % small for small, big in pairwise(sides)):
            raise InputError(
                f"The stem's squares of {sides[1:-1]} pixels do not tile each other and a patch of {self.patch}; each "
                f"must divide the next."
            )

    @property
    def values(self) -> int:
        """Numbers in a patch of one frame."""
        return self.patch * self.patch * self.channels

    @property
    def stages(self) -> tuple[linear.Config, ...]:
        """The stem's matrices, then the last one."""
        out, side, width = [], 1, self.channels
        for pixels, wide in self.stem:
            out.append(linear.Config((pixels // side) ** 2 * width, wide, True, (None, None)))
            side, width = pixels, wide
        inputs = (self.patch // side) ** 2 * width * self.frames
        return (*out, linear.Config(inputs, self.width, self.bias, (None, "embed")))


def spec(cfg: Config) -> Spec:
    *stem, last = cfg.stages
    out = _linear(last, cfg)
    if cfg.patch_norm:
        out["norm"] = norm.spec(norm.Config(cfg.values, "layer"))
    for i, stage in enumerate(stem):
        out[f"stem_{i}"] = _linear(stage, cfg) | {"norm": norm.spec(norm.Config(stage.outputs, "layer"))}
    return out


def _linear(stage: linear.Config, cfg: Config) -> Spec:
    """With `patch_norm` a blank patch is its bias alone; of zeros, the next norm's gradient would be 1,000 times it."""
    out = linear.spec(stage)
    if cfg.patch_norm and stage.bias:
        out["bias"] = dataclasses.replace(out["bias"], init=Normal(0.1))
    return out


def apply(params: dict, patches: Num[Array, "b p c"], cfg: Config) -> Float[Array, "b p d"]:
    """u8 or f32[B, P, C] → [B, P, D] in the kernels' dtype.

    C runs over (row, column, channel) of a patch, or over (frame, row, column, channel) where cfg has several frames.
    Bytes mean 0…255; floats are taken as normalised already. A matrix product: on every backend faster than the
    convolution it equals.
    """
    patches = normalise(patches, cfg)
    if cfg.patch_norm:
        patches = norm.apply(params["norm"], patches, norm.Config(cfg.values, "layer", SMOOTH))
    *stem, last = cfg.stages
    patches = patches.astype(params["kernel"].dtype)
    if not stem:
        if patches.shape[-1] < last.inputs:
            kernel = params["kernel"].reshape(cfg.frames, cfg.values, cfg.width).sum(0)
            params, last = params | {"kernel": kernel}, dataclasses.replace(last, inputs=cfg.values)
        return linear.apply(params, patches, last)
    x = patches[..., _by_squares(cfg)]
    for i, stage in enumerate(stem):
        count = x.shape[2] // stage.inputs
        x = linear.apply(params[f"stem_{i}"], sharding.regroup(x, (stage.inputs,)), stage)
        x = jax.nn.gelu(norm.apply(params[f"stem_{i}"]["norm"], x, norm.Config(stage.outputs, "layer", 1e-5)))
        x = sharding.regroup(x, (count * stage.outputs,))
    return linear.apply(params, x, last)


def normalise(patches: Num[Array, "b p c"], cfg: Config) -> Num[Array, "b p c"]:
    """Bytes 0…255 as (value / 255 − mean) / deviation, per colour channel; floats are left as they are."""
    if not jnp.issubdtype(patches.dtype, jnp.integer):
        return patches
    pixels = patches.shape[-1] // cfg.channels
    mean, deviation = (np.tile(np.asarray(v, np.float32), pixels)[None, None] for v in (cfg.mean, cfg.deviation))
    return (patches.astype(jnp.float32) / 255.0 - mean) / deviation


def _by_squares(cfg: Config) -> np.ndarray:
    """The order of a patch's values in which the squares of every stage follow each other, row by row."""

    def cut(block: np.ndarray, sides: list[int]) -> list[np.ndarray]:
        if not sides:
            return [block.reshape(-1)]
        side, n = sides[0], len(block)
        squares = (block[y : y + side, x : x + side] for y in range(0, n, side) for x in range(0, n, side))
        return [values for square in squares for values in cut(square, sides[1:])]

    values = np.arange(cfg.values).reshape(cfg.patch, cfg.patch, cfg.channels)
    return np.concatenate(cut(values, [pixels for pixels, _ in reversed(cfg.stem)]))


def patchify(images: Num[Array, "b h w c"], patch: int, merge: int = 1) -> Num[Array, "b p values"]:
    """Whole pictures [B, height, width, channels] → [B, rows × columns, patch² × channels].

    Row by row; with `merge`, merge × merge patches next to each other (Qwen2-VL's order). Both sides must be multiples.
    """
    b, h, w, c = images.shape
    unit = patch * merge
    # One axis at a time: arrays whose sharding is part of their type split no two at once.
    x = images.reshape(b, h // unit, merge, patch, w, c)
    x = x.reshape(b, h // unit, merge, patch, w // unit, merge, patch, c)
    return x.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(
    patches: Num[Array, "b p values"], rows: int, columns: int, channels: int = 3, merge: int = 1
) -> Num[Array, "b h w c"]:
    """The inverse of `patchify`, for so many rows and columns of patches."""
    b, _, values = patches.shape
    patch = round((values / channels) ** 0.5)
    x = patches.reshape(b, rows // merge, columns // merge, merge, merge, values)
    x = x.reshape(b, rows // merge, columns // merge, merge, merge, patch, patch, channels)
    return x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, rows * patch, columns * patch, channels)
