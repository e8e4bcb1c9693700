"""WiCo and WiCo+ (Li et al. 2025, arXiv:2504.04024): windows of tokens concatenated, and taken apart again later.

Written from the published code (github.com/JackYFL/WiCo), its README and the abstract, not from the full text:

* WiCo concatenates the tokens of each window along the channels, "channel" order, and projects once (the README's
  Figure 1 says an MLP: `layers=2`). It does not average; `reduce="average"` is there to compare with.
* The encoder's last layer (the last K_v in Figure 1) belongs to the projector, that is, it is trained with it, so that
  tokens of one window become alike. The projector has no loss for it. Here it is a choice of what to train.
* Windows adapt to the wanted size: stride = before // after, window = before - (after - 1) · stride, so they overlap
  where sizes do not divide (`adaptive`).
* WiCo+ stretches each picture's tokens before the decoder's last layers (the code: before layer 30 of 32, from 144 to
  576) along the sequence, linearly with aligned corners, as if it had one dimension, and numbers positions anew. The
  second published variant stretches every token along its channels and cuts it up. Nothing of it is learned.
"""

from dataclasses import dataclass
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mmjax.connectors import Connector, grids
from mmjax.core import sharding
from mmjax.core.errors import InputError
from mmjax.core.spec import Spec
from mmjax.nn import linear, mlp


def adaptive(before: int, after: int) -> tuple[int, int]:
    """The window and stride that make `after` windows of `before` tokens on a side."""
    stride = before // after
    return before - (after - 1) * stride, stride


