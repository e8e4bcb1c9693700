"""A linear map of the last axis."""

from dataclasses import dataclass

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
    return y + sharding.constrain(params["bias"], (out,))[None, None] if cfg.bias else y
