"""A language model in two parts: an encoder reads the question, both ways, and a decoder that looks at it answers.

Vaswani et al. 2017; T5 (Raffel et al. 2020). Both are nn.transformer's blocks. There are two streams of tokens, of
which the second is a batch's `answer` (sequence.batch): its labels are its own, and it looks at labels of the first.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mmjax.core import sharding
from mmjax.core.errors import InputError
from mmjax.core.spec import Normal, ParamSpec, Spec, fan_in
from mmjax.models.language import Language
from mmjax.nn import cache as caches
from mmjax.nn import norm, relative, transformer
from mmjax.nn.block import Look
from mmjax.nn.cache import KVCache
from mmjax.sequence.batch import Batch


@dataclass(frozen=True)
class Config(Language):
    """Sizes and variants.

    blocks: the encoder's. answer: the decoder's, which look at what the encoder puts out.
    tied: the head is the token table.
    head_scale: what hidden states are multiplied by before the head (T5 where tied: 1 / sqrt(width)).
    """

    vocab: int
    blocks: transformer.Config
    answer: transformer.Config
    tied: bool = True
    head_scale: float = 1.0

    answers = True

    def __post_init__(self):
        if self.answer.look != self.blocks.width or self.blocks.look is not None:
            raise InputError(
                f"The decoder's blocks look at an encoder of width {self.answer.look}, and this one has "
                f"{self.blocks.width}; set `look` of the decoder's to that, and none of the encoder's."
            )
        if self.answer.width != self.blocks.width:
            raise InputError(
                f"Encoder and decoder share a token table, but are {self.blocks.width} and {self.answer.width} wide."
            )
        if any(blocks.rope is not None or blocks.windowed for blocks in (self.blocks, self.answer)):
            raise InputError(
                "Blocks of an encoder–decoder are told no positions and no windows; leave `rope` and `windowed` out."
            )


def spec(cfg: Config) -> Spec:
    width = cfg.blocks.width

    def stack(blocks: transformer.Config) -> Spec:
        out = {"blocks": transformer.spec(blocks), "norm": norm.spec(blocks.norm_config)}
        return out if blocks.relative is None else out | {"relative": relative.spec(blocks.relative)}

    out = {
        "embed": ParamSpec((cfg.vocab, width), ("vocab", "embed"), Normal(width**-0.5)),
        "encoder": stack(cfg.blocks),
        "answer": stack(cfg.answer),
    }
    return out if cfg.tied else out | {"head": ParamSpec((cfg.vocab, width), ("vocab", "embed"), fan_in(width))}


def embed(params: dict, tokens: Int[Array, "b l"], cfg: Config) -> Float[Array, "b l d"]:
    """The vectors of token ids, of both streams; the ids must be in range (Batch checks them)."""
    return sharding.take(params["embed"], tokens, ("batch", "length", None))


def encode(
    params: dict,
    x: Float[Array, "b l d"],
    cfg: Config,
    *,
    order: Int[Array, "b l"],
    lo: Int[Array, "b l"],
    hi: Int[Array, "b l"],
) -> Float[Array, "b l d"]:
    """What the encoder makes of token vectors, media among them; who sees whom as of nn.transformer."""
    own = params["encoder"]
    x = transformer.apply(own["blocks"], x, cfg.blocks, order=order, lo=lo, hi=hi, relative=own.get("relative"))
    return norm.apply(own["norm"], x, cfg.blocks.norm_config)


def apply(
    params: dict,
    x: Float[Array, "b l d"],
    cfg: Config,
    answer: Batch,
    *,
    order: Int[Array, "b l"],
    lo: Int[Array, "b l"],
    hi: Int[Array, "b l"],
) -> Float[Array, "b t d"]:
    """Token vectors of the first stream in, normalised hidden states of the second out.

    Args:
      params: as `spec(cfg)`.
      x: [B, L, D].
      cfg: the model.
      answer: the second stream; its `media_lo` and `media_hi` are labels of the first.
      order, lo, hi: of the first.
    """
    encoded = encode(params, x, cfg, order=order, lo=lo, hi=hi)
    own, see = params["answer"], {"order": answer.order, "lo": answer.lo, "hi": answer.hi}
    look = Look(encoded, sharding.unsplit(order), answer.media_lo, answer.media_hi)
    with jax.named_scope("answer"):
        y = embed(params, answer.tokens, cfg)
        y = transformer.apply(own["blocks"], y, cfg.answer, relative=own.get("relative"), look=look, **see)
        return norm.apply(own["norm"], y, cfg.answer.norm_config)


def empty_cache(
    params: dict,
    encoded: Float[Array, "b l d"],
    order: Int[Array, "b l"],
    cfg: Config,
    places: int,
) -> KVCache:
    """A cache for `cached` of so many places of the second stream: what the decoder looks at is in it (`media`)."""
    of, blocks = cfg.answer, params["answer"]["blocks"]
    k, v = transformer.looked(blocks, encoded, of)
    made = caches.empty(
        of.layers, encoded.shape[0], of.kv_heads, places, of.head, encoded.dtype, stacked=isinstance(blocks, dict)
    )
    return made.replace(media=KVCache(k, v, order, jnp.int32(order.shape[1])))


def cached(
    params: dict,
    tokens: Int[Array, "b t"],
    cfg: Config,
    cache: KVCache,
    *,
    order: Int[Array, "b t"],
    lo: Int[Array, "b t"],
    hi: Int[Array, "b t"],
) -> tuple[Float[Array, "b t d"], KVCache]:
    """Hidden states of T more tokens of the second stream, which are in the cache afterwards. For inference.

    They look at all of the first stream that their row has. Other arguments as of models.decoder.cached.
    """
    labelled, own, media = caches.labelled(cache, order), params["answer"], cache.media
    everything = jnp.zeros_like(order), jnp.full_like(order, jnp.iinfo(jnp.int32).max)
    look = Look(None, media.order, *everything, media.k, media.v)
    x, new = transformer.apply_cached(
        own["blocks"],
        embed(params, tokens, cfg),
        cfg.answer,
        cache,
        order=labelled.order,
        lo=lo,
        hi=hi,
        relative=own.get("relative"),
        own=order,
        look=look,
    )
    return norm.apply(own["norm"], x, cfg.answer.norm_config), labelled.replace(k=new.k, v=new.v)


def unstacked(params: dict, *, consume: bool = False) -> dict:
    """The same parameters, of every block of the decoder by itself (nn.transformer.unstack)."""
    own = params["answer"]
    if not isinstance(own["blocks"], dict):
        return params
    return params | {"answer": own | {"blocks": transformer.unstack(own["blocks"], consume=consume)}}


def head(cfg: Config) -> str:
    """The name of the table that makes logits."""
    return "embed" if cfg.tied else "head"


def logits(params: dict, hidden: Float[Array, "b t d"], cfg: Config) -> Float[Array, "b t vocab"]:
    """f32[B, T, V]."""
    if cfg.head_scale != 1:
        hidden = hidden * jnp.asarray(cfg.head_scale, hidden.dtype)
    return sharding.dense(hidden, params[head(cfg)].T, ("batch", "length", "vocab"), wide=True).astype(jnp.float32)
