"""One linear map of every patch: LLaVA (Liu et al. 2023), PaliGemma. One media token per patch."""

from dataclasses import dataclass

from jaxtyping import Array, Float

from mmjax.connectors import Connector
from mmjax.core.spec import Spec
from mmjax.nn import linear


@dataclass(frozen=True)
class Config(Connector):
    """per_picture: media tokens of every picture, where its encoder makes a fixed number of them (encoders.tiled)."""

    inputs: int
    outputs: int
    bias: bool = True
    per_picture: int = 0

    @property
    def linear(self) -> linear.Config:
        return linear.Config(self.inputs, self.outputs, self.bias, ("embed", None))

    def tokens(self, grid: tuple[int, int, int]) -> int:
        return self.per_picture or grid[0] * grid[1] * grid[2]


def spec(cfg: Config) -> Spec:
    return linear.spec(cfg.linear)


def apply(params: dict, features: Float[Array, "b p d"], cfg: Config) -> Float[Array, "b p outputs"]:
    """[B, P, inputs] → [B, M = P, outputs]."""
    return linear.apply(params, features, cfg.linear)
