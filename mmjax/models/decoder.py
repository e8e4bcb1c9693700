"""The language model: token table, blocks, final norm, head."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from mmjax.core import sharding
from mmjax.core.errors import InputError
from mmjax.core.spec import Normal, ParamSpec, Spec, fan_in, stack
from mmjax.models.language import Language
from mmjax.nn import cache as caches
from mmjax.nn import cross_attention, crossed, norm, position_embed, transformer
from mmjax.nn.cache import KVCache


@dataclass(frozen=True)
class Positions:
    """A vector of its position, added to every token and media token before the first block (GPT-2, OPT, Kosmos-2).

    rows: of a learned table. There is nothing past the last one: what stands there becomes NaN, so whoever makes
      batches keeps them shorter. None: sines and cosines in fairseq's order, which never end.
    first: the row of position 0 (fairseq counts from behind its padding id: 2).
    """

    rows: int | None
    first: int = 0

    @property
    def longest(self) -> int | None:
        """Tokens in the longest document; None where nothing bounds it."""
        return None if self.rows is None else self.rows - self.first


@dataclass(frozen=True)
class Config(Language):
    """Sizes and variants.

    vocab: ids that are read. unsaid: the last of them, which are never said: the head has no rows for them (Mllama).
    tied: the head is the token table.
    cross: layers between the blocks through which text looks at media.
    window: of the blocks that `blocks.windowed` names, how many tokens one sees backwards, itself included (Mistral,
      Gemma: see sequence.intervals.sliding_window).
    window_ahead: whether that holds for tokens of a block that see each other too (Gemma 3's pictures). If not, they
      see all that they see without a window (the prefix of PaliGemma 2, as transformers has it).
    embed_scale: what vectors of the token table are multiplied by (Gemma: sqrt(width)).
    softcap: logits become softcap · tanh(logits / softcap) (Gemma 2).
    positions: vectors of positions, by the first axis of `position`. Rotary ones are the blocks' matter (blocks.rope).
    """

    vocab: int
    blocks: transformer.Config
    tied: bool = True
    cross: cross_attention.Config | None = None
    window: int = 0
    window_ahead: bool = True
    embed_scale: float = 1.0
    softcap: float | None = None
    positions: Positions | None = None
    unsaid: int = 0

    def __post_init__(self):
        if not 0 <= self.unsaid < self.vocab or (self.unsaid and self.tied):
            raise InputError(
                f"The decoder never says {self.unsaid} of its {self.vocab} ids; leave it some, and a head of its own "
                f"(tied off)."
            )
        if bool(self.window) != bool(self.blocks.windowed) or self.window < 0:
            raise InputError(
                f"The decoder's window is {self.window}, and its blocks {self.blocks.windowed} are windowed; a window "
                f"of at least 1 and the blocks that have it go together."
            )
        if self.cross is not None and self.blocks.layers % self.cross.every:
            raise InputError(
                f"A cross-attention layer before each {self.cross.every} blocks does not divide {self.blocks.layers} "
                f"blocks; choose a number that does."
            )
        if max(self.crossed, default=0) > self.blocks.layers:
            raise InputError(
                f"A cross-attention layer is to stand before block {self.crossed[-1]}, but there are only "
                f"{self.blocks.layers}."
            )
        own = self.positions
        if own is not None and not 0 <= own.first < (own.first + 1 if own.rows is None else own.rows):
            raise InputError(f"The decoder's {self.positions} has no row for the first token; give it more rows.")

    @property
    def said(self) -> int:
        """Ids that may come next: so many logits there are."""
        return self.vocab - self.unsaid

    @property
    def crossed(self) -> tuple[int, ...]:
        """Before which blocks a cross-attention layer stands."""
        return () if self.cross is None else self.cross.places(self.blocks.layers)

    @property
    def longest(self) -> int | None:
        """Tokens in the longest document; None where nothing bounds it."""
        return None if self.positions is None else self.positions.longest

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
        out["cross"] = stack(cross_attention.spec(cfg.cross), len(cfg.crossed))
    if cfg.positions is not None and cfg.positions.rows is not None:
        out["positions"] = ParamSpec((cfg.positions.rows, width), (None, "embed"), Normal(0.02))
    if not cfg.tied:
        out["head"] = ParamSpec((cfg.said, width), ("vocab", "embed"), fan_in(width))
    return out


def embed(params: dict, tokens: Int[Array, "b l"], cfg: Config) -> Float[Array, "b l d"]:
    """The vectors of token ids; the ids must be in range (Batch checks them)."""
    x = sharding.take(params["embed"], tokens, ("batch", "length", None))
    # In the table's own format, as published models are run.
    return x if cfg.embed_scale == 1 else x * jnp.asarray(cfg.embed_scale, x.dtype)


def apply(
    params: dict,
    x: Float[Array, "b l d"],
    cfg: Config,
    *,
    order: Int[Array, "b l"],
    lo: Int[Array, "b l"],
    hi: Int[Array, "b l"],
    position: Num[Array, "b l axes"],
    length: Num[Array, "b l"] | None = None,
    added: Float[Array, "b l t d"] | None = None,
    media: tuple[Float[Array, "b m e"], Int[Array, "b m"]] | None = None,
    media_lo: Int[Array, "b l"] | None = None,
    media_hi: Int[Array, "b l"] | None = None,
) -> Float[Array, "b l d"]:
    """Token vectors in, normalised hidden states out.

    Args:
      params: as `spec(cfg)`; its blocks, and the layers between them, may be tuples (nn.transformer.unstack).
      x: [B, L, D].
      cfg: the model.
      order, lo, hi, position, length, added: of the tokens (see nn.transformer).
      media: media tokens [B, M, E] and their labels i32[B, M], for cross-attention; None where no row has any.
      media_lo, media_hi: i32[B, L], which of them each token sees.
    """
    see = _see(cfg, order, order, lo, hi, position, length, added)
    look = _look(cfg, media, media_lo, media_hi)
    x, _ = _blocks(params, _positioned(params, x, position, cfg), cfg, see, look, None)
    return norm.apply(params["norm"], x, cfg.norm)


def empty_cache(
    cfg: Config, rows: int, places: int, dtype: Any = jnp.float32, *, stacked: bool = True, media: int = 1
) -> KVCache:
    """An empty cache for `cached`.

    Args:
      cfg: the model.
      rows, places, dtype: as of nn.cache.empty.
      stacked: as the parameters of the blocks are.
      media: places for the media tokens that text looks at by cross-attention, where the model does; at least 1.
    """
    b, cross = cfg.blocks, cfg.cross
    made = caches.empty(b.layers, rows, b.kv_heads, places, b.head, dtype, stacked=stacked)
    if cross is None:
        return made
    looked = caches.empty(len(cfg.crossed), rows, cross.keys, media, cross.head, dtype, stacked=stacked)
    return made.replace(media=looked)


def cached(
    params: dict,
    x: Float[Array, "b l d"],
    cfg: Config,
    cache: KVCache,
    *,
    order: Int[Array, "b l"],
    lo: Int[Array, "b l"],
    hi: Int[Array, "b l"],
    position: Num[Array, "b l axes"],
    length: Num[Array, "b l"] | None = None,
    added: Float[Array, "b l t d"] | None = None,
    media: tuple[Float[Array, "b m e"], Int[Array, "b m"]] | None = None,
    media_lo: Int[Array, "b l"] | None = None,
    media_hi: Int[Array, "b l"] | None = None,
) -> tuple[Float[Array, "b l d"], KVCache]:
    """The same of L more tokens per row, which see those in the cache by their labels, and are in it afterwards.

    For inference: no gradients. Padding (label −1) takes a place in the cache that nothing sees. The cache must have
    room for L more places, which is not checked in here; and for M more media tokens where some are given.

    Args:
      cache: as `empty_cache` makes it.
      order: i32[B, L], labels of these tokens, larger than those in the cache; −1 for padding.
      media: those that are new, with labels larger than those in the cache. Their keys and values are made once: all
        tokens after them look at the cache's.
      The rest is as of `apply`.
    """
    labelled, looked = caches.labelled(cache, order), cache.media
    look = _look(cfg, media, media_lo, media_hi)
    if looked is not None:
        looked = looked if media is None else caches.labelled(looked, media[1])
        look = look._replace(order=looked.order)
    see = _see(cfg, order, labelled.order, lo, hi, position, length, added)
    x, new = _blocks(params, _positioned(params, x, position, cfg), cfg, see, look, cache)
    if looked is not None:
        looked = looked.replace(k=new.media.k, v=new.media.v)
    return norm.apply(params["norm"], x, cfg.norm), labelled.replace(k=new.k, v=new.v, media=looked)


def _positioned(params: dict, x: jax.Array, position: jax.Array, cfg: Config) -> jax.Array:
    """Tokens with the vectors of their positions added, where there are such."""
    if cfg.positions is None:
        return x
    at = position[..., 0].astype(jnp.int32) + cfg.positions.first
    if cfg.positions.rows is None:
        return x + position_embed.sinusoidal(at[..., None], cfg.blocks.width, closed=True).astype(x.dtype)
    return x + position_embed.learned(params["positions"], at).astype(x.dtype)


def _see(cfg: Config, own: jax.Array, order: jax.Array, lo: jax.Array, hi: jax.Array, position, length, added) -> dict:
    """What the blocks are given of tokens with the labels `own`; `order` are the keys' labels."""
    see = {"order": order, "lo": lo, "hi": hi, "position": position, "length": length, "added": added}
    if not cfg.window:
        return see
    near = jnp.maximum(lo, own - (cfg.window - 1))
    if not cfg.window_ahead:
        inside = sharding.constrain(_in_block(own, hi), ("batch", "length"))
        near = jnp.where(inside, lo, near)
    return see | {"window": (near, hi)}


@sharding.whole_rows("own", "hi")
def _in_block(own: Int[Array, "b l"], hi: Int[Array, "b l"]) -> Bool[Array, "b l"]:
    """Which tokens see later ones, or are the last that the token before them sees."""
    ahead = hi > own
    before = jnp.pad(jnp.where(ahead, hi, -2)[:, :-1], ((0, 0), (1, 0)), constant_values=-2)
    return ahead | (before == own)


def _look(cfg: Config, media: tuple | None, lo: jax.Array | None, hi: jax.Array | None) -> crossed.Look:
    """What the cross-attention layers are given."""
    if cfg.cross is not None and (lo is None or hi is None):
        raise InputError("This decoder looks at media by cross-attention; give media_lo and media_hi.")
    return crossed.Look(*(media or (None, None)), lo, hi)


def _blocks(
    params: dict, x: jax.Array, cfg: Config, see: dict, look: crossed.Look, cache: KVCache | None
) -> tuple[jax.Array, KVCache | None]:
    """All blocks in turn, and the layers between them."""
    if cfg.cross is not None:
        return crossed.apply(params["blocks"], params["cross"], x, cfg.blocks, cfg.cross, see, look, cache)
    if cache is None:
        return transformer.apply(params["blocks"], x, cfg.blocks, **see), None
    return transformer.apply_cached(params["blocks"], x, cfg.blocks, cache, **see)


def head(cfg: Config) -> str:
    """The name of the table that makes logits."""
    return "embed" if cfg.tied else "head"


def logits(params: dict, hidden: Float[Array, "b l d"], cfg: Config) -> Float[Array, "b l vocab"]:
    """f32[B, L, V]."""
    out = sharding.dense(hidden, params[head(cfg)].T, ("batch", "length", "vocab"), wide=True).astype(jnp.float32)
    return out if cfg.softcap is None else cfg.softcap * jnp.tanh(out / cfg.softcap)
