"""The two-layer GELU MLP of LLaVA-1.5 (Liu et al. 2023, section 3.3): one media token per patch."""

from dataclasses import dataclass

from jaxtyping import Array, Float

from mmjax.connectors import Connector
from mmjax.core.spec import Spec
from mmjax.nn import mlp


@dataclass(frozen=True)
class Config(Connector):
    inputs: int
    outputs: int

    @property
    def mlp(self) -> mlp.Config:
        return mlp.Config(self.inputs, self.outputs, self.outputs)

    def tokens(self, grid: tuple[int, int, int]) -> int:
        return grid[0] * grid[1] * grid[2]


def spec(cfg: Config) -> Spec:
    return mlp.spec(cfg.mlp)


def apply(params: dict, features: Float[Array, "b p d"], cfg: Config) -> Float[Array, "b p outputs"]:
    """[B, P, inputs] → [B, M = P, outputs]."""
    return mlp.apply(params, features, cfg.mlp)
