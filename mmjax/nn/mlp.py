"""The transformer's MLP: plain (Vaswani et al. 2017) or gated (Shazeer 2020)."""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmjax.core.spec import Spec
from mmjax.nn import linear, norm


@jax.custom_jvp
def normal_cdf(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """How much of the normal distribution lies below x.

    With a derivative of its own, the density: jax 0.12 cannot differentiate erf inside a `shard_map`.
    """
    return 0.5 * jax.lax.erfc(-x * math.sqrt(0.5))


normal_cdf.defjvps(lambda tangent, _, x: tangent * jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi)))

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu", "relu"]

ACTIVATIONS = {
    "gelu": lambda x: x * normal_cdf(x),  # Hendrycks & Gimpel 2016
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # ibid., section 2; CLIP
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


@dataclass(frozen=True)
class Config:
    width: int
    hidden: int
    outputs: int | None = None  # None: as wide as the input
    activation: Activation = "gelu"
    gated: bool = False
    bias: bool = True
    inner_norm: norm.Config | None = None  # of the hidden values, before the second map (Sub-LN)

    @property
    def up(self) -> linear.Config:
        return linear.Config(self.width, self.hidden, self.bias, ("embed", "mlp"))

    @property
    def down(self) -> linear.Config:
        return linear.Config(self.hidden, self.outputs or self.width, self.bias, ("mlp", "embed"))


def spec(cfg: Config) -> Spec:
    out = {"up": linear.spec(cfg.up), "down": linear.spec(cfg.down)}
    if cfg.gated:
        out["gate"] = linear.spec(cfg.up)
    if cfg.inner_norm is not None:
        out["inner_norm"] = norm.spec(cfg.inner_norm)
    return out


def apply(params: dict, x: Float[Array, "b l d"], cfg: Config) -> Float[Array, "b l outputs"]:
    """down(act(up(x))), or down(act(gate(x)) · up(x)) where gated."""
    act = ACTIVATIONS[cfg.activation]
    h = linear.apply(params["up"], x, cfg.up)
    h = act(linear.apply(params["gate"], x, cfg.up)) * h if cfg.gated else act(h)
    h = h if cfg.inner_norm is None else norm.apply(params["inner_norm"], h, cfg.inner_norm)
    return linear.apply(params["down"], h, cfg.down)
