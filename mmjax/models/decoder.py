"""The language model: token table, blocks, final norm, head."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from mmjax.core import sharding
from mmjax.core.errors import InputError
from mmjax.core.spec import Normal, ParamSpec, Spec, fan_in, gradients_laid, stack
from mmjax.nn import cross_attention, norm, transformer


@dataclass(frozen=True)
class Config:
    """`tied`: the head is the token table. `cross`: layers between the blocks through which text looks at media."""

    vocab: int
    blocks: transformer.Config
    tied: bool = True
    cross: cross_attention.Config | None = None

    def __post_init__(self):
        if self.cross is not None and self.blocks.layers % self.cross.every:
            raise InputError(
                f"A cross-attention layer before each {self.cross.every} blocks does not divide {self.blocks.layers} "
                f"blocks; choose a number that does."
            )

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
    if cfg.cross is not None:
        out["cross"] = stack(cross_attention.spec(cfg.cross), cfg.blocks.layers // cfg.cross.every)
    if not cfg.tied:
        out["head"] = ParamSpec((cfg.vocab, width), ("vocab", "embed"), fan_in(width))
    return out


def embed(params: dict, tokens: Int[Array, "b l"]) -> Float[Array, "b l d"]:
    """The vectors of token ids; the ids must be in range (Batch checks them)."""
    return sharding.take(params["embed"], tokens, ("batch", "length", None))


def apply(
    params: dict,
    x: Float[Array, "b l d"],
    cfg: Config,
    *,
    order: Int[Array, "b l"],
    lo: Int[Array, "b l"],
    hi: Int[Array, "b l"],
    position: Num[Array, "b l axes"],
    media: tuple[Float[Array, "b m e"], Int[Array, "b m"]] | None = None,
    media_lo: Int[Array, "b l"] | None = None,
    media_hi: Int[Array, "b l"] | None = None,
) -> Float[Array, "b l d"]:
    """Token vectors in, normalised hidden states out.

    Args:
      params: as `spec(cfg)`.
      x: [B, L, D].
      cfg: the model.
      order, lo, hi, position: of the tokens (see nn.transformer).
      media: media tokens [B, M, E] and their labels i32[B, M], for cross-attention.
      media_lo, media_hi: i32[B, L], which of them each token sees.
    """
    see = {"order": order, "lo": lo, "hi": hi, "position": position}
    if cfg.cross is None:
        x = transformer.apply(params["blocks"], x, cfg.blocks, **see)
        return norm.apply(params["norm"], x, cfg.norm)
    if media is None or media_lo is None or media_hi is None:
        raise InputError("This decoder looks at media by cross-attention; give media tokens, media_lo and media_hi.")
    every = cfg.cross.every
    some, own = dataclasses.replace(cfg.blocks, layers=every), cross_attention.spec(cfg.cross)

    def group(x: jax.Array, of: tuple[dict, dict]) -> tuple[jax.Array, None]:
        cross, blocks = of
        cross = gradients_laid(cross, own)
        x = cross_attention.apply(cross, x, media[0], cfg.cross, order=media[1], lo=media_lo, hi=media_hi)
        return transformer.apply(blocks, x, some, **see), None

    blocks = jax.tree.map(lambda p: p.reshape(-1, every, *p.shape[1:]), params["blocks"])
    x, _ = jax.lax.scan(group, x, (params["cross"], blocks))
    return norm.apply(params["norm"], x, cfg.norm)


def head(cfg: Config) -> str:
    """The name of the table that makes logits."""
    return "embed" if cfg.tied else "head"


def logits(params: dict, hidden: Float[Array, "b l d"], cfg: Config) -> Float[Array, "b l vocab"]:
    """f32[B, L, V]."""
    return sharding.dense(hidden, params[head(cfg)].T, ("batch", "length", "vocab"), wide=True).astype(jnp.float32)
