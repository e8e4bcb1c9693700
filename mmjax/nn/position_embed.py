"""Positions as vectors that are added: sinusoidal in the published orders, and learned tables for grids of any size."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from mmjax.core import sharding
from mmjax.core.errors import InputError
from mmjax.nn.resize import kernel

Part = tuple[Literal["sin", "cos"], int]  # which function of which axis of the position

# The published orders. Axes of 2-D positions are (0: row, 1: column).
CONCATENATED: tuple[Part, ...] = (("sin", 0), ("cos", 0))  # tensor2tensor, Whisper
MAE: tuple[Part, ...] = (("sin", 1), ("cos", 1), ("sin", 0), ("cos", 0))  # He et al. 2022; MoCo v3
HEIGHT_FIRST: tuple[Part, ...] = (("sin", 0), ("cos", 0), ("sin", 1), ("cos", 1))  # transformers' ViTMAE
TIMM: tuple[Part, ...] = (("sin", 0), ("sin", 1), ("cos", 0), ("cos", 1))  # timm's build_sincos2d_pos_embed
LONGEST = 2**14  # patches a side of a picture whose places are bucketised


def sinusoidal(
    position: Num[Array | np.ndarray, "... axes"],
    width: int,
    parts: tuple[Part, ...] = CONCATENATED,
    *,
    theta: float = 10_000.0,
    interleaved: bool = False,
    closed: bool = False,
) -> Float[Array, "... width"]:
    """Sines and cosines of a position at falling frequencies (Vaswani et al. 2017, section 3.5).

    Args:
      position: [..., axes], integers or reals.
      width: values in the result; every part gets an equal share, with frequencies theta^(-i / n).
      parts: the order of the parts.
      theta: base of the frequencies.
      interleaved: neighbouring parts alternate value by value, as in the paper itself: sin 0, cos 0, sin 1, cos 1 …
      closed: the slowest frequency is 1 / theta exactly, theta^(-i / (n - 1)) (tensor2tensor, Whisper, fairseq).

    Returns:
      f32[..., width].

    Raises:
      InputError: the width does not divide.
    """
    if width % len(parts) or (interleaved and len(parts) % 2):
        raise InputError(f"A width of {width} does not divide into {len(parts)} sinusoidal parts evenly.")
    bands = width // len(parts)
    frequency = theta ** -(np.arange(bands) / (bands - 1 if closed else bands))
    frequency = frequency.astype(np.float32).reshape((1,) * (position.ndim - 1) + (bands,))
    function = {"sin": jnp.sin, "cos": jnp.cos}
    at = jnp.asarray(position, jnp.float32)
    out = [function[name](at[..., axis, None] * frequency) for name, axis in parts]
    if interleaved:
        pairs = [jnp.stack(pair, -1).reshape(*pair[0].shape[:-1], -1) for pair in zip(out[::2], out[1::2], strict=True)]
        return jnp.concatenate(pairs, -1)
    return jnp.concatenate(out, -1)


def fourier(
    position: Num[Array | np.ndarray, "... axes"],
    bands: int,
    resolution: tuple[int, ...],
    *,
    concat_pos: bool = True,
    sine_only: bool = False,
) -> Float[Array, "... width"]:
    """Sines and cosines of a position at evenly spaced frequencies (Jaegle et al. 2021, Perceiver, section 3.2).

    sin(π f_k x_d) for the bands of the first axis, of the second …, then the cosines.

    Args:
      position: [..., axes], from -1 to 1 (see `centred`).
      bands: frequencies of each axis, from 1 to half its resolution.
      resolution: how many places each axis was learned with; grids may have fewer or more.
      concat_pos: the position itself goes in front.
      sine_only: no cosines.

    Returns:
      f32[..., axes (if concat_pos) + axes × bands × (1 or 2)].

    Raises:
      InputError: as many resolutions as axes are needed.
    """
    axes = position.shape[-1]
    if len(resolution) != axes:
        raise InputError(f"{len(resolution)} resolutions do not fit {axes} axes of positions; give one for each.")
    frequency = np.stack([np.linspace(1.0, r / 2, bands) for r in resolution]).astype(np.float32)
    at = jnp.asarray(position, jnp.float32)
    turns = at[..., None] * frequency.reshape((1,) * (at.ndim - 1) + frequency.shape)
    # Whole turns go before π comes in: a phase of hundreds has no digits left for the sine.
    phase = jnp.pi * (turns - 2.0 * jnp.round(turns / 2.0)).reshape(*at.shape[:-1], axes * bands)
    out = [at] * concat_pos + [jnp.sin(phase)] + [jnp.cos(phase)] * (not sine_only)
    return jnp.concatenate(out, -1)


def centred(index: Int[Array, "... axes"], grid: Int[Array, "... axes"]) -> Float[Array, "... axes"]:
    """Places of a grid as reals: the first of each axis is -1, the last 1 (the only one -1)."""
    last = grid - 1
    return jnp.where(last > 0, (2 * index - last) / jnp.maximum(last, 1), -1.0).astype(jnp.float32)


def learned(table: Float[Array, "n d"], index: Int[Array, "b l"]) -> Float[Array, "b l d"]:
    """Rows of a learned table; zeros where the index is negative, NaN past the end: nothing was learned there."""
    rows = table.shape[0]
    out = sharding.take(table, jnp.clip(index, 0, rows - 1), ("batch", "length", None))
    out = jnp.where((index >= 0)[..., None], out, 0.0)
    return jnp.where((index < rows)[..., None], out, jnp.nan)


def bucketised(
    table: Float[Array, "rows columns d"], position: Int[Array, "b p 2"], grid: Int[Array, "b p 2"]
) -> Float[Array, "b p d"]:
    """A learned table read at the place where each patch begins, as a share of its own picture; nothing is mixed.

    The fractional positions of Dehghani et al. 2023 (NaViT, section 2.1) as Idefics2 reads SigLIP's table by them:

        patch i of 5         0  1  2  3  4
        reads row k of 4     0  0  1  2  3     the last with k / 4 <= i / 5

    In single precision and in the published order, i · (1 / n): a place on an edge goes where that is rounded to.

    Args:
      table: [H, W, D].
      position: i32[B, P, 2], (row, column) of each patch in its picture.
      grid: i32[B, P, 2], (rows, columns) of its picture; anything in empty places. Patches of pictures with more than
        LONGEST a side are NaN.
    """
    rows, columns, width = table.shape
    down, across = (_bucket(position[..., axis], grid[..., axis], side) for axis, side in enumerate((rows, columns)))
    long = (grid > LONGEST).any(-1)
    return learned(table.reshape(-1, width), jnp.where(long, rows * columns, down * columns + across))


def _bucket(index: jax.Array, count: jax.Array, buckets: int) -> jax.Array:
    """How many edges between buckets are at or before index / count."""
    # Not divided on device: not every one rounds a quotient as published code's does.
    shares = np.float32(1) / np.maximum(np.arange(LONGEST + 1), 1).astype(np.float32)
    share = sharding.take(jnp.asarray(shares[:, None]), jnp.clip(count, 0, LONGEST), ("batch", "length", None))
    edges = (np.arange(1, buckets) / buckets).astype(np.float32)
    at = index.astype(jnp.float32)[..., None] * share
    return (at >= edges.reshape(1, 1, -1)).sum(-1, dtype=jnp.int32)


def interpolate(
    table: Float[Array, "rows columns d"],
    position: Int[Array, "b p 2"],
    grid: Int[Array, "b p 2"],
    *,
    method: Literal["bilinear", "bicubic"] = "bilinear",
    antialias: bool = False,
    align_corners: bool = False,
) -> Float[Array, "b p d"]:
    """A learned table resized to every patch's own grid, as torch's `interpolate` does, and read at the patch.

    The grids are data, so pictures of any sizes share a row and nothing compiles twice. Differentiable in the table.

    Args:
      table: [H, W, D], learned for a grid of H × W patches.
      position: i32[B, P, 2], (row, column) of each patch in its picture.
      grid: i32[B, P, 2], (rows, columns) of its picture; anything at least 1 in empty places.
      method, antialias, align_corners: as torch defines them. CLIP, SigLIP, DINOv2 and ViT take "bicubic"; SigLIP 2
        "bilinear" with antialias; Qwen3-VL "bilinear" with align_corners.
    """
    down, across = (
        _weights(position[..., axis], grid[..., axis], table.shape[axis], method, antialias, align_corners)
        for axis in (0, 1)
    )
    both = down[..., :, None] * across[..., None, :]
    flat = both.reshape(*both.shape[:2], -1).astype(table.dtype)
    return sharding.dense(flat, table.reshape(-1, table.shape[-1]), ("batch", "length", None))


def _weights(
    at: jax.Array, size: jax.Array, table: int, method: str, antialias: bool, align_corners: bool
) -> jax.Array:
    """How much each of the table's `table` places counts at the place `at` of `size`, f32[..., table]."""
    at, size = at.astype(jnp.float32)[..., None], jnp.maximum(size, 1).astype(jnp.float32)[..., None]
    place = jnp.arange(table, dtype=jnp.float32).reshape((1,) * (at.ndim - 1) + (table,))
    if antialias:
        # The kernel grows with the step where the table shrinks, and is cut at the edges (Pillow's way).
        step = table / size
        wide = jnp.maximum(step, 1.0)
        centre, support = (at + 0.5) * step, wide * (1.0 if method == "bilinear" else 2.0)
        first = jnp.maximum(jnp.floor(centre - support + 0.5), 0.0)
        last = jnp.minimum(jnp.floor(centre + support + 0.5), float(table))
        out = kernel((place - centre + 0.5) / wide, method, -0.5)
        out = jnp.where((place >= first) & (place < last), out, 0.0)
        return out / out.sum(-1, keepdims=True)
    if align_corners:
        source = at * jnp.where(size > 1, (table - 1) / jnp.maximum(size - 1, 1), 0.0)
    else:
        source = (at + 0.5) * (table / size) - 0.5
    if method == "bilinear":
        return kernel(jnp.clip(source, 0.0, table - 1.0) - place, method, 0.0)
    # Taps beyond the edge read the edge.
    floor = jnp.floor(source)
    out = jnp.zeros_like(place * source)
    for tap in (-1, 0, 1, 2):
        weight = kernel(source - (floor + tap), method, -0.75)
        out = out + jnp.where(jnp.clip(floor + tap, 0.0, table - 1.0) == place, weight, 0.0)
    return out