@dataclass(frozen=True)
class Config(Connector):
    """inputs, outputs: widths. window: its side in tokens (published: 2).

    stride: left out, the window's: features lie in squares' order. Given, windows slide, and features lie row by row.
    reduce: "concatenate" or "average".
    layers: 1 (the code), or 2 with GELU between (Figure 1).
    """

    inputs: int
    outputs: int
    window: int = 2
    stride: int | None = None
    reduce: Literal["concatenate", "average"] = "concatenate"
    channels: grids.Channels = "channel"
    layers: int = 1

    @property
    def projection(self) -> linear.Config | mlp.Config:
        width = self.inputs * (self.window**2 if self.reduce == "concatenate" else 1)
        if self.layers == 1:
            return linear.Config(width, self.outputs, True, ("embed", None))
        return mlp.Config(width, self.outputs, self.outputs)

    @property
    def square(self) -> int:
        return self.window if self.stride is None else 1

    @property
    def alone(self) -> bool:
        return self.stride is not None

    def tokens(self, grid: tuple[int, int, int]) -> int:
        if self.stride is None:
            return grids.check(grid, self.window)
        frames, rows, columns = grid
        if min(rows, columns) < self.window:
            raise InputError(f"A grid of {rows}×{columns} patches has no window of {self.window}; enlarge the picture.")
        return frames * ((rows - self.window) // self.stride + 1) * ((columns - self.window) // self.stride + 1)


def spec(cfg: Config) -> Spec:
    return {"projection": (linear if cfg.layers == 1 else mlp).spec(cfg.projection)}


def apply(
    params: dict,
    features: Float[Array, "b p d"],
    cfg: Config,
    *,
    grid: Int[Array, "b n 3"] | None = None,
    size: int | None = None,
) -> Float[Array, "b m outputs"]:
    """[B, P, inputs] → [B, M, outputs], a media token for each window. grid, size: see `windows`."""
    x = windows(features, cfg, grid, size)
    return (linear if cfg.layers == 1 else mlp).apply(params["projection"], x, cfg.projection)


def windows(
    x: Float[Array, "b p d"], cfg: Config, grid: Int[Array, "b n 3"] | None = None, size: int | None = None
) -> Float[Array, "b m e"]:
    """Every window's tokens as one vector.

    Args:
      x: [B, P, D], in squares' order, or row by row where the config has a stride.
      cfg: see Config.
      grid: with a stride, i32[B, N, 3]: frames, rows and columns of each picture.
      size: with a stride, M, room for all windows; P if left out. Behind the last window there are zeros.
    """
    if cfg.stride is None:
        if cfg.reduce == "average":
            return grids.squares(x, cfg.window).mean(2)
        return grids.concatenate(x, cfg.window, cfg.channels)
    if grid is None:
        raise InputError("Sliding windows need the grids of the pictures; give grid=.")
    frames, rows, columns = grid[..., 0], grid[..., 1], grid[..., 2]
    after = (jnp.maximum((a - cfg.window) // cfg.stride + 1, 0) for a in (rows, columns))
    count, (tall, wide) = grid.prod(-1), tuple(after)
    picture, nth = grids.packed(frames * tall * wide, x.shape[1] if size is None else size)
    start, rows, columns, tall, wide = (
        sharding.take_rows(a, picture) for a in (jnp.cumsum(count, axis=1) - count, rows, columns, tall, wide)
    )
    tall, wide = jnp.maximum(tall, 1), jnp.maximum(wide, 1)
    frame, row, column = nth // (tall * wide), nth // wide % tall, nth % wide
    corner = start + (frame * rows + row * cfg.stride) * columns + column * cfg.stride
    inside = [(i, j) for i in range(cfg.window) for j in range(cfg.window)]
    parts = [sharding.take_rows(x, jnp.where(picture >= 0, corner + i * columns + j, -1)) for i, j in inside]
    if cfg.reduce == "average":
        return jnp.stack(parts, 2).mean(2)
    parts = jnp.stack(parts, 3 if cfg.channels == "channel" else 2)
    return parts.reshape(*parts.shape[:2], -1)


@flax.struct.dataclass
class Expanded:
    """A longer sequence, and where its tokens come from."""

    x: Array  # [B, size, D]
    order: Array  # i32[B, size], labels; -1 in empty places
    lo: Array  # i32[B, size]
    hi: Array  # i32[B, size]
    position: Array  # i32[B, size], from 0 in each document
    source: Array  # i32[B, size], the place of the token it was; -1 in empty places
    last: Array  # i32[B, L], where each token is now (a media token: the last it became), -1 if nowhere


@sharding.whole_rows("x", "picture", "document", "order", "lo", "hi")
def expand(
    x: Float[Array, "b l d"],
    times: int,
    size: int,
    *,
    picture: Int[Array, "b l"],
    document: Int[Array, "b l"],
    order: Int[Array, "b l"],
    lo: Int[Array, "b l"],
    hi: Int[Array, "b l"],
    along: Literal["sequence", "channels"] = "sequence",
    causal: bool = True,
) -> Expanded:
    """Every picture's k tokens become times · k, and who sees whom stays.

        t i i t        times 2        t i i i i t
        0 1 2 3                       0 1 2 3 4 5        labels

    What a token became sees all that became of what the token saw; where that was up to itself, up to itself again.
    `sharding.take_rows(y, out.last)` is the way back, to the targets of the batch; `out.source` carries other fields.

    Args:
      x: [B, L, D], hidden states in front of the layers that get more tokens.
      times: how many tokens one becomes (published: 4).
      size: of the new sequence, at least L + (times - 1) · media tokens of the fullest row: what does not fit is lost.
      picture: i32[B, L], which of the row's pictures each token belongs to, rising along the row, -1 for others (they
        may stand between a picture's tokens).
      document: i32[B, L], which of the row's documents: their positions begin at 0.
      order, lo, hi: i32[B, L], labels and what each token sees; labels rise along the row.
      along: "sequence" or "channels", see above.
      causal: without, what one token became sees each other (pictures that are seen both ways).
    """
    length, media = x.shape[1], picture >= 0
    here = jnp.arange(length, dtype=jnp.int32)[None]
    stop = jnp.cumsum(jnp.where(order < 0, 0, jnp.where(media, times, 1)), axis=1, dtype=jnp.int32)
    begin = jnp.concatenate([jnp.zeros_like(stop[:, :1]), stop[:, :-1]], axis=1)
    now = jnp.arange(size, dtype=jnp.int32)[None] + jnp.zeros_like(stop[:, :1])
    source = _search(stop, now, "right")
    source = jnp.where(source < length, source, -1)
    piece = now - sharding.take_rows(begin, source)
    if along == "sequence":
        new = _stretched(x, source, piece, picture, times)
    else:
        new = _cut(x, source, piece, media, times)
    # Labels become places: a token's first and last successor stand for it.
    labels = jnp.where(order < 0, jnp.iinfo(jnp.int32).max, order)
    first = jnp.minimum(_search(labels, lo, "left"), length - 1)
    final = _search(labels, hi, "right") - 1
    own = (hi == order) & causal
    start = sharding.take_rows(begin, first)
    end = jnp.where(final >= 0, sharding.take_rows(stop, final) - 1, -1)
    empty = (lo > hi) | (order < 0)
    lo, hi, own = (sharding.take_rows(a, source) for a in (jnp.where(empty, 0, start), jnp.where(empty, -1, end), own))
    exists = source >= 0
    before = jnp.pad(document[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    opening = jax.lax.cummax(jnp.where(document != before, here, 0), axis=1)
    position = now - sharding.take_rows(sharding.take_rows(begin, opening), source)
    return Expanded(
        new,
        jnp.where(exists, now, -1),
        jnp.where(exists, lo, 0),
        jnp.where(exists, jnp.where(own & (hi >= 0), now, hi), -1),
        jnp.where(exists, position, 0),
        source,
        jnp.where((order >= 0) & (stop <= size), stop - 1, -1),
    )


def _search(table: Int[Array, "b l"], values: Int[Array, "b m"], side: str) -> Int[Array, "b m"]:
    """numpy.searchsorted of each row, by halving (jnp.searchsorted knows no Explicit meshes in jax 0.10)."""
    length = table.shape[1]

    def halve(_: jax.Array, ends: tuple) -> tuple:
        low, high = ends
        middle = (low + high) // 2
        found = sharding.take_rows(table, middle)
        after = (low < high) & (found < values if side == "left" else found <= values)
        return jnp.where(after, middle + 1, low), jnp.where(after, high, jnp.minimum(middle, high))

    start = sharding.vary((jnp.zeros_like(values), jnp.full_like(values, length)), (table, values))
    return jax.lax.fori_loop(0, length.bit_length(), halve, start)[0]


def _stretched(
    x: Float[Array, "b l d"],
    source: Int[Array, "b m"],
    piece: Int[Array, "b m"],
    picture: Int[Array, "b l"],
    times: int,
) -> Float[Array, "b m d"]:
    """A picture's k tokens read at times · k even steps from the first to the last; others as they are."""
    media = picture >= 0
    rank = jnp.cumsum(media, axis=1, dtype=jnp.int32)  # media tokens up to here
    # The media tokens of the row one after the other, and in them the first and the number of each picture's.
    known = jnp.where(media, picture, -1)
    before = jnp.pad(jax.lax.cummax(known, axis=1)[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    opening = jax.lax.cummax(jnp.where(media & (known != before), rank - 1, -1), axis=1)
    closing = _search(jax.lax.cummax(known, axis=1), known, "right") - 1
    total = sharding.take_rows(rank, jnp.maximum(closing, 0)) - opening
    opening, total, nth = (sharding.take_rows(a, source) for a in (opening, total, rank - 1 - opening))
    # (times · nth + piece) · (k - 1) / (times · k - 1), in integers.
    above, below = (nth * times + piece) * (total - 1), jnp.maximum(total * times - 1, 1)
    low = above // below
    weight = ((above - low * below).astype(jnp.float32) / below.astype(jnp.float32))[..., None].astype(x.dtype)
    of_picture = sharding.take_rows(media, source)
    lower = jnp.where(of_picture, _search(rank, opening + low + 1, "left"), source)
    upper = jnp.where(of_picture, _search(rank, opening + jnp.minimum(low + 1, total - 1) + 1, "left"), source)
    a, b = sharding.take_rows(x, lower), sharding.take_rows(x, upper)
    return jnp.where(of_picture[..., None], (1 - weight) * a + weight * b, a)


def _cut(
    x: Float[Array, "b l d"], source: Int[Array, "b m"], piece: Int[Array, "b m"], media: Array, times: int
) -> Float[Array, "b m d"]:
    """A picture's token read at times · D even steps along its channels and cut into `times`; others as they are."""
    width = x.shape[-1]
    above, below = np.arange(width * times) * (width - 1), max(width * times - 1, 1)
    low = above // below
    weight = jnp.asarray((above - low * below) / below, x.dtype).reshape(1, 1, times, width)
    a, b = (x[..., i].reshape(*x.shape[:2], times, width) for i in (low, np.minimum(low + 1, width - 1)))
    pieces = ((1 - weight) * a + weight * b).reshape(x.shape[0], -1, width)
    cut = sharding.take_rows(pieces, jnp.where(source >= 0, source * times + piece, -1))
    return jnp.where(sharding.take_rows(media, source)[..., None], cut, sharding.take_rows(x, source))
