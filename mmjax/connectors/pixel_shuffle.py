"""Pixel shuffle: squares of patches become channels, then a linear map or an MLP (InternVL, Idefics3, SmolVLM)."""

from dataclasses import dataclass

from jaxtyping import Array, Float

from mmjax.connectors import Connector, grids
from mmjax.core.spec import Spec
from mmjax.nn import linear, mlp
from mmjax.nn import norm as norms


@dataclass(frozen=True)
class Config(Connector):
    """Features lie in squares' order; one media token per square.

    side: of the square in patches (1 / InternVL's `downsample_ratio`; Idefics3's `scale_factor`).
    norm: LayerNorm of the concatenated values (InternVL).
    layers: 2 with `activation` between (InternVL), or 1 (Idefics3 and SmolVLM, which have no bias either).
    channels: see grids.concatenate; "patch" in all three.
    """

    inputs: int
    outputs: int
    side: int = 2
    norm: bool = True
    layers: int = 2
    activation: mlp.Activation = "gelu"
    bias: bool = True
    channels: grids.Channels = "patch"
    epsilon: float = 1e-5

    @property
    def width(self) -> int:
        return self.side**2 * self.inputs

    @property
    def norm_config(self) -> norms.Config:
        return norms.Config(self.width, "layer", self.epsilon)

    @property
    def projection(self) -> linear.Config | mlp.Config:
        if self.layers == 1:
            return linear.Config(self.width, self.outputs, self.bias, ("embed", None))
        return mlp.Config(self.width, self.outputs, self.outputs, self.activation, bias=self.bias)

    @property
    def square(self) -> int:
        return self.side

    def tokens(self, grid: tuple[int, int, int]) -> int:
        return grids.check(grid, self.side)


def spec(cfg: Config) -> Spec:
    of = linear if cfg.layers == 1 else mlp
    return {"projection": of.spec(cfg.projection)} | ({"norm": norms.spec(cfg.norm_config)} if cfg.norm else {})


def apply(params: dict, features: Float[Array, "b p d"], cfg: Config) -> Float[Array, "b m outputs"]:
    """[B, P, inputs] in squares' order → [B, M = P // side², outputs]."""
    x = grids.concatenate(features, cfg.side, cfg.channels)
    x = norms.apply(params["norm"], x, cfg.norm_config) if cfg.norm else x
    return (linear if cfg.layers == 1 else mlp).apply(params["projection"], x, cfg.projection)
