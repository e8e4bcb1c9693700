"""LayerNorm (Ba et al. 2016) and RMSNorm (Zhang & Sennrich 2019, eq. 4) of the last axis, computed in float32."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmjax.core.spec import ZEROS, Constant, ParamSpec, Spec


@dataclass(frozen=True)
class Config:
    """`offset`: what is multiplied by is offset + scale, and the scale starts at 1 − offset (Gemma: 1)."""

    width: int
    kind: Literal["layer", "rms"] = "rms"
    epsilon: float = 1e-6
    offset: float = 0.0


def spec(cfg: Config) -> Spec:
    out = {"scale": ParamSpec((cfg.width,), (None,), Constant(1.0 - cfg.offset))}
    if cfg.kind == "layer":
        out["bias"] = ParamSpec((cfg.width,), (None,), ZEROS)
    return out


def apply(params: dict, x: Float[Array, "... d"], cfg: Config) -> Float[Array, "... d"]:
    """The normalised x, in x's dtype."""
    y = x.astype(jnp.float32)
    if cfg.kind == "layer":
        y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + cfg.epsilon)
    scale = _last(params["scale"], y)
    y = y * (scale + cfg.offset if cfg.offset else scale)
    if cfg.kind == "layer":
        y = y + _last(params["bias"], y)
    return y.astype(x.dtype)


def _last(p: jax.Array, x: jax.Array) -> jax.Array:
    return p.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + p.shape)
