"""Gated cross-attention (Alayrac et al. 2022, Flamingo): text looks at media through layers that start as nothing."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mmjax.core import sharding
from mmjax.core.spec import ZEROS, ParamSpec, Spec, fan_in
from mmjax.nn import linear, mlp, norm
from mmjax.nn.attention import attend


@dataclass(frozen=True)
class Config:
    """One layer (Flamingo, figure 4 and listing 2).

    width: of the text. media: of the media tokens. every: one such layer stands before each so many decoder blocks.
    """

    width: int
    media: int
    heads: int
    head: int
    hidden: int
    every: int = 1
    epsilon: float = 1e-5

    @property
    def norm(self) -> norm.Config:
        return norm.Config(self.width, "layer", self.epsilon)

    @property
    def mlp(self) -> mlp.Config:
        return mlp.Config(self.width, self.hidden, None, "gelu", False, False)


def spec(cfg: Config) -> Spec:
    inner = cfg.heads * cfg.head

    def project(width: int) -> Spec:
        return {"kernel": ParamSpec((width, cfg.heads, cfg.head), ("embed", "heads", None), fan_in(width))}

    return {
        "attention_norm": norm.spec(cfg.norm),
        "q": project(cfg.width),
        "k": project(cfg.media),
        "v": project(cfg.media),
        "out": {"kernel": ParamSpec((cfg.heads, cfg.head, cfg.width), ("heads", None, "embed"), fan_in(inner))},
        "attention_gate": ParamSpec((1,), (None,), ZEROS),
        "mlp_norm": norm.spec(cfg.norm),
        "mlp": mlp.spec(cfg.mlp),
        "mlp_gate": ParamSpec((1,), (None,), ZEROS),
    }


def apply(
    params: dict,
    x: Float[Array, "b l d"],
    media: Float[Array, "b m e"],
    cfg: Config,
    *,
    order: Int[Array, "b m"],
    lo: Int[Array, "b l"],
    hi: Int[Array, "b l"],
) -> Float[Array, "b l d"]:
    """x + tanh(gate) · attention, then + tanh(gate) · MLP; tokens that see no media keep the MLP alone.

    Args:
      params: as `spec(cfg)`.
      x: text [B, L, width].
      media: media tokens [B, M, media].
      cfg: the layer.
      order: i32[B, M], the media tokens' labels, -1 where there is none.
      lo, hi: i32[B, L], which of them each text token sees.
    """
    split = ("batch", "length", "heads", None)
    h = norm.apply(params["attention_norm"], x, cfg.norm)
    q = sharding.dense(h, params["q"]["kernel"], split)
    k, v = (sharding.dense(media, params[name]["kernel"], split) for name in ("k", "v"))
    out, _ = attend(q, k, v, order, lo, hi)
    y = sharding.dense(out, params["out"]["kernel"], ("batch", "length", None))
    x = x + linear.times(y, jnp.tanh(params["attention_gate"]))
    y = mlp.apply(params["mlp"], norm.apply(params["mlp_norm"], x, cfg.norm), cfg.mlp)
    return x + linear.times(y, jnp.tanh(params["mlp_gate"]))
