"""Neighbours, squares and averages of packed pictures of any size: index arithmetic that grid connectors share.

Two orders of patches are known. *Squares*: the patches of side × side squares lie together (sequence.windows), and so
any square is a reshape. *Raster*: row by row, places counted by `order`; what lies next to a patch is then a gather.

    squares of 2        raster        2 slices of 2 × 2, stitched
    0 1  4  5           0 1 2 3       0 1  4 5
    2 3  6  7           4 5 6 7       2 3  6 7
"""

import functools
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mmjax.core import sharding
from mmjax.core.errors import InputError
from mmjax.nn import linear
from mmjax.nn.attention import Bias, attend

Channels = Literal["patch", "channel"]


def check(grid: tuple[int, int, int], side: int) -> int:
    """How many side × side squares a grid has; InputError where its sides are no multiples."""
    frames, rows, columns = grid
    if rows % side or columns % side:
        raise InputError(
            f"A grid of {rows}×{columns} patches does not divide into {side}×{side} squares; use multiples of {side}."
        )
    return frames * (rows // side) * (columns // side)


def squares(x: Float[Array, "b p d"], side: int) -> Float[Array, "b m s d"]:
    """[B, P, D] in squares' order → [B, M = P // side², side², D]; a rest of P holds no patches."""
    _, p, d = x.shape
    area = side * side
    return sharding.regroup(sharding.unsplit(x)[:, : p // area * area] if p % area else x, (area, d))


def concatenate(x: Float[Array, "b p d"], side: int, channels: Channels = "patch") -> Float[Array, "b m e"]:
    """Space to depth: the features of every square as one vector, [B, P, D] → [B, P // side², side² · D].

    channels: "patch" lays patch after patch, row by row (InternVL, Idefics3, Qwen2-VL); "channel" lays the patches'
      first values together, then the second … (torch's unfold: Mistral 3, WiCo).
    """
    x = squares(x, side)
    if channels == "channel":
        x = x.transpose(0, 1, 3, 2)
    return x.reshape(*x.shape[:2], -1)


def present(order: Int[Array, "b p"], side: int) -> Bool[Array, "b m"]:
    """Which squares exist."""
    return sharding.unsplit(order)[:, : order.shape[1] // side**2 * side**2 : side**2] >= 0


@flax.struct.dataclass
class Wholes:
    """The maps of a row, one for each of its N pictures, raster order. A slice that is not its map's first has none.

    The slices of a map are equal and lie one after the other, row by row; a picture alone is its own only slice.
    """

    exists: Any  # bool[B, N]
    start: Any  # i32[B, N], the place of its first patch
    rows: Any  # i32[B, N], of patches; 1 where it does not exist
    columns: Any
    slice_rows: Any  # i32[B, N], of patches in one slice
    slice_columns: Any


@flax.struct.dataclass
class Places:
    """Where every patch of a row lies in its map."""

    exists: Any  # bool[B, P]
    row: Any  # i32[B, P]
    column: Any
    of: Wholes  # its map, fields [B, P]


SIDES = ("rows", "columns", "slice_rows", "slice_columns")


def wholes(grid: Int[Array, "b n 3"], slices: Int[Array, "b n 3"] | None = None) -> Wholes:
    """The maps of packed pictures. Frames of one picture would be one map: make each a picture of its own.

    Args:
      grid: frames, rows and columns of each picture; zeros where there is none.
      slices: for each picture, the first picture of the whole that it is a slice of, and how many rows and columns of
        slices that has; left out, every picture is a whole.
    """
    count = grid.prod(-1)
    start = jnp.cumsum(count, axis=1) - count
    tall, wide = jnp.maximum(grid[..., 0] * grid[..., 1], 1), jnp.maximum(grid[..., 2], 1)
    exists = count > 0
    if slices is None:
        return Wholes(exists, start, tall, wide, tall, wide)
    exists &= slices[..., 0] == jnp.arange(grid.shape[1], dtype=jnp.int32)[None]
    down, across = jnp.maximum(slices[..., 1], 1), jnp.maximum(slices[..., 2], 1)
    return Wholes(exists, start, tall * down, wide * across, tall, wide)


def places(
    image: Int[Array, "b p"],
    order: Int[Array, "b p"],
    grid: Int[Array, "b n 3"],
    slices: Int[Array, "b n 3"] | None = None,
) -> Places:
    """Where every patch lies in its map. image, order: its picture and its place in the row, -1 in empty places."""
    maps, exists = wholes(grid, slices), order >= 0
    picture = jnp.where(exists, image, 0)
    first = picture if slices is None else sharding.take_rows(slices[..., 0], picture)
    of = jax.tree.map(lambda a: sharding.take_rows(a, jnp.where(exists, first, -1)), maps)
    inside = order - sharding.take_rows(maps.start, picture)
    of = of.replace(**{name: jnp.maximum(getattr(of, name), 1) for name in SIDES})
    nth, across = picture - first, of.columns // of.slice_columns
    row = nth // across * of.slice_rows + inside // of.slice_columns
    column = nth % across * of.slice_columns + inside % of.slice_columns
    return Places(exists, jnp.where(exists, row, 0), jnp.where(exists, column, 0), of)


def at(of: Wholes, row: Int[Array, "b l"], column: Int[Array, "b l"]) -> Int[Array, "b l"]:
    """The place of the patch at (row, column) of a map; -1 outside it."""
    inside = of.exists & (row >= 0) & (row < of.rows) & (column >= 0) & (column < of.columns)
    nth = row // of.slice_rows * (of.columns // of.slice_columns) + column // of.slice_columns
    within = row % of.slice_rows * of.slice_columns + column % of.slice_columns
    return jnp.where(inside, of.start + nth * of.slice_rows * of.slice_columns + within, -1)


def depthwise(x: Float[Array, "b p d"], kernel: Float[Array, "k k d"], where: Places) -> Float[Array, "b p d"]:
    """A depthwise convolution of every map, stride 1, zeros around it: k × k shifted products, one after the other."""
    size = kernel.shape[0]
    shift = jnp.arange(size * size, dtype=jnp.int32)
    row, column = shift // size - size // 2, shift % size - size // 2
    index = jax.vmap(lambda i, j: at(where.of, where.row + i, where.column + j))(row, column)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # or the gradients would keep all shifted copies
    def add(out: jax.Array, one: tuple) -> tuple[jax.Array, None]:
        index, scale = one
        return out + linear.times(sharding.take_rows(x, index), scale), None

    start = sharding.vary(jnp.zeros_like(x), (x, index, kernel))
    return jax.lax.scan(add, start, (index, kernel.reshape(size * size, -1)))[0]


def _inside(params: None, query: dict, key: dict) -> Float[Array, "b 1 l s"]:
    """0 for the patches of a bin, -inf for all others of its map."""
    row, column = key["row"][:, None], key["column"][:, None]
    top, bottom, left, right = (query[name][:, :, None] for name in ("top", "bottom", "left", "right"))
    inside = (top <= row) & (row <= bottom) & (left <= column) & (column <= right)
    return jnp.where(inside, 0.0, -jnp.inf)[:, None]


def average(x: Float[Array, "b p d"], where: Places, maps: Wholes, side: int = 1) -> Float[Array, "b m d"]:
    """Every map averaged over side × side bins, [B, P, D] → [B, N · side², D]; zeros where there is no map.

    Bin i of n covers floor(i · rows / n) to ceil((i + 1) · rows / n) - 1 (torch's adaptive_avg_pool2d). An average is
    attention in which all scores are equal: so no [N, P] array exists and each picture costs its own patches only.
    """
    b, n = maps.start.shape
    i = jnp.arange(side, dtype=jnp.int32)[None, None]

    def ends(size: Int[Array, "b n"]) -> tuple[Int[Array, "b n side"], Int[Array, "b n side"]]:
        return i * size[..., None] // side, -(-(i + 1) * size[..., None] // side) - 1

    def spread(a: Array, axis: int) -> Array:
        return jnp.broadcast_to(jnp.expand_dims(a, axis), (b, n, side, side)).reshape(b, n * side * side)

    (top, bottom), (left, right) = ends(maps.rows), ends(maps.columns)
    bins = {"top": spread(top, 3), "bottom": spread(bottom, 3), "left": spread(left, 2), "right": spread(right, 2)}
    last = jnp.where(maps.exists, maps.start + maps.rows * maps.columns - 1, -1)
    lo, hi = (jnp.repeat(a, side * side, axis=1) for a in (jnp.where(maps.exists, maps.start, 0), last))
    here = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    labels = jnp.where(where.exists, here, -1)
    q, k = jnp.zeros((*lo.shape, 1, 1), x.dtype), jnp.zeros((*labels.shape, 1, 1), x.dtype)
    bias = Bias(_inside, None, bins, {"row": where.row, "column": where.column}) if side > 1 else None
    return attend(q, k, x[:, :, None], labels, lo, hi, bias=bias)[0][:, :, 0]


def between(
    index: Int[Array, "*s"], after: Int[Array, "*s"] | int, before: Int[Array, "*s"] | int
) -> tuple[Int[Array, "*s"], Int[Array, "*s"], Float[Array, "*s"]]:
    """Which two of `before` samples the bilinear filter reads for sample `index` of `after`, and the second's weight.

    As torch's interpolate without align_corners and without antialiasing: (index + ½) · before / after - ½, at least 0.
    """
    # A fraction of integers: exact, where floats would not be.
    above = jnp.maximum((2 * index + 1) * before - after, 0)
    low = jnp.minimum(above // (2 * after), before - 1)
    weight = (above - low * 2 * after).astype(jnp.float32) / jnp.asarray(2 * after, jnp.float32)
    return low, jnp.minimum(low + 1, before - 1), weight


def packed(count: Int[Array, "b n"], size: int) -> tuple[Int[Array, "b m"], Int[Array, "b m"]]:
    """`count[b, n]` places for each picture, one picture after the other: the picture and the number of every place.

    Returns:
      i32[B, size] each; the picture is -1 behind the last place.
    """
    stop = jnp.cumsum(count, axis=1)
    here = jnp.arange(size, dtype=jnp.int32)[None]
    picture = (here[:, :, None] >= stop[:, None]).sum(-1, dtype=jnp.int32)
    picture = jnp.where(picture < count.shape[1], picture, -1)
    return picture, here - sharding.take_rows(stop - count, picture)
