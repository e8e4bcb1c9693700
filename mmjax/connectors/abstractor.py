"""The convolutional abstractor (Cha et al. 2024, Honeybee, arXiv:2312.06742): local, and any token count.

RegNet bottlenecks → adaptive average pooling to side × side → RegNet bottlenecks → an MLP, on packed pictures of any
size. A bottleneck (Radosavovic et al. 2020, with squeeze-excite as timm's RegStage has it and groups of one channel):

    x → 1×1 → 3×3 depthwise → squeeze-excite → 1×1 → + x → SiLU     each convolution with a LayerNorm of the channels
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mmjax.connectors import Connector, grids
from mmjax.core import sharding
from mmjax.core.errors import InputError
from mmjax.core.spec import Normal, ParamSpec, Spec, fan_in, stack
from mmjax.nn import linear, norm, position_embed


@dataclass(frozen=True)
class Config(Connector):
    """inputs, width, outputs: of the features, the bottlenecks, the language model. side² media tokens per picture.

    depth: bottlenecks before and after pooling (Honeybee 3); 0 leaves pooling and the MLP.
    readout: linear maps at the end, SiLU between (Honeybee 2).
    positions: above 0, a learned table of positions × positions (Honeybee: of its encoder's grid), resized bilinearly
      for pictures of another size.
    prenorm: a LayerNorm of the features first.
    eos: learned vectors after the picture's tokens.
    epsilon: of the bottlenecks' norms (timm's LayerNormAct2d); `prenorm` has 1e-6.
    """

    inputs: int
    width: int
    outputs: int
    side: int
    depth: int = 3
    readout: int = 2
    positions: int = 0
    prenorm: bool = False
    eos: int = 0
    squeeze: float = 0.25
    epsilon: float = 1e-5

    @property
    def media(self) -> int:
        """Media tokens of a picture."""
        return self.side**2 + self.eos

    @property
    def block_norm(self) -> norm.Config:
        return norm.Config(self.width, "layer", self.epsilon)

    @property
    def first_norm(self) -> norm.Config:
        return norm.Config(self.inputs, "layer", 1e-6)

    def reading(self, i: int) -> linear.Config:
        inputs = (self.width if self.depth else self.inputs) if i == 0 else self.outputs
        return linear.Config(inputs, self.outputs, True, ("embed", "mlp") if i % 2 == 0 else ("mlp", "embed"))

    @property
    def per_picture(self) -> int:
        return self.media

    def tokens(self, grid: tuple[int, int, int]) -> int:
        if grid[0] != 1:
            raise InputError(f"The abstractor got {grid[0]} frames as one; make every frame a picture of its own.")
        return self.media


def spec(cfg: Config) -> Spec:
    def convolution(inputs: int) -> Spec:
        kernel = ParamSpec((inputs, cfg.width), ("embed", None), fan_in(inputs))
        return {"kernel": kernel, "norm": norm.spec(cfg.block_norm)}

    def block(inputs: int) -> Spec:
        narrow = round(cfg.squeeze * inputs)
        out = {
            "narrow": convolution(inputs),
            "local": {
                "kernel": ParamSpec((3, 3, cfg.width), (None,) * 3, Normal(1 / 3)),
                "norm": norm.spec(cfg.block_norm),
            },
            "squeeze": linear.spec(linear.Config(cfg.width, narrow)),
            "excite": linear.spec(linear.Config(narrow, cfg.width, axes=(None, "embed"))),
            "widen": convolution(cfg.width),
        }
        return out | ({"shortcut": convolution(inputs)} if inputs != cfg.width else {})

    out = {"readout": {str(i): linear.spec(cfg.reading(i)) for i in range(cfg.readout)}}
    if cfg.depth:
        out["before"] = {"first": block(cfg.inputs)}
        out["after"] = stack(block(cfg.width), cfg.depth)
    if cfg.depth > 1:
        out["before"]["rest"] = stack(block(cfg.width), cfg.depth - 1)
    if cfg.prenorm:
        out["prenorm"] = norm.spec(cfg.first_norm)
    if cfg.positions:
        table = (cfg.positions, cfg.positions, cfg.inputs)
        out["positions"] = ParamSpec(table, (None, None, "embed"), Normal(0.02))
    if cfg.eos:
        out["eos"] = ParamSpec((cfg.eos, cfg.outputs), (None, "embed"), Normal(1.0))
    return out


def present(grid: Int[Array, "b n 3"], cfg: Config) -> Bool[Array, "b m"]:
    """Which media tokens exist: those of pictures that do."""
    return jnp.repeat(grid.prod(-1) > 0, cfg.media, axis=1)


def bottleneck(
    p: dict, x: Float[Array, "b p d"], cfg: Config, where: grids.Places, maps: grids.Wholes, image: Int[Array, "b p"]
) -> Float[Array, "b p width"]:
    """One block, on the maps of packed pictures; image: the picture of every place, -1 in empty ones."""
    whole = ("batch", None, None)

    def convolved(name: str, x: jax.Array) -> jax.Array:
        return norm.apply(p[name]["norm"], sharding.dense(x, p[name]["kernel"], whole), cfg.block_norm)

    h = jax.nn.silu(convolved("narrow", x))
    h = norm.apply(p["local"]["norm"], grids.depthwise(h, p["local"]["kernel"], where), cfg.block_norm)
    h = jax.nn.silu(h)
    narrow = p["squeeze"]["bias"].shape[0]
    s = linear.apply(p["squeeze"], grids.average(h, where, maps), linear.Config(cfg.width, narrow))
    s = linear.apply(p["excite"], jax.nn.silu(s), linear.Config(narrow, cfg.width, axes=(None, "embed")))
    h = convolved("widen", h * sharding.take_rows(jax.nn.sigmoid(s), image))
    return sharding.constrain(jax.nn.silu(h + (convolved("shortcut", x) if "shortcut" in p else x)), whole)


@sharding.whole_rows("features", "image", "order", "grid")
def apply(
    params: dict,
    features: Float[Array, "b p d"],
    cfg: Config,
    *,
    image: Int[Array, "b p"],
    order: Int[Array, "b p"],
    grid: Int[Array, "b n 3"],
) -> Float[Array, "b m outputs"]:
    """[B, P, inputs] in raster order → [B, M = N × (side² + eos), outputs], picture after picture.

    Args:
      params: as `spec(cfg)`.
      features: of packed pictures, row by row.
      cfg: sizes.
      image, order: i32[B, P], the picture of each patch and its place in the row, -1 in empty places.
      grid: i32[B, N, 3], one frame each, zeros where there is no picture (its tokens are meaningless: nothing may look
        at them).
    """
    x = pooled(params, features, cfg, image, order, grid)
    b, n = grid.shape[:2]
    if cfg.depth:
        # Every one of the N pictures has side × side places now, also those that do not exist.
        own = (jnp.arange(n * cfg.side**2, dtype=jnp.int32) // cfg.side**2)[None]
        place = jnp.arange(n * cfg.side**2, dtype=jnp.int32)[None]
        own, place = jnp.zeros_like(x[..., 0], jnp.int32) + own, jnp.zeros_like(x[..., 0], jnp.int32) + place
        after = jnp.zeros_like(grid) + jnp.array([1, cfg.side, cfg.side], jnp.int32)[None, None]
        x = _blocks(params["after"], x, cfg, own, place, after)
    for i in range(cfg.readout):
        x = linear.apply(params["readout"][str(i)], jax.nn.silu(x) if i else x, cfg.reading(i))
    if not cfg.eos:
        return x
    x = x.reshape(b, n, cfg.side**2, cfg.outputs)
    eos = sharding.constrain(params["eos"], (None, None)).astype(x.dtype)[None, None]
    eos = sharding.vary(jnp.broadcast_to(eos, (b, n, cfg.eos, cfg.outputs)), x)
    eos = sharding.constrain(eos, ("batch", None, None, None))
    return jnp.concatenate([x, eos], axis=2).reshape(b, n * cfg.media, cfg.outputs)


def pooled(
    params: dict,
    features: Float[Array, "b p d"],
    cfg: Config,
    image: Int[Array, "b p"],
    order: Int[Array, "b p"],
    grid: Int[Array, "b n 3"],
) -> Float[Array, "b m e"]:
    """The first half: [B, P, inputs] → [B, N × side², width], the averages of each picture's bins."""
    where, maps = grids.places(image, order, grid), grids.wholes(grid)
    x = norm.apply(params["prenorm"], features, cfg.first_norm) if cfg.prenorm else features
    if cfg.positions:
        position = jnp.stack([where.row, where.column], -1)
        sides = jnp.maximum(jnp.stack([where.of.rows, where.of.columns], -1), 1)
        x = x + position_embed.interpolate(params["positions"], position, sides).astype(x.dtype)
    if cfg.depth:
        x = bottleneck(params["before"]["first"], x, cfg, where, maps, image)
    if cfg.depth > 1:
        x = _blocks(params["before"]["rest"], x, cfg, image, order, grid)
    return grids.average(x, where, maps, cfg.side)


def _blocks(
    params: dict,
    x: Float[Array, "b p d"],
    cfg: Config,
    image: Int[Array, "b p"],
    order: Int[Array, "b p"],
    grid: Int[Array, "b n 3"],
) -> Float[Array, "b p d"]:
    """Equal blocks, one after the other."""
    where, maps = grids.places(image, order, grid), grids.wholes(grid)

    def layer(x: jax.Array, p: dict) -> tuple[jax.Array, None]:
        return bottleneck(p, x, cfg, where, maps, image), None

    return jax.lax.scan(layer, sharding.vary(x, (x, image)), params)[0]
