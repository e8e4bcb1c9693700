"""Attention pooling: a learned probe looks at all features of its picture (Zhai et al. 2022, section 2; SigLIP)."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mmjax.core import sharding
from mmjax.core.errors import InputError
from mmjax.core.spec import Normal, ParamSpec, Spec, fan_in
from mmjax.nn import linear, mlp, norm
from mmjax.nn.attention import attend


@dataclass(frozen=True)
class Config:
    """One probe per picture: attention, then x + MLP(norm(x)).

    hidden: of the MLP.
    """

    width: int
    heads: int
    hidden: int
    activation: mlp.Activation = "gelu_tanh"
    epsilon: float = 1e-6

    def __post_init__(self):
        if self.width % self.heads:
            raise InputError(f"A width of {self.width} does not divide into {self.heads} heads evenly.")

    @property
    def norm(self) -> norm.Config:
        return norm.Config(self.width, "layer", self.epsilon)

    @property
    def mlp(self) -> mlp.Config:
        return mlp.Config(self.width, self.hidden, None, self.activation)


def spec(cfg: Config) -> Spec:
    size = cfg.width // cfg.heads

    def project() -> Spec:
        kernel = ParamSpec((cfg.width, cfg.heads, size), ("embed", "heads", None), fan_in(cfg.width))
        return {"kernel": kernel, "bias": ParamSpec((cfg.heads, size), ("heads", None))}

    return {
        "probe": ParamSpec((1, cfg.width), (None, "embed"), Normal(cfg.width**-0.5)),
        "q": project(),
        "k": project(),
        "v": project(),
        "out": {
            "kernel": ParamSpec((cfg.heads, size, cfg.width), ("heads", None, "embed"), fan_in(cfg.width)),
            "bias": ParamSpec((cfg.width,), (None,)),
        },
        "norm": norm.spec(cfg.norm),
        "mlp": mlp.spec(cfg.mlp),
    }


def apply(
    params: dict,
    features: Float[Array, "b p d"],
    cfg: Config,
    *,
    order: Int[Array, "b p"],
    lo: Int[Array, "b n"],
    hi: Int[Array, "b n"],
) -> Float[Array, "b n d"]:
    """[B, P, D] → [B, N, D], one vector per picture.

    Args:
      params: as `spec(cfg)`.
      features: of packed pictures.
      cfg: sizes.
      order: i32[B, P], labels of the features.
      lo, hi: i32[B, N], which of them each picture has; a picture that has none (lo > hi) gives a constant.
    """
    split = ("batch", "length", "heads", None)
    probe = jnp.repeat(params["probe"][None].astype(features.dtype), lo.shape[0], axis=0)
    # One probe per row, repeated after its product: all pictures ask the same.
    q = linear.plus(sharding.dense(sharding.vary(probe, features), params["q"]["kernel"], split), params["q"]["bias"])
    q = sharding.constrain(jnp.repeat(q, lo.shape[1], axis=1), split)
    k, v = (
        linear.plus(sharding.dense(features, params[name]["kernel"], split), params[name]["bias"])
        for name in ("k", "v")
    )
    out, _ = attend(q, k, v, order, lo, hi)
    x = linear.plus(sharding.dense(out, params["out"]["kernel"], ("batch", "length", None)), params["out"]["bias"])
    return x + mlp.apply(params["mlp"], norm.apply(params["norm"], x, cfg.norm), cfg.mlp)
