"""Pooling of squares of patches: Gemma 3's average, LLaVA-OneVision's video frames."""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mmjax.connectors import Connector, grids, mlp
from mmjax.core import sharding
from mmjax.core.errors import InputError
from mmjax.core.spec import Spec
from mmjax.nn import linear
from mmjax.nn import norm as norms

Kind = Literal["average", "max", "bilinear"]


@dataclass(frozen=True)
class Config(Connector):
    """project (LLaVA-OneVision) → pool → norm → linear (Gemma 3); what is left out is left out.

    side: of the square that becomes one media token (Gemma 3: image side / patch / √256 = 4; LLaVA-OneVision: 2).
    kind: "average", "max" or "bilinear" (transformers' LLaVA-OneVision has the last alone, and the only one compared
      with it). "bilinear" resizes each frame to ceil(sides / side).
    raster: patches lie row by row, and sides need be no multiples: what is left of a row or column is left out, or,
      bilinear, smaller squares are taken. Otherwise in squares' order.
    projector: an MLP before pooling.
    norm: after it; Gemma 3's is norm.Config(inputs, "rms", 1e-6, offset=1.0).
    outputs: a matrix at the end, without bias, so wide.
    """

    side: int = 2
    kind: Kind = "average"
    raster: bool = False
    projector: mlp.Config | None = None
    norm: norms.Config | None = None
    outputs: int | None = None
    inputs: int | None = None  # of that matrix

    def __post_init__(self):
        if self.kind == "bilinear" and not self.raster:
            raise InputError("Bilinear pooling reads patches row by row; set raster=True and sequence.merge=1.")

    @property
    def reads(self) -> int | None:
        return self.inputs if self.projector is None else self.projector.width

    @property
    def linear(self) -> linear.Config:
        return linear.Config(self.inputs, self.outputs, False, ("embed", None))

    @property
    def square(self) -> int:
        return 1 if self.raster else self.side

    @property
    def alone(self) -> bool:
        return self.raster

    def tokens(self, grid: tuple[int, int, int]) -> int:
        if not self.raster:
            return grids.check(grid, self.side)
        frames, rows, columns = grid
        up = self.side - 1 if self.kind == "bilinear" else 0
        return frames * ((rows + up) // self.side) * ((columns + up) // self.side)


def spec(cfg: Config) -> Spec:
    out = {}
    if cfg.projector is not None:
        out["projector"] = mlp.spec(cfg.projector)
    if cfg.norm is not None:
        out["norm"] = norms.spec(cfg.norm)
    if cfg.outputs is not None:
        out["linear"] = linear.spec(cfg.linear)
    return out


def apply(
    params: dict,
    features: Float[Array, "b p d"],
    cfg: Config,
    *,
    grid: Int[Array, "b n 3"] | None = None,
    size: int | None = None,
) -> Float[Array, "b m e"]:
    """[B, P, D] → [B, M, outputs], picture after picture without gaps.

    Args:
      params: as `spec(cfg)`.
      features: of packed pictures, in squares' or raster order.
      cfg: see Config.
      grid: with `raster`, i32[B, N, 3]: frames, rows and columns of each picture.
      size: with `raster`, M, room for all media tokens; P if left out.
    """
    if cfg.projector is not None:
        features = mlp.apply(params["projector"], features, cfg.projector)
    x = pool(features, cfg, grid, size)
    x = norms.apply(params["norm"], x, cfg.norm) if cfg.norm is not None else x
    return linear.apply(params["linear"], x, cfg.linear) if cfg.outputs is not None else x


def pool(
    x: Float[Array, "b p d"], cfg: Config, grid: Int[Array, "b n 3"] | None = None, size: int | None = None
) -> Float[Array, "b m d"]:
    """The pooling alone; zeros behind the last media token (with `raster`)."""
    reduce = jnp.max if cfg.kind == "max" else jnp.mean
    if not cfg.raster:
        return reduce(grids.squares(x, cfg.side), axis=2)
    if grid is None:
        raise InputError("Pooling in raster order needs the grids of the pictures; give grid=.")
    side, up = cfg.side, cfg.side - 1 if cfg.kind == "bilinear" else 0
    frames, rows, columns = grid[..., 0], grid[..., 1], grid[..., 2]
    after = (rows + up) // side, (columns + up) // side
    picture, nth = grids.packed(frames * after[0] * after[1], x.shape[1] if size is None else size)
    count = grid.prod(-1)
    start, rows, columns, *after = (
        sharding.take_rows(a, picture) for a in (jnp.cumsum(count, axis=1) - count, rows, columns, *after)
    )
    tall, wide = (jnp.maximum(a, 1) for a in after)
    row, column = nth // wide % tall, nth % wide
    start = start + nth // (tall * wide) * rows * columns

    def read(row: Int[Array, "b m"], column: Int[Array, "b m"]) -> Float[Array, "b m d"]:
        return sharding.take_rows(x, jnp.where(picture >= 0, start + row * columns + column, -1))

    if cfg.kind != "bilinear":
        parts = [read(side * row + i, side * column + j) for i in range(side) for j in range(side)]
        return reduce(jnp.stack(parts, axis=2), axis=2)
    top, bottom, down = grids.between(row, tall, jnp.maximum(rows, 1))
    left, right, across = grids.between(column, wide, jnp.maximum(columns, 1))
    down, across = down[..., None].astype(x.dtype), across[..., None].astype(x.dtype)
    upper = (1 - across) * read(top, left) + across * read(top, right)
    lower = (1 - across) * read(bottom, left) + across * read(bottom, right)
    return (1 - down) * upper + down * lower
