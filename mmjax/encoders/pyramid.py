"""Pyramid vision transformers: PVT (Wang et al. 2021) and PVT v2 (Wang et al. 2022, "Improved baselines …").

Whole pictures of one size in, maps of four scales out. Every token sees the whole picture, but keys and values are of a
smaller map (spatial-reduction attention): an interval like any other, over fewer keys.
"""

from dataclasses import dataclass
from itertools import product
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from mmjax.core import sharding
from mmjax.core.errors import InputError
from mmjax.core.spec import Normal, ParamSpec, Spec, fan_in, stack
from mmjax.encoders import hierarchy
from mmjax.encoders.hierarchy import Features, Grid, as_map
from mmjax.nn import linear, mlp, norm, patch_embed
from mmjax.nn.attention import attend
from mmjax.nn.transformer import REMAT

POOLED = 7  # rows and columns of the keys' map in linear attention


@dataclass(frozen=True)
class Config:
    """Sizes and variants; a tuple has one entry per stage.

    kind: "v1": patches tile the picture, learned positions (interpolated for other sizes), a class token in the last
      stage, one norm at the end. "v2": patches overlap, a depthwise convolution in the MLP instead of positions, a norm
      after every stage, whose maps have it, and the mean instead of a class token. "v2_linear": keys and values of
      7 × 7 averages whatever the size (PVT v2-Li, section 3.1), and a ReLU before the depthwise convolution.
    patches, strides: side of a patch in the map below, and the distance of two; equal in v1.
    reductions: side of the squares that keys and values merge; 1 for none. No matter to "v2_linear".
    ratios: the MLP's hidden values over the width.
    image: side of the pictures that v1's positions are for.
    mean, deviation: per channel, of values in [0, 1], for pictures in bytes.
    classes: of a classifier.
    remat: what the backward pass recomputes (see nn.transformer).
    """

    kind: Literal["v1", "v2", "v2_linear"]
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    ratios: tuple[float, ...]
    patches: tuple[int, ...]
    strides: tuple[int, ...]
    reductions: tuple[int, ...] = (8, 4, 2, 1)
    image: int = 224
    channels: int = 3
    mean: tuple[float, ...] = patch_embed.IMAGENET[0]
    deviation: tuple[float, ...] = patch_embed.IMAGENET[1]
    activation: mlp.Activation = "gelu"
    qkv_bias: bool = True
    epsilon: float = 1e-6
    classes: int | None = None
    remat: Literal["none", "dots", "full"] = "none"

    def __post_init__(self):
        lists = (self.depths, self.heads, self.ratios, self.patches, self.strides, self.reductions)
        if {len(x) for x in lists} != {self.stages}:
            raise InputError(f"A pyramid of {self.stages} widths needs {self.stages} of depths, heads, ratios, …")
        for width, heads in zip(self.widths, self.heads, strict=True):
            if width % heads:
                raise InputError(f"A stage of {width} values cannot be shared by {heads} heads evenly.")
        if self.kind == "v1" and (self.patches != self.strides or self.reductions[-1] != 1):
            raise InputError(
                f"PVT's patches {self.patches} must be as far apart as they are wide (strides {self.strides}), and its "
                f"last stage, which has a class token, cannot reduce keys ({self.reductions})."
            )

    @property
    def stages(self) -> int:
        return len(self.widths)

    @property
    def pixels(self) -> patch_embed.Config:
        return patch_embed.Config(self.patches[0], self.widths[0], self.channels, self.mean, self.deviation)

    def embed(self, i: int) -> linear.Config:
        below = self.widths[i - 1] if i else self.channels
        return linear.Config(self.patches[i] ** 2 * below, self.widths[i], True, (None, "embed"))

    def table(self, i: int) -> int:
        """Rows, and columns, of v1's positions."""
        return (self.image // 2 ** (i + 1) if i else self.image) // self.patches[i]

    def has_class(self, i: int) -> bool:
        return self.kind == "v1" and i == self.stages - 1

    def reduce(self, i: int) -> linear.Config | None:
        side = 1 if self.kind == "v2_linear" else self.reductions[i]
        if side == 1 and self.kind != "v2_linear":
            return None
        return linear.Config(side**2 * self.widths[i], self.widths[i], True, (None, "embed"))

    def stage_norm(self, i: int) -> norm.Config:
        return norm.Config(self.widths[i], "layer", self.epsilon)

    def block_mlp(self, i: int) -> mlp.Config:
        return mlp.Config(self.widths[i], int(self.widths[i] * self.ratios[i]), None, self.activation)


def spec(cfg: Config) -> Spec:
    out: Spec = {}
    for i, (width, depth) in enumerate(zip(cfg.widths, cfg.depths, strict=True)):
        attention = hierarchy.attention_spec(width, cfg.heads[i], cfg.qkv_bias)
        if (reduce := cfg.reduce(i)) is not None:
            attention |= {"reduce": linear.spec(reduce), "reduce_norm": norm.spec(cfg.stage_norm(i))}
        layer = {
            "attention_norm": norm.spec(cfg.stage_norm(i)),
            "attention": attention,
            "mlp_norm": norm.spec(cfg.stage_norm(i)),
            "mlp": mlp.spec(cfg.block_mlp(i)),
        }
        stage = {"embed": linear.spec(cfg.embed(i)), "embed_norm": norm.spec(cfg.stage_norm(i))}
        if cfg.kind == "v1":
            side = cfg.table(i)
            stage["table"] = ParamSpec((side, side, width), (None, None, "embed"), Normal(0.02))
        else:
            hidden = cfg.block_mlp(i).hidden
            layer["depthwise"] = {
                "kernel": ParamSpec((3, 3, hidden), (None, None, "mlp"), fan_in(9)),
                "bias": ParamSpec((hidden,), ("mlp",)),
            }
            stage["norm"] = norm.spec(cfg.stage_norm(i))
        if cfg.has_class(i):
            stage |= {name: ParamSpec((width,), (None,), Normal(0.02)) for name in ("class", "class_position")}
        out[f"stage_{i}"] = stage | {"layers": stack(layer, depth)}
    if cfg.kind == "v1":
        out["norm"] = norm.spec(cfg.stage_norm(-1))
    if cfg.classes:
        out["classifier"] = linear.spec(hierarchy.classifier(cfg.widths[-1], cfg.classes))
    return out


@sharding.whole_rows("images")
def apply(params: dict, images: Num[Array, "b h w c"], cfg: Config) -> Features:
    """Pictures [B, H, W, C] of one size → `Features`.

    What is left over at the lower right where a patch or a square of keys does not fit is not looked at (as published).

    Args:
      params: as `spec(cfg)`.
      images: bytes, normalised with cfg's mean and deviation, or floats that are normalised already.
      cfg: the encoder.

    Raises:
      InputError: a map is smaller than a patch or than a square of keys.
    """
    below, maps = hierarchy.floats(images, cfg.pixels), []
    for i in range(cfg.stages):
        x, grid = embed(params[f"stage_{i}"], below, cfg, i)
        x = stage(params[f"stage_{i}"]["layers"], x, cfg, i, grid)
        if cfg.kind != "v1":
            x = norm.apply(params[f"stage_{i}"]["norm"], x, cfg.stage_norm(i))
        below = as_map(x[:, 1:] if cfg.has_class(i) else x, grid)
        maps.append(below)
    if cfg.kind == "v1":
        x = norm.apply(params["norm"], x, cfg.stage_norm(-1))
        pooled = x[:, 0]
    else:
        pooled = x.astype(jnp.float32).mean(1).astype(x.dtype)
    return Features(tuple(maps), x, pooled, hierarchy.classify(params, pooled, cfg.classes))


def embed(params: dict, below: Float[Array, "b h w c"], cfg: Config, i: int) -> tuple[Float[Array, "b l d"], Grid]:
    """The map below stage i, or the picture, as the stage's tokens; and how many rows and columns of them."""
    side, step = cfg.patches[i], cfg.strides[i]
    patches, grid = unfold(below, side, step, 0 if cfg.kind == "v1" else side // 2)
    x = linear.apply(params["embed"], patches, cfg.embed(i))
    x = norm.apply(params["embed_norm"], x, cfg.stage_norm(i))
    if cfg.kind == "v1":
        table = hierarchy.resized(params["table"], grid, "bilinear").reshape(1, -1, cfg.widths[i])
        x = x + table.astype(x.dtype)
    if cfg.has_class(i):
        token = (params["class"] + params["class_position"]).astype(x.dtype)[None, None]
        token = sharding.constrain(jnp.repeat(token, x.shape[0], axis=0), ("batch", None, None))
        x = jnp.concatenate([sharding.vary(token, x), x], axis=1)
    return sharding.constrain(x, ("batch", None, None)), grid


def stage(params: dict, x: Float[Array, "b l d"], cfg: Config, i: int, grid: Grid) -> Float[Array, "b l d"]:
    """The blocks of a stage, their parameters stacked."""

    def one(x: jax.Array, layer: dict) -> jax.Array:
        return block(layer, x, cfg, i, grid)

    if cfg.remat != "none":
        one = jax.checkpoint(one, policy=REMAT[cfg.remat], prevent_cse=False)
    return jax.lax.scan(lambda x, layer: (one(x, layer), None), x, params)[0]


def block(params: dict, x: Float[Array, "b l d"], cfg: Config, i: int, grid: Grid) -> Float[Array, "b l d"]:
    """One block of stage i: spatial-reduction attention (PVT, equations 1 to 3), MLP."""
    h = norm.apply(params["attention_norm"], x, cfg.stage_norm(i))
    x = x + _attention(params["attention"], h, cfg, i, grid)
    h = norm.apply(params["mlp_norm"], x, cfg.stage_norm(i))
    h = mlp.apply(params["mlp"], h, cfg.block_mlp(i)) if cfg.kind == "v1" else _feed_forward(params, h, cfg, i, grid)
    return sharding.constrain(x + h, ("batch", None, None))


def _attention(params: dict, x: jax.Array, cfg: Config, i: int, grid: Grid) -> jax.Array:
    seen = x
    if cfg.kind == "v2_linear":
        seen = linear.apply(params["reduce"], averaged(as_map(x, grid), POOLED), cfg.reduce(i))
        seen = mlp.ACTIVATIONS["gelu"](norm.apply(params["reduce_norm"], seen, cfg.stage_norm(i)))
    elif cfg.reductions[i] > 1:
        side = cfg.reductions[i]
        seen = linear.apply(params["reduce"], unfold(as_map(x, grid), side, side, 0)[0], cfg.reduce(i))
        seen = norm.apply(params["reduce_norm"], seen, cfg.stage_norm(i))
    q, k, v = (hierarchy.heads(params[name], y) for name, y in (("q", x), ("k", seen), ("v", seen)))
    # One label for all: everybody sees everything.
    queries, keys = (jnp.zeros(y.shape[:2], jnp.int32) for y in (q, k))
    out, _ = attend(q, k, v, keys, queries, queries)
    return hierarchy.back(params["out"], out)


def _feed_forward(params: dict, x: jax.Array, cfg: Config, i: int, grid: Grid) -> jax.Array:
    """down(act(depthwise(up(x)))) (PVT v2, section 3.3)."""
    of = cfg.block_mlp(i)
    h = linear.apply(params["mlp"]["up"], x, of.up)
    if cfg.kind == "v2_linear":
        h = jax.nn.relu(h)
    h = depthwise(params["depthwise"], as_map(h, grid)).reshape(h.shape)
    return linear.apply(params["mlp"]["down"], mlp.ACTIVATIONS[of.activation](h), of.down)


def depthwise(params: dict, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """A 3 × 3 convolution of every channel by itself, zeros around the map.

    As nine shifted products: XLA's depthwise convolution on CPUs takes fifty times as long.
    """
    _, rows, columns, _ = x.shape
    kernel = sharding.constrain(params["kernel"], (None, None, "mlp")).astype(x.dtype)
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    out = sharding.constrain(params["bias"], ("mlp",)).astype(x.dtype)[None, None, None]
    for down, across in product(range(3), range(3)):
        out = out + padded[:, down : down + rows, across : across + columns] * kernel[down, across][None, None, None]
    return out


def unfold(
    x: Float[Array, "b h w c"], side: int, step: int, pad: int
) -> tuple[Float[Array, "b l values"], tuple[int, int]]:
    """Squares of a map, `step` apart, each as (row, column, channel): what a convolution multiplies. And their grid.

    Raises:
      InputError: the map is smaller than a square.
    """
    _, height, width, _ = x.shape
    grid = ((height + 2 * pad - side) // step + 1, (width + 2 * pad - side) // step + 1)
    if min(grid) < 1:
        raise InputError(
            f"A map of {height} × {width} places is too small for squares of {side}; give a larger picture."
        )
    if side == step and not pad:
        return hierarchy.flat_squares(x[:, : grid[0] * side, : grid[1] * side], side), grid
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    last = [(n - 1) * step + 1 for n in grid]
    squares = [
        x[:, down : down + last[0] : step, across : across + last[1] : step]
        for down, across in product(range(side), range(side))
    ]
    return jnp.concatenate(squares, axis=-1).reshape(x.shape[0], grid[0] * grid[1], -1), grid


def averaged(x: Float[Array, "b h w c"], side: int) -> Float[Array, "b l c"]:
    """Means over side × side parts of a map, which overlap where it does not divide (torch's AdaptiveAvgPool2d)."""
    down, across = (jnp.asarray(_shares(n, side)) for n in x.shape[1:3])
    precision = jax.lax.Precision.HIGHEST
    y = jnp.einsum("ph,bhwc->bpwc", down, x.astype(jnp.float32), precision=precision)
    y = jnp.einsum("qw,bpwc->bpqc", across, y, precision=precision)
    return y.reshape(x.shape[0], side * side, -1).astype(x.dtype)


def _shares(size: int, parts: int) -> np.ndarray:
    """How much each of `size` places counts for each of the parts, f32[parts, size]: from floor(i n/p) to ceil."""
    i, place = np.arange(parts)[:, None], np.arange(size)[None]
    inside = (place >= i * size // parts) & (place < -(-(i + 1) * size // parts))
    return (inside / inside.sum(1, keepdims=True)).astype(np.float32)
