"""The language model: token table, blocks, final norm, head."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from mmjax.core import sharding
from mmjax.core.spec import Normal, ParamSpec, Spec, fan_in
from mmjax.nn import norm, transformer


@dataclass(frozen=True)
class Config:
    """`tied`: the head is the token table."""

    vocab: int
    blocks: transformer.Config
    tied: bool = True

    @property
    def norm(self) -> norm.Config:
        return self.blocks.norm_config


def spec(cfg: Config) -> Spec:
    width = cfg.blocks.width
    out = {
        # Deviation 1/sqrt(width): logits of a tied head start near unit size.
        "embed": ParamSpec((cfg.vocab, width), ("vocab", "embed"), Normal(width**-0.5)),
        "blocks": transformer.spec(cfg.blocks),
        "norm": norm.spec(cfg.norm),
    }
    if not cfg.tied:
        out["head"] = ParamSpec((cfg.vocab, width), ("vocab", "embed"), fan_in(width))
    return out


def embed(params: dict, tokens: Int[Array, "b l"]) -> Float[Array, "b l d"]:
    """The vectors of token ids; the ids must be in range (Batch checks them)."""
    return sharding.take(params["embed"], tokens, ("batch", None, None))


def apply(
    params: dict,
    x: Float[Array, "b l d"],
    cfg: Config,
    *,
    order: Int[Array, "b l"],
    lo: Int[Array, "b l"],
    hi: Int[Array, "b l"],
    position: Num[Array, "b l axes"],
) -> Float[Array, "b l d"]:
    """Token vectors in, normalised hidden states out."""
    x = transformer.apply(params["blocks"], x, cfg.blocks, order=order, lo=lo, hi=hi, position=position)
    return norm.apply(params["norm"], x, cfg.norm)


def logits(params: dict, hidden: Float[Array, "b l d"], cfg: Config) -> Float[Array, "b l vocab"]:
    """f32[B, L, V]."""
    table = params["embed"] if cfg.tied else params["head"]
    return sharding.dense(hidden, table.T, ("batch", None, "vocab")).astype(jnp.float32)
