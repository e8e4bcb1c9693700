"""The Perceiver resampler (Alayrac et al. 2022, Flamingo, listing 1): any number of features to so many tokens."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mmjax.connectors import Connector
from mmjax.core import sharding
from mmjax.core.spec import Normal, ParamSpec, Spec, fan_in, stack
from mmjax.nn import mlp, norm
from mmjax.nn.attention import attend


@dataclass(frozen=True)
class Config(Connector):
    """inputs: width of the features. width: of the latents. latents: media tokens made of each picture or video."""

    inputs: int
    width: int
    latents: int
    layers: int
    heads: int
    head: int
    hidden: int
    epsilon: float = 1e-5

    @property
    def feature_norm(self) -> norm.Config:
        return norm.Config(self.inputs, "layer", self.epsilon)

    @property
    def norm(self) -> norm.Config:
        return norm.Config(self.width, "layer", self.epsilon)

    @property
    def mlp(self) -> mlp.Config:
        return mlp.Config(self.width, self.hidden, None, "gelu", False, False)

    def tokens(self, grid: tuple[int, int, int]) -> int:
        return self.latents


def spec(cfg: Config) -> Spec:
    def project(width: int, name: str) -> Spec:
        return {name: {"kernel": ParamSpec((width, cfg.heads, cfg.head), ("embed", "heads", None), fan_in(width))}}

    inner = cfg.heads * cfg.head
    layer = {
        "feature_norm": norm.spec(cfg.feature_norm),
        "latent_norm": norm.spec(cfg.norm),
        **project(cfg.width, "q"),
        **project(cfg.width, "latent_k"),
        **project(cfg.width, "latent_v"),
        **project(cfg.inputs, "feature_k"),
        **project(cfg.inputs, "feature_v"),
        "out": {"kernel": ParamSpec((cfg.heads, cfg.head, cfg.width), ("heads", None, "embed"), fan_in(inner))},
        "mlp_norm": norm.spec(cfg.norm),
        "mlp": mlp.spec(cfg.mlp),
    }
    return {
        "latents": ParamSpec((cfg.latents, cfg.width), (None, "embed"), Normal(1.0)),
        "layers": stack(layer, cfg.layers),
        "norm": norm.spec(cfg.norm),
    }


def labels(
    image: Int[Array, "b p"], order: Int[Array, "b p"], grid: Int[Array, "b n 3"], latents: int
) -> tuple[Int[Array, "b s"], Int[Array, "b m"], Int[Array, "b m"]]:
    """Who sees whom: keys are the features, then all latents; queries are the latents (see intervals.perceiver).

    Labels alternate, features of picture 0, its latents, features of picture 1, …, so that what a latent sees is one
    interval: its picture's features and latents.

    Returns:
      The keys' labels, and the latents' lo and hi.
    """
    b, n, _ = grid.shape
    count = grid.prod(-1)
    some = count > 0
    stop = jnp.cumsum(count, axis=1)
    first = (stop - count) + jnp.arange(n, dtype=jnp.int32)[None] * latents
    own = (first + count)[:, :, None] + jnp.arange(latents, dtype=jnp.int32)[None, None]
    own = jnp.where(some[:, :, None], own, -1).reshape(b, n * latents)
    features = jnp.where(order >= 0, order + image * latents, -1)
    lo = jnp.repeat(jnp.where(some, first, 0), latents, axis=1)
    hi = jnp.repeat(jnp.where(some, first + count + latents - 1, -1), latents, axis=1)
    return jnp.concatenate([features, own], axis=1), lo, hi


def present(grid: Int[Array, "b n 3"], latents: int) -> Bool[Array, "b m"]:
    """Which media tokens exist: those of pictures that do."""
    return jnp.repeat(grid.prod(-1) > 0, latents, axis=1)


def apply(
    params: dict,
    features: Float[Array, "b p d"],
    cfg: Config,
    *,
    image: Int[Array, "b p"],
    order: Int[Array, "b p"],
    grid: Int[Array, "b n 3"],
) -> Float[Array, "b m e"]:
    """[B, P, inputs] → [B, M = N × latents, width], picture after picture.

    Args:
      params: as `spec(cfg)`.
      features: of packed pictures.
      cfg: sizes.
      image, order: i32[B, P], the picture of each patch and its label, counted through the row.
      grid: i32[B, N, 3], zeros where there is no picture (its tokens are meaningless: nothing may look at them).
    """
    keys, lo, hi = labels(image, order, grid, cfg.latents)
    start = jnp.tile(params["latents"], (grid.shape[1], 1))[None]
    start = jnp.repeat(start, grid.shape[0], axis=0).astype(features.dtype)
    # Inside a shard_map the loop's state varies from device to device, as the features do, and must from the start.
    x = sharding.constrain(sharding.vary(start, features), ("batch", None, None))
    split = ("batch", None, "heads", None)

    def layer(x: jax.Array, p: dict) -> tuple[jax.Array, None]:
        f = norm.apply(p["feature_norm"], features, cfg.feature_norm)
        h = norm.apply(p["latent_norm"], x, cfg.norm)
        q = sharding.dense(h, p["q"]["kernel"], split)
        k, v = (
            jnp.concatenate(
                [
                    sharding.dense(f, p[f"feature_{name}"]["kernel"], split),
                    sharding.dense(h, p[f"latent_{name}"]["kernel"], split),
                ],
                axis=1,
            )
            for name in ("k", "v")
        )
        out, _ = attend(q, k, v, keys, lo, hi)
        x = x + sharding.dense(out, p["out"]["kernel"], ("batch", None, None))
        x = x + mlp.apply(p["mlp"], norm.apply(p["mlp_norm"], x, cfg.norm), cfg.mlp)
        return sharding.constrain(x, ("batch", None, None)), None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    return norm.apply(params["norm"], x, cfg.norm)
