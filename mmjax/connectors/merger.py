"""Patch mergers: a norm, squares of patches concatenated, an MLP (Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Mistral 3)."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Array, Float

from mmjax.connectors import Connector, grids
from mmjax.core.spec import Spec
from mmjax.nn import linear, mlp
from mmjax.nn import norm as norms


@dataclass(frozen=True)
class Config(Connector):
    """Features lie in squares' order; one media token per square.

    hidden: width of the MLP; side² · inputs if left out (Qwen), the language model's width (Mistral 3).
    norm: "layer" (Qwen2-VL, Qwen3-VL) or "rms" (Qwen2.5-VL, Mistral 3).
    norm_after: of the concatenated values, not of each patch (Qwen3-VL's DeepStack mergers, `use_postshuffle_norm`).
    channels: see grids.concatenate; "channel" in Mistral 3.
    reduce: first a linear map of the concatenated values back to `inputs`, without bias (Mistral 3).
    """

    inputs: int
    outputs: int
    side: int = 2
    hidden: int | None = None
    norm: Literal["layer", "rms"] = "layer"
    norm_after: bool = False
    channels: grids.Channels = "patch"
    reduce: bool = False
    activation: mlp.Activation = "gelu"
    bias: bool = True
    epsilon: float = 1e-6

    @property
    def width(self) -> int:
        return self.side**2 * self.inputs

    @property
    def norm_config(self) -> norms.Config:
        return norms.Config(self.width if self.norm_after else self.inputs, self.norm, self.epsilon)

    @property
    def reduction(self) -> linear.Config:
        return linear.Config(self.width, self.inputs, False, ("embed", None))

    @property
    def mlp(self) -> mlp.Config:
        width = self.inputs if self.reduce else self.width
        return mlp.Config(width, self.hidden or self.width, self.outputs, self.activation, bias=self.bias)

    @property
    def square(self) -> int:
        return self.side

    def tokens(self, grid: tuple[int, int, int]) -> int:
        return grids.check(grid, self.side)


def spec(cfg: Config) -> Spec:
    out = {"norm": norms.spec(cfg.norm_config), "mlp": mlp.spec(cfg.mlp)}
    return out | ({"reduction": linear.spec(cfg.reduction)} if cfg.reduce else {})


def apply(params: dict, features: Float[Array, "b p d"], cfg: Config) -> Float[Array, "b m outputs"]:
    """[B, P, inputs] in squares' order → [B, M = P // side², outputs]."""
    return mlp.apply(params["mlp"], merged(params, features, cfg), cfg.mlp)


def merged(params: dict, features: Float[Array, "b p d"], cfg: Config) -> Float[Array, "b m e"]:
    """What the MLP gets: [B, M, side² · inputs], or [B, M, inputs] with `reduce`."""
    if not cfg.norm_after:
        features = norms.apply(params["norm"], features, cfg.norm_config)
    x = grids.concatenate(features, cfg.side, cfg.channels)
    if cfg.norm_after:
        x = norms.apply(params["norm"], x, cfg.norm_config)
    return linear.apply(params["reduction"], x, cfg.reduction) if cfg.reduce else x
