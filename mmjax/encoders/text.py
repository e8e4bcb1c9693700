"""Text towers of two-tower models: token and position tables, blocks, norm, and one vector per text (CLIP, SigLIP)."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mmjax.core import sharding
from mmjax.core.spec import Normal, ParamSpec, Spec
from mmjax.nn import linear, norm, transformer


@dataclass(frozen=True)
class Config:
    """Radford et al. 2021, section 2.4; Zhai et al. 2023 (SigLIP).

    positions: rows of the position table; texts are at most so long.
    outputs: values of the projection of a text's vector; None: there is none. bias: whether it has one (SigLIP).

    Who sees whom is the intervals' matter: CLIP's text is causal, SigLIP's is not.
    """

    vocab: int
    positions: int
    blocks: transformer.Config
    outputs: int | None = None
    bias: bool = False

    @property
    def norm(self) -> norm.Config:
        return self.blocks.norm_config

    @property
    def project(self) -> linear.Config:
        return linear.Config(self.blocks.width, self.outputs or 0, self.bias, ("embed", None))


def spec(cfg: Config) -> Spec:
    width = cfg.blocks.width
    out = {
        "embed": ParamSpec((cfg.vocab, width), ("vocab", "embed"), Normal(0.02)),
        "position": ParamSpec((cfg.positions, width), (None, "embed"), Normal(0.01)),
        "blocks": transformer.spec(cfg.blocks),
        "norm": norm.spec(cfg.norm),
    }
    if cfg.outputs is not None:
        out["project"] = linear.spec(cfg.project)
    return out


def embed(
    params: dict, tokens: Int[Array, "b l"], cfg: Config, *, position: Int[Array, "b l"]
) -> Float[Array, "b l d"]:
    """Token and position vectors; positions count from 0 in every text, and both must be in range."""
    x = sharding.take(params["embed"], tokens, ("batch", "length", None))
    return x + sharding.take(params["position"], position, ("batch", "length", None))


def apply(
    params: dict,
    tokens: Int[Array, "b l"],
    cfg: Config,
    *,
    order: Int[Array, "b l"],
    lo: Int[Array, "b l"],
    hi: Int[Array, "b l"],
    position: Int[Array, "b l"],
    taps: tuple[int, ...] = (),
) -> tuple[Float[Array, "b l d"], Float[Array, "taps b l d"]]:
    """Normalised hidden states of every token, and what the blocks named in `taps` put out.

    Args:
      params: as `spec(cfg)`.
      tokens: i32[B, L], several texts one after the other.
      cfg: the tower.
      order, lo, hi: i32[B, L], who sees whom (sequence.intervals.packed for CLIP, .blocks for SigLIP).
      position: i32[B, L], counted from 0 in every text.
      taps: blocks, counted from 0, rising.
    """
    x = embed(params, tokens, cfg, position=position)
    x, kept = transformer.apply_with_taps(params["blocks"], x, cfg.blocks, taps, order=order, lo=lo, hi=hi)
    return norm.apply(params["norm"], x, cfg.norm), kept


def pool(params: dict, hidden: Float[Array, "b l d"], cfg: Config, at: Int[Array, "b n"]) -> Float[Array, "b n e"]:
    """One vector per text: its hidden state at the token `at` says, projected where cfg has a projection.

    CLIP looks at the first end-of-text token, SigLIP at the last token, padding included. Zeros, projected, where `at`
    is negative.
    """
    x = sharding.constrain(sharding.take_rows(hidden, at), ("batch", "length", None))
    return x if cfg.outputs is None else linear.apply(params["project"], x, cfg.project)


def first(tokens: Int[Array, "b l"], token: int) -> Int[Array, "b 1"]:
    """Where in each row `token` stands first; 0 where it does not. For rows of one text."""
    return jnp.argmax(tokens == token, axis=1, keepdims=True).astype(jnp.int32)
