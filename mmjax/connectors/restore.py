"""Slice restoration (Huang et al. 2024, HiRes-LLaVA, arXiv:2407.08706, the SliceRestore adapter).

Slices are encoded one by one, so what lies across a cut is torn. The adapter stitches the slices' features into the
whole map H, adds what a depthwise 3 × 3 convolution and self-attention over a smaller copy of the map see, and cuts the
map again where it was:

    H̄ = local(H) + global(H) + H        global = upsample ∘ self-attention ∘ downsample

Here stitching is index arithmetic and no copy: features stay where they are, only their neighbours are others.

Written from the abstract and from published summaries, not from the paper's full text, and no published code was
found. They give the parts, the 3 × 3 kernel, and the place (in layers of CLIP-ViT); not how far the map is downsampled
or by which filters, how many heads there are, or whether norms and biases belong to it. Chosen here: adaptive averages
of side × side bins, bilinear upsampling, a bias in the convolution alone, no norm.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mmjax.connectors import Connector, grids
from mmjax.core import sharding
from mmjax.core.errors import InputError
from mmjax.core.spec import ZEROS, Normal, ParamSpec, Spec, fan_in
from mmjax.nn import linear
from mmjax.nn.attention import attend


@dataclass(frozen=True)
class Config(Connector):
    """width: of the features. side: the whole is downsampled to side × side. kernel: of the convolution, odd."""

    width: int
    side: int
    heads: int
    head: int
    kernel: int = 3

    def tokens(self, grid: tuple[int, int, int]) -> int:
        if grid[0] != 1:
            raise InputError(f"Slice restoration got {grid[0]} frames as one; make every frame a picture of its own.")
        return grid[1] * grid[2]


def spec(cfg: Config) -> Spec:
    heads = ParamSpec((cfg.width, cfg.heads, cfg.head), ("embed", "heads", None), fan_in(cfg.width))
    inner = cfg.heads * cfg.head
    return {
        "local": {
            "kernel": ParamSpec((cfg.kernel, cfg.kernel, cfg.width), (None,) * 3, Normal(1 / cfg.kernel)),
            "bias": ParamSpec((cfg.width,), (None,), ZEROS),
        },
        "q": {"kernel": heads},
        "k": {"kernel": heads},
        "v": {"kernel": heads},
        "out": {"kernel": ParamSpec((cfg.heads, cfg.head, cfg.width), ("heads", None, "embed"), fan_in(inner))},
    }


@sharding.whole_rows("features", "image", "order", "grid", "slices")
def apply(
    params: dict,
    features: Float[Array, "b p d"],
    cfg: Config,
    *,
    image: Int[Array, "b p"],
    order: Int[Array, "b p"],
    grid: Int[Array, "b n 3"],
    slices: Int[Array, "b n 3"] | None = None,
) -> Float[Array, "b p d"]:
    """[B, P, width] → [B, P, width], every feature at its place.

    Args:
      params: as `spec(cfg)`.
      features: of packed pictures, each row by row; the slices of a whole one after the other, row by row.
      cfg: sizes.
      image, order: i32[B, P], the picture (a slice is one) of each patch and its place in the row, -1 in empty places.
      grid: i32[B, N, 3], one frame each, zeros where there is no picture.
      slices: i32[B, N, 3], for each picture the first picture of its whole, and how many rows and columns of slices
        that has: (n, 1, 1) for a picture alone, such as the view of the whole. Left out, all are alone.
    """
    where, maps = grids.places(image, order, grid, slices), grids.wholes(grid, slices)
    near = grids.depthwise(features, params["local"]["kernel"], where)
    near = linear.plus(near, params["local"]["bias"])
    small = attended(params, grids.average(features, where, maps, cfg.side), cfg, maps)
    # The first picture of a whole holds its map: that one's bins are read.
    first = image if slices is None else sharding.take_rows(slices[..., 0], image)
    far = upsampled(small, cfg.side, where, jnp.where(where.exists, first, -1))
    return sharding.constrain(features + near + far, ("batch", None, None))


def attended(params: dict, x: Float[Array, "b m d"], cfg: Config, maps: grids.Wholes) -> Float[Array, "b m d"]:
    """Self-attention of each whole's side² averages, [B, N · side², width]."""
    area, split = cfg.side**2, ("batch", None, "heads", None)
    start = jnp.arange(maps.exists.shape[1], dtype=jnp.int32)[None] * area
    lo = jnp.repeat(jnp.where(maps.exists, start, 0), area, axis=1)
    hi = jnp.repeat(jnp.where(maps.exists, start + area - 1, -1), area, axis=1)
    labels = jnp.where(hi >= 0, jnp.arange(x.shape[1], dtype=jnp.int32)[None], -1)
    q, k, v = (sharding.dense(x, params[name]["kernel"], split) for name in "qkv")
    return sharding.dense(attend(q, k, v, labels, lo, hi)[0], params["out"]["kernel"], ("batch", None, None))


def upsampled(
    x: Float[Array, "b m d"], side: int, where: grids.Places, picture: Int[Array, "b p"]
) -> Float[Array, "b p d"]:
    """Each whole's side × side map, [B, N · side², D], resized bilinearly to its patches, [B, P, D]."""
    top, bottom, down = grids.between(where.row, jnp.maximum(where.of.rows, 1), side)
    left, right, across = grids.between(where.column, jnp.maximum(where.of.columns, 1), side)
    down, across = down[..., None].astype(x.dtype), across[..., None].astype(x.dtype)

    def read(row: Int[Array, "b p"], column: Int[Array, "b p"]) -> Float[Array, "b p d"]:
        return sharding.take_rows(x, jnp.where(picture >= 0, (picture * side + row) * side + column, -1))

    upper = (1 - across) * read(top, left) + across * read(top, right)
    lower = (1 - across) * read(bottom, left) + across * read(bottom, right)
    return (1 - down) * upper + down * lower
