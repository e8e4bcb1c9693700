"""The Swin transformer (Liu et al. 2021): attention in windows, shifted in every second block, over merging patches.

Whole pictures of one size, for a window is a square of the picture: tables of what lies where are made on the host from
the static sizes, and windows are an axis of their own. No interval says who sees whom here.

    rows 0 1 2 3 | 4 5 6 7        a block's windows (of 4)
         0 1 | 2 3 4 5 | 6 7      the next one's: shifted by 2, rolled so that 6 7 0 1 is one window, but 6 7 and 0 1
                                  do not see each other
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from mmjax.core import sharding
from mmjax.core.errors import InputError
from mmjax.core.spec import Normal, ParamSpec, Spec, stack
from mmjax.encoders import hierarchy
from mmjax.encoders.hierarchy import Features, Grid, as_map
from mmjax.nn import linear, mlp, norm, patch_embed
from mmjax.nn.transformer import REMAT

APART = -100.0  # added to scores between parts of a window that are no neighbours: published so, and not infinite
EPSILON = 1e-5  # of all norms outside the blocks


@dataclass(frozen=True)
class Config:
    """Sizes and variants.

    embed: patches of the picture; embed.width is that of the first stage, and doubles with every stage.
    depths, heads: of every stage.
    ratio: the MLP's hidden values over the width.
    table: rows and columns of learned absolute positions, interpolated for other grids (section 4.4, "abs. pos.").
    always_shift: also where a map is not larger than a window (transformers' SwinBackbone). Otherwise such maps are not
      shifted, as published.
    map_norms: the stages, counted from 1, whose maps get a LayerNorm of their own (detection and segmentation; UPerNet,
      Mask2Former); 0 is the stem.
    final_norm: of the last stage's tokens; backbones have none.
    classes: of a classifier of the mean token.
    remat: what the backward pass recomputes (see nn.transformer).
    """

    embed: patch_embed.Config
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int = 7
    ratio: float = 4.0
    activation: mlp.Activation = "gelu"
    qkv_bias: bool = True
    epsilon: float = 1e-5
    table: Grid | None = None
    always_shift: bool = False
    map_norms: tuple[int, ...] = ()
    final_norm: bool = True
    classes: int | None = None
    remat: Literal["none", "dots", "full"] = "none"

    def __post_init__(self):
        if len(self.heads) != len(self.depths):
            raise InputError(f"Swin has {len(self.depths)} depths and {len(self.heads)} head counts; give one each.")
        for i, heads in enumerate(self.heads):
            if self.width(i) % heads:
                raise InputError(f"Stage {i + 1} of Swin has {self.width(i)} values, which {heads} heads cannot share.")
        if not all(0 <= i <= len(self.depths) for i in self.map_norms):
            raise InputError(f"Swin has stages 0 to {len(self.depths)}; map_norms names {self.map_norms}.")

    def width(self, stage: int) -> int:
        return self.embed.width * 2**stage

    def block_norm(self, stage: int) -> norm.Config:
        return norm.Config(self.width(stage), "layer", self.epsilon)

    def map_norm(self, number: int) -> norm.Config:
        """Of the stem (0) or of a stage, counted from 1."""
        return norm.Config(self.width(max(number - 1, 0)), "layer", EPSILON)

    def block_mlp(self, stage: int) -> mlp.Config:
        return mlp.Config(self.width(stage), int(self.ratio * self.width(stage)), None, self.activation)

    def merge_norm(self, stage: int) -> norm.Config:
        return norm.Config(4 * self.width(stage), "layer", EPSILON)

    def reduce(self, stage: int) -> linear.Config:
        return linear.Config(4 * self.width(stage), 2 * self.width(stage), False, (None, "embed"))

    def shifts(self, grid: Grid) -> tuple[int, ...]:
        """How far the windows of the blocks of a stage are shifted, in turn."""
        return (0, self.window // 2) if self.always_shift or min(grid) > self.window else (0,)


def spec(cfg: Config) -> Spec:
    out: Spec = {
        "embed": patch_embed.spec(cfg.embed),
        "embed_norm": norm.spec(norm.Config(cfg.embed.width, "layer", EPSILON)),
    }
    if cfg.table is not None:
        out["table"] = ParamSpec((*cfg.table, cfg.embed.width), (None, None, "embed"), Normal(0.02))
    last = len(cfg.depths) - 1
    for i, depth in enumerate(cfg.depths):
        near = ParamSpec(((2 * cfg.window - 1) ** 2, cfg.heads[i]), (None, "heads"), Normal(0.02))
        layer = {
            "attention_norm": norm.spec(cfg.block_norm(i)),
            "attention": {**hierarchy.attention_spec(cfg.width(i), cfg.heads[i], cfg.qkv_bias), "relative": near},
            "mlp_norm": norm.spec(cfg.block_norm(i)),
            "mlp": mlp.spec(cfg.block_mlp(i)),
        }
        out[f"stage_{i}"] = {"layers": stack(layer, depth)}
        if i < last:
            out[f"stage_{i}"] |= {"merge_norm": norm.spec(cfg.merge_norm(i)), "merge": linear.spec(cfg.reduce(i))}
    for number in cfg.map_norms:
        out[f"map_norm_{number}"] = norm.spec(cfg.map_norm(number))
    if cfg.final_norm:
        out["norm"] = norm.spec(cfg.block_norm(last))
    if cfg.classes:
        out["classifier"] = linear.spec(hierarchy.classifier(cfg.width(last), cfg.classes))
    return out


@sharding.whole_rows("images")
def apply(params: dict, images: Num[Array, "b h w c"], cfg: Config) -> Features:
    """Pictures [B, H, W, C] of one size → `Features`.

    Args:
      params: as `spec(cfg)`.
      images: bytes, normalised with cfg.embed's mean and deviation, or floats that are normalised already. Sides need
        not be multiples of anything: patches, windows and merged patches are filled up with zeros at the lower right,
        which attention sees (as published).
      cfg: the encoder.
    """
    x, grid = embed(params, images, cfg)
    maps = [as_map(x, grid)]
    for i in range(len(cfg.depths)):
        x = stage(params[f"stage_{i}"]["layers"], x, cfg, i, grid)
        maps.append(as_map(x, grid))
        if i + 1 < len(cfg.depths):
            x, grid = merge(params[f"stage_{i}"], x, cfg, i, grid)
    for number in cfg.map_norms:
        maps[number] = norm.apply(params[f"map_norm_{number}"], maps[number], cfg.map_norm(number))
    if cfg.final_norm:
        x = norm.apply(params["norm"], x, cfg.block_norm(len(cfg.depths) - 1))
    pooled = x.astype(jnp.float32).mean(1).astype(x.dtype)
    return Features(tuple(maps[1:]), x, pooled, hierarchy.classify(params, pooled, cfg.classes), maps[0])


def embed(params: dict, images: Num[Array, "b h w c"], cfg: Config) -> tuple[Float[Array, "b l d"], Grid]:
    """Patches as vectors, and how many rows and columns of them there are."""
    patch = cfg.embed.patch
    x = _filled(hierarchy.floats(images, cfg.embed), patch)
    grid = (x.shape[1] // patch, x.shape[2] // patch)
    x = patch_embed.apply(params["embed"], hierarchy.flat_squares(x, patch), cfg.embed)
    x = norm.apply(params["embed_norm"], x, norm.Config(cfg.embed.width, "layer", EPSILON))
    if cfg.table is not None:
        added = hierarchy.resized(params["table"], grid, "bicubic").reshape(1, -1, cfg.embed.width)
        x = x + added.astype(x.dtype)
    return sharding.constrain(x, ("batch", None, None)), grid


def stage(params: dict, x: Float[Array, "b l d"], cfg: Config, i: int, grid: Grid) -> Float[Array, "b l d"]:
    """The blocks of a stage (their parameters stacked), without merging: scanned in pairs, plain and shifted."""
    shifts = cfg.shifts(grid)
    turns, rest = divmod(cfg.depths[i], len(shifts))

    def one(params: dict, x: jax.Array, shift: int) -> jax.Array:
        return block(params, x, cfg, i, grid, shift)

    if cfg.remat != "none":
        one = jax.checkpoint(one, policy=REMAT[cfg.remat], prevent_cse=False, static_argnums=2)

    def turn(x: jax.Array, layers: dict) -> tuple[jax.Array, None]:
        for j, shift in enumerate(shifts):
            x = one(jax.tree.map(lambda p, j=j: p[j], layers), x, shift)
        return x, None

    if turns:
        size = turns * len(shifts)
        pairs = jax.tree.map(lambda p: p[:size].reshape(turns, len(shifts), *p.shape[1:]), params)
        x, _ = jax.lax.scan(turn, x, pairs)
    return one(jax.tree.map(lambda p: p[-1], params), x, 0) if rest else x


def block(params: dict, x: Float[Array, "b l d"], cfg: Config, i: int, grid: Grid, shift: int) -> Float[Array, "b l d"]:
    """One block of stage i (equation 3): attention in windows, shifted up and left by so many places; MLP."""
    h = norm.apply(params["attention_norm"], x, cfg.block_norm(i))
    x = x + _attention(params["attention"], h, cfg.window, grid, shift)
    h = norm.apply(params["mlp_norm"], x, cfg.block_norm(i))
    return sharding.constrain(x + mlp.apply(params["mlp"], h, cfg.block_mlp(i)), ("batch", None, None))


def merge(
    params: dict, x: Float[Array, "b l d"], cfg: Config, i: int, grid: Grid
) -> tuple[Float[Array, "b m e"], Grid]:
    """Squares of 2 × 2 tokens as one (section 3.1), column by column; half as many rows and columns, rounded up."""
    x = _filled(as_map(x, grid), 2)
    b, rows, columns, d = x.shape
    x = hierarchy.squares(x, 2).swapaxes(3, 4).reshape(b, rows * columns // 4, 2, 2, d).reshape(b, -1, 4 * d)
    x = norm.apply(params["merge_norm"], x, cfg.merge_norm(i))
    return linear.apply(params["merge"], x, cfg.reduce(i)), (rows // 2, columns // 2)


def _attention(params: dict, x: jax.Array, window: int, grid: Grid, shift: int) -> jax.Array:
    b, _, d = x.shape
    x = _filled(as_map(x, grid), window)
    whole = x.shape[1:3]
    if shift:
        x = jnp.roll(x, (-shift, -shift), (1, 2))
    x = hierarchy.squares(x, window)
    cut = x.shape
    x = x.reshape(b, -1, d)
    # [B, windows, places, heads, values]
    q, k, v = (hierarchy.heads(params[name], x) for name in ("q", "k", "v"))
    q, k, v = (y.reshape(b, -1, window * window, *y.shape[2:]) for y in (q, k, v))
    score = jnp.einsum("bnqhe,bnkhe->bnhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    near = sharding.take(params["relative"], jnp.asarray(relative(window)), (None, None, "heads"))
    score = score + near.astype(jnp.float32).transpose(2, 0, 1)[None, None]
    if shift:
        part = jnp.asarray(parts(whole, window, shift))
        score = score + jnp.where(part[:, :, None] == part[:, None, :], 0.0, APART)[None, :, None]
    weight = jax.nn.softmax(score, axis=-1).astype(v.dtype)
    out = jnp.einsum("bnhqk,bnkhe->bnqhe", weight, v)
    x = hierarchy.back(params["out"], out.reshape(b, -1, *out.shape[3:]))
    x = hierarchy.unsquares(x.reshape(cut))
    if shift:
        x = jnp.roll(x, (shift, shift), (1, 2))
    return x[:, : grid[0], : grid[1]].reshape(b, -1, d)


def _filled(x: jax.Array, unit: int) -> jax.Array:
    """Zeros at the lower right, up to multiples of `unit`."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % unit), (0, -x.shape[2] % unit), (0, 0)))


def relative(window: int) -> np.ndarray:
    """Which row of the table of relative positions is for a query and a key, i32[window², window²] (section 3.2)."""
    row, column = np.divmod(np.arange(window * window, dtype=np.int32), window)
    down, across = (at[:, None] - at[None] + window - 1 for at in (row, column))
    return down * (2 * window - 1) + across


def parts(grid: Grid, window: int, shift: int) -> np.ndarray:
    """The part of the picture at each place of shifted windows, i32[windows, window²]: equal ones see each other."""
    down, across = (np.searchsorted([n - window, n - shift], np.arange(n), "right").astype(np.int32) for n in grid)
    part = 3 * down[:, None] + across[None]
    windows = part.reshape(grid[0] // window, window, grid[1] // window, window).swapaxes(1, 2)
    return windows.reshape(-1, window * window)
