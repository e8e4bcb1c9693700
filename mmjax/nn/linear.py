"""A linear map of the last axis."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmjax.core import sharding
from mmjax.core.spec import ZEROS, Normal, ParamSpec, Spec, fan_in


@dataclass(frozen=True)
class Config:
    """`axes` are the logical axes of the kernel's two dimensions; `stddev` of None means 1/sqrt(inputs)."""

    inputs: int
    outputs: int
    bias: bool = True
    axes: tuple[str | None, str | None] = ("embed", None)
    stddev: float | None = None


def spec(cfg: Config) -> Spec:
    start = fan_in(cfg.inputs) if cfg.stddev is None else Normal(cfg.stddev)
    out = {"kernel": ParamSpec((cfg.inputs, cfg.outputs), cfg.axes, start)}
    if cfg.bias:
        out["bias"] = ParamSpec((cfg.outputs,), cfg.axes[1:], ZEROS)
    return out


def apply(params: dict, x: Float[Array, "b l inputs"], cfg: Config) -> Float[Array, "b l outputs"]:
    """x @ kernel + bias for activations [B, L, inputs].

    The result's last axis is split as the kernel's is, except over "embed", along which activations are whole.
    """
    out = None if cfg.axes[1] == "embed" else cfg.axes[1]
    y = sharding.dense(x, params["kernel"], ("batch", "length", out))
    return plus(y, sharding.constrain(params["bias"], (out,))) if cfg.bias else y


def plus(x: Float[Array, "*axes"], p: Float[Array, "*last"]) -> Float[Array, "*axes"]:
    """x + p for a parameter of x's last axes, in x's dtype.

    Computed in float32, and so is the parameter's gradient, a sum over all tokens: in bfloat16 that would come to rest
    after some hundreds of them.
    """
    return (_wide(x) + _wide(p)[(None,) * (x.ndim - p.ndim)]).astype(x.dtype)


def times(x: Float[Array, "*axes"], p: Float[Array, "*last"]) -> Float[Array, "*axes"]:
    """x · p, likewise."""
    return (_wide(x) * _wide(p)[(None,) * (x.ndim - p.ndim)]).astype(x.dtype)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
