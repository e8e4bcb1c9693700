"""An MLP of every patch: LLaVA-1.5 (Liu et al. 2023, section 3.3) and those after it. One media token per patch."""

from dataclasses import dataclass

import jax
from jaxtyping import Array, Float

from mmjax.connectors import Connector
from mmjax.core import sharding
from mmjax.core.spec import Spec, stack
from mmjax.nn import linear, mlp


@dataclass(frozen=True)
class Config(Connector):
    """LLaVA's mlp2x_gelu, unless told otherwise.

    depth: how many linear maps, at least 2; all after the first are outputs × outputs (mlp3x_gelu; Janus's aligner).
    activation: between them ("gelu"; Honeybee's MLP: "silu").
    bias: transformers' `multimodal_projector_bias`.
    """

    inputs: int
    outputs: int
    depth: int = 2
    activation: mlp.Activation = "gelu"
    bias: bool = True

    @property
    def mlp(self) -> mlp.Config:
        return mlp.Config(self.inputs, self.outputs, self.outputs, self.activation, bias=self.bias)

    @property
    def middle(self) -> linear.Config:
        return linear.Config(self.outputs, self.outputs, self.bias, ("embed", "mlp"))

    def tokens(self, grid: tuple[int, int, int]) -> int:
        return grid[0] * grid[1] * grid[2]


def spec(cfg: Config) -> Spec:
    out = mlp.spec(cfg.mlp)
    if cfg.depth > 2:
        out["middle"] = stack(linear.spec(cfg.middle), cfg.depth - 2)
    return out


def apply(params: dict, features: Float[Array, "b p d"], cfg: Config) -> Float[Array, "b p outputs"]:
    """[B, P, inputs] → [B, M = P, outputs]."""
    if cfg.depth == 2:
        return mlp.apply(params, features, cfg.mlp)
    act, split = mlp.ACTIVATIONS[cfg.activation], ("batch", "length", "mlp")

    def layer(x: jax.Array, p: dict) -> tuple[jax.Array, None]:
        return sharding.constrain(act(linear.apply(p, x, cfg.middle)), split), None

    x = sharding.constrain(act(linear.apply(params["up"], features, cfg.mlp.up)), split)
    x, _ = jax.lax.scan(layer, sharding.vary(x, features), params["middle"])
    return linear.apply(params["down"], x, cfg.mlp.down)
