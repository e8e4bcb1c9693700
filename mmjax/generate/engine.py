"""Tokens out of a model with a key-value cache of static shape: prompts are prefilled, answers come from one loop.

    state = engine.empty(cfg, rows=2, places=512)
    state = engine.prefill(params, batch, cfg, state)                   # as often as there is more to read
    state = engine.decode(params, state, 16, ends, values, cfg, switches)     # up to 16 more tokens per row

Pure functions; `run_prefill` and `run_decode` are the compiled ones, which take the state's memory over. How many
tokens `decode` makes is data: one program serves streams and long runs. Rows of different length go together, and each
says what it says alone: padding takes places that nothing sees (nn.cache), and positions and labels go on from each
row's own.
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from mmjax.connectors import module
from mmjax.core import meshes, sharding
from mmjax.core.errors import InputError
from mmjax.generate import sample
from mmjax.generate.sample import Switches, Values
from mmjax.models import decoder, encoder_decoder, vlm
from mmjax.models.tower import Media
from mmjax.nn import transformer
from mmjax.nn.cache import KVCache
from mmjax.sequence import batch as batches
from mmjax.sequence import positions
from mmjax.sequence.batch import Batch
from mmjax.sequence.layout import EMPTY, TEXT

Config = vlm.Config | decoder.Config | encoder_decoder.Config
Field = Any  # an array; under tree.map whatever takes its place


@flax.struct.dataclass
class State:
    """What rows have read and said. Places are those of the cache, the same for all rows."""

    cache: KVCache
    tokens: Field  # i32[B, S], the id in each place, -1 where there is none
    logits: Field  # f32[B, V], of the token that comes next
    label: Field  # i32[B], its label
    position: Field  # i32[B], its position: one past that of the last token so far, on the axis where that is largest
    lo: Field  # i32[B], the first label that it sees
    done: Field  # bool[B], rows that say nothing more
    media_lo: Field = None  # i32[B], the media tokens that it looks at by cross-attention, where the model does so:
    media_hi: Field = None  # those of the last token that was read


def language(cfg: Config) -> decoder.Config | encoder_decoder.Config:
    """The language model of a model."""
    return cfg.decoder if isinstance(cfg, vlm.Config) else cfg


def answers(cfg: Config) -> bool:
    """Whether answers are a stream of their own (models.encoder_decoder): prompts are read by `begin`, in one."""
    return language(cfg).answers


def unstacked(params: dict, cfg: Config, *, consume: bool = False) -> dict:
    """The same parameters, of every block of the decoder (and cross-attention layer) by itself.

    For decoding, which reads every parameter once a token. Of stacked ones, a scan on CPUs copies each block's before
    it uses them, for several rows; and on TPUs the loop over tokens keeps a second cache, laid out otherwise. Compile
    time grows with the number of blocks.

    Args:
      params, cfg: the model.
      consume: as of nn.transformer.unstack.
    """
    if isinstance(cfg, vlm.Config):
        return params | {"decoder": unstacked(params["decoder"], cfg.decoder, consume=consume)}
    if answers(cfg):
        return encoder_decoder.unstacked(params, consume=consume)
    stacks = {name: params[name] for name in ("blocks", "cross") if isinstance(params.get(name), dict)}
    apart = {name: transformer.unstack(stack, consume=consume) for name, stack in stacks.items()}
    return params | apart if apart else params


def empty(
    cfg: Config, rows: int, places: int, dtype: Any = jnp.float32, *, stacked: bool = True, media: int = 1
) -> State:
    """A state that has read nothing.

    Args:
      cfg: the model's.
      rows, places: B and S: so many tokens, the longest row's padding among them, may be read and said.
      dtype: of keys and values; the parameters' is the right one.
      stacked: whether the parameters of the blocks are, or `unstacked`.
      media: so many media tokens, padding among them, may be looked at by cross-attention, where the model does so.

    Raises:
      InputError: a decoder by itself that looks at media by cross-attention.
    """
    of, looks = language(cfg), language(cfg).cross is not None
    if looks and not isinstance(cfg, vlm.Config):
        raise InputError("A decoder that looks at media by cross-attention needs the model that makes them around it.")

    def full(value: Any, dtype: Any, *shape: int) -> jax.Array:
        return jnp.full((rows, *shape), value, dtype)

    return _laid(
        State(
            cache=decoder.empty_cache(of, rows, places, dtype, stacked=stacked, media=media),
            tokens=full(-1, jnp.int32, places),
            logits=full(0.0, jnp.float32, of.said),
            label=full(0, jnp.int32),
            position=full(0, jnp.int32),
            lo=full(0, jnp.int32),
            done=full(True, jnp.bool_),
            media_lo=full(0, jnp.int32) if looks else None,
            media_hi=full(-1, jnp.int32) if looks else None,
        )
    )


def text_batch(
    tokens: Int[Array | np.ndarray, "b l"],
    order: Int[Array | np.ndarray, "b l"],
    lo: Int[Array | np.ndarray, "b l"],
    position: Int[Array | np.ndarray, "b l 3"],
) -> Batch:
    """A batch of words alone, each of which sees what lies between `lo` and itself; places with label -1 are empty."""
    nothing = dict.fromkeys(field.name for field in dataclasses.fields(Batch))
    rows, there = tokens.shape[0], order >= 0
    return Batch(
        **nothing
        | {
            "tokens": tokens,
            "modality": jnp.where(there, TEXT, EMPTY).astype(jnp.int8),
            "document": jnp.where(there, 0, -1).astype(jnp.int32),
            "order": order,
            "lo": lo,
            "hi": order,
            "position": position,
            "patches": jnp.zeros((rows, 0, 1), jnp.uint8),
            "grid": jnp.zeros((rows, 0, 3), jnp.int32),
        }
    )


def rewound(state: State, n: int, position: int, media: int = 0) -> State:
    """A state of one row that has read its first n tokens alone; its next position is `position`.

    Of one row, for there a place is a label; it must read more before it says anything. Of the media tokens that are
    looked at by cross-attention it keeps the first `media`.
    """

    def kept(cache: KVCache, n: int) -> KVCache:
        order = jnp.where(jnp.arange(cache.places)[None] < n, cache.order, -1)
        return cache.replace(order=order, at=jnp.int32(n))

    cache = kept(state.cache, n)
    cache = cache if cache.media is None else cache.replace(media=kept(cache.media, media))
    at = jnp.full_like(state.label, n), jnp.full_like(state.position, position)
    tokens = jnp.where(jnp.arange(cache.places)[None] < n, state.tokens, -1)
    return state.replace(cache=cache, tokens=tokens, label=at[0], position=at[1])


def grown(state: State, places: int, media: int = 0) -> State:
    """The state with room for so many tokens, and media tokens that are looked at; never for fewer than it has."""

    def wider(x: jax.Array, axis: int, places: int, fill: int) -> jax.Array:
        more = max(places - x.shape[axis], 0)
        return jnp.pad(x, [(0, more if i == axis % x.ndim else 0) for i in range(x.ndim)], constant_values=fill)

    def larger(cache: KVCache, places: int) -> KVCache:
        k, v = jax.tree.map(lambda x: wider(x, -2, places, 0), (cache.k, cache.v))
        return cache.replace(k=k, v=v, order=wider(cache.order, 1, places, -1))

    cache = larger(state.cache, places)
    cache = cache if cache.media is None else cache.replace(media=larger(cache.media, media))
    return state.replace(cache=cache, tokens=wider(state.tokens, 1, places, -1))


def prefill(params: dict, batch: Batch, cfg: Config, state: State, *, media: Media | None = None) -> State:
    """The state after the tokens of a batch, one document (or the next part of one) at the beginning of each row.

    A row goes on where its labels do: those of the batch must be larger than all before. The cache needs room for all
    columns of the batch; those after its longest row are free again afterwards. Rows with no tokens stay as they are.
    Likewise for the media tokens of a model that looks at them by cross-attention: a batch that is read in parts brings
    them with its first one.

    Args:
      params: the model's; those of the blocks may be a tuple (`unstacked`).
      batch: B rows. Where rotary angles depend on how long a document is, it is as long as it is here, as in
        transformers: such a prompt is to be read in one.
      cfg: the model.
      state: B rows as well.
      media: the batch's media tokens, where they are known (models.vlm.media).
    """
    with meshes.whole("length"):
        batch, at = _placed(batch), state.cache.at
        media = None if media is None else _by_rows(media)
        hidden, cache = _run(params, batch, cfg, state.cache, media)
        there = batch.order >= 0
        column = jnp.arange(batch.order.shape[1], dtype=jnp.int32)[None]
        last = jnp.where(there, column, -1).max(-1)
        some, safe = last >= 0, jnp.maximum(last, 0)[:, None]
        logits = _logits(params, jnp.take_along_axis(hidden, safe[:, :, None], axis=1), cfg)
        # One past the last token's, not past the largest: the times of a clip may run past the text behind it.
        position = jnp.take_along_axis(batch.position, safe[:, :, None], axis=1).max((1, 2)).astype(jnp.int32) + 1
        words = jnp.where(there, batch.tokens, -1)
        looks = {}
        if cache.media is not None:
            taken = jnp.where((cache.media.order >= 0).any(0), jnp.arange(cache.media.places, dtype=jnp.int32), -1)
            cache = cache.replace(media=cache.media.replace(at=taken.max() + 1))
            for name in ("media_lo", "media_hi"):
                looks[name] = jnp.where(some, _at(getattr(batch, name), safe), getattr(state, name))
        return _laid(
            State(
                cache=cache.replace(at=at + last.max() + 1),
                tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, words, at, 1),
                logits=jnp.where(some[:, None], logits, state.logits),
                label=jnp.where(some, batch.order.max(-1) + 1, state.label),
                position=jnp.where(some, position, state.position),
                lo=jnp.where(some, _at(batch.lo, safe), state.lo),
                done=state.done & ~some,
                **looks,
            )
        )


def begin(params: dict, batch: Batch, cfg: Config, places: int, *, media: Media | None = None) -> State:
    """The state of an encoder–decoder that has read a batch's prompts, one in each row, and the beginning of answers.

    The encoder runs once; what the decoder looks at stays in the cache.

    Args:
      params, batch, cfg, media: as of `prefill`. Rows with no tokens say nothing.
      places: of the second stream: so many tokens, those of batch.answer among them, may be read and said.
    """
    with meshes.whole("length"):
        batch = _placed(batch)
        media = None if media is None else _by_rows(media)
        inner, of = _inner(params, cfg), language(cfg)
        if isinstance(cfg, vlm.Config):
            encoded = vlm.encode(params, batch, cfg, media=media)
        else:
            x, see = encoder_decoder.embed(inner, batch.tokens, of), {"order": batch.order}
            encoded = encoder_decoder.encode(inner, x, of, lo=batch.lo, hi=batch.hi, **see)
        cache = encoder_decoder.empty_cache(inner, encoded, batch.order, of, places)
        said = batch.answer
        hidden, cache = encoder_decoder.cached(inner, said.tokens, of, cache, order=said.order, lo=said.lo, hi=said.hi)
        count = (said.order >= 0).sum(-1).astype(jnp.int32)
        last = jnp.maximum(count - 1, 0)[:, None, None]
        rows, most = said.tokens.shape[0], count.max()
        tokens = jnp.full((rows, places), -1, jnp.int32)
        words = jnp.where(said.order >= 0, said.tokens, -1)
        return _laid(
            State(
                cache=cache.replace(at=most),
                tokens=jax.lax.dynamic_update_slice_in_dim(tokens, words, 0, 1),
                logits=_logits(params, jnp.take_along_axis(hidden, last, axis=1), cfg),
                label=count,
                position=count,
                lo=jnp.zeros_like(count),
                done=count == 0,
            )
        )


def _at(x: Int[Array, "b l"], column: Int[Array, "b 1"]) -> Int[Array, "b"]:
    """What stands in one column of each row."""
    return jnp.take_along_axis(x, column, axis=1)[:, 0]


def _by_rows(media: Media) -> Media:
    """Media tokens laid out as the rows they belong to: they may come from a host."""
    deep = None if media.deep is None else sharding.constrain(media.deep, (None, "batch", None, None))
    return media.replace(tokens=sharding.constrain(media.tokens, ("batch", None, None)), deep=deep)


def media(params: dict, batch: Batch, cfg: vlm.Config) -> Media:
    """The media tokens of a batch, which is laid out as parameters are (models.vlm.media)."""
    with meshes.whole("length"):
        return vlm.media(params, _placed(batch), cfg)


def read(params: dict, state: State, token: Int[Array, "b"], cfg: Config) -> State:
    """The state after one more token of every row that is not done; the others stay as they are."""
    label = jnp.where(state.done, -1, state.label)[:, None]
    # Those of rows that are done may have come to the end of a table of positions.
    position = jnp.where(state.done, 0, state.position)[:, None, None]
    position = jnp.broadcast_to(position, (*label.shape, 3))
    batch = text_batch(jnp.where(state.done, 0, token)[:, None], label, state.lo[:, None], position)
    if state.media_lo is not None:
        batch = batch.replace(media_lo=state.media_lo[:, None], media_hi=state.media_hi[:, None])
    with meshes.whole("length"):
        hidden, cache = _run(params, batch, cfg, state.cache, None)
        word = jnp.where(state.done, -1, token)[:, None]
        more = 1 - state.done.astype(jnp.int32)
        return _laid(
            State(
                cache=cache,
                tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, word, state.cache.at, 1),
                logits=_logits(params, hidden, cfg),
                label=state.label + more,
                position=state.position + more,
                lo=state.lo,
                done=state.done,
                media_lo=state.media_lo,
                media_hi=state.media_hi,
            )
        )


def decode(
    params: dict,
    state: State,
    n: Int[Array, ""] | int,
    ends: Int[Array, "ends"],
    values: Values,
    cfg: Config,
    switches: Switches,
) -> State:
    """The state after up to n more tokens of every row, in one loop: chosen, written down and read.

    It ends when all rows are done, or the cache is full. What was said is in `tokens`, from the old cache.at to the new
    one: a row's own tokens, the one that ended it among them, and -1 after that.

    Args:
      params, cfg: the model.
      state: after the prompts.
      n: how many.
      ends: i32[K], ids after which a row is done.
      values, switches: how tokens are chosen (generate.sample.prepare).
    """

    values = jax.tree.map(lambda x: sharding.constrain(jnp.asarray(x), ("batch",)), values)

    def more(carry: tuple[jax.Array, State]) -> jax.Array:
        i, state = carry
        return (i < n) & ~state.done.all() & (state.cache.at < state.cache.places)

    def turn(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
        i, state = carry
        token = sample.choose(state.logits, state.tokens, state.label, values, switches)
        after = read(params, state, token, cfg)
        return i + 1, after.replace(done=after.done | (token[:, None] == ends[None]).any(-1))

    return jax.lax.while_loop(more, turn, (jnp.zeros((), jnp.int32), state))[1]


def _run(params: dict, batch: Batch, cfg: Config, cache: KVCache, media: Media | None) -> tuple[jax.Array, KVCache]:
    if answers(cfg):
        see = {"order": batch.order, "lo": batch.lo, "hi": batch.hi}
        with jax.named_scope("decoder"):
            return encoder_decoder.cached(_inner(params, cfg), batch.tokens, language(cfg), cache, **see)
    if isinstance(cfg, vlm.Config):
        return vlm.prefill(params, batch, cfg, cache, media=media)
    see = {"order": batch.order, "lo": batch.lo, "hi": batch.hi, "position": batch.position}
    if (rope := cfg.blocks.rope) is not None and rope.needs_length:
        see["length"] = positions.lengths(batch.document, batch.position)
    with jax.named_scope("decoder"):
        return decoder.cached(params, decoder.embed(params, batch.tokens, cfg), cfg, cache, **see)


def _logits(params: dict, hidden: jax.Array, cfg: Config) -> jax.Array:
    """f32[B, V] of one hidden state per row."""
    with jax.named_scope("head"):
        return module(language(cfg)).logits(_inner(params, cfg), hidden, language(cfg))[:, 0]


def _inner(params: dict, cfg: Config) -> dict:
    """The parameters of the language model."""
    return params["decoder"] if isinstance(cfg, vlm.Config) else params


def _placed(batch: Batch) -> Batch:
    """Rows split over devices, whatever lay where."""
    return jax.tree.map(lambda x, axes: sharding.constrain(jnp.asarray(x), axes), batch, batches.axes(batch))


def _laid(state: State) -> State:
    """Rows split as those of a batch, everything else whole: also the logits, which are looked through as a whole."""

    def laid(cache: KVCache) -> KVCache:
        return cache.replace(order=sharding.constrain(cache.order, ("batch", None)))

    cache = laid(state.cache)
    cache = cache if cache.media is None else cache.replace(media=laid(cache.media))
    rows = {field.name: getattr(state, field.name) for field in dataclasses.fields(State) if field.name != "cache"}
    return State(cache, **jax.tree.map(lambda x: sharding.constrain(x, ("batch",) + (None,) * (x.ndim - 1)), rows))


run_prefill = functools.partial(jax.jit, static_argnames=("cfg",), donate_argnames=("state",))(prefill)
run_begin = functools.partial(jax.jit, static_argnames=("cfg", "places"))(begin)
run_decode = functools.partial(jax.jit, static_argnames=("cfg", "switches"), donate_argnames=("state",))(decode)
run_empty = functools.partial(jax.jit, static_argnames=("cfg", "rows", "places", "dtype", "stacked", "media"))(empty)
run_media = functools.partial(jax.jit, static_argnames=("cfg",))(media)
run_sound = jax.jit(lambda logits: jnp.isfinite(logits.max(-1)).all())
