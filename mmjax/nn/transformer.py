"""A pre-norm transformer: equal blocks, stacked and scanned. Encoders and decoders differ in their intervals alone."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from mmjax.core import meshes, sharding
from mmjax.core.errors import InputError
from mmjax.core.spec import Spec, gradients_laid, stack
from mmjax.nn import block, ring
from mmjax.nn import relative as biases
from mmjax.nn import rope as rotary
from mmjax.nn.attention import RESULTS, context, goes_round
from mmjax.nn.block import PLACE, Look, See
from mmjax.nn.block import Config as Config  # part of what this file offers
from mmjax.nn.block import Remat as Remat
from mmjax.nn.cache import KVCache, Past

_DOTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
_ATTENTION = jax.checkpoint_policies.save_only_these_names(*RESULTS)
# What the backward pass finds ready of a block, besides its input. The rest it computes again.
REMAT: dict[str, Any] = {
    "none": None,  # everything: the most memory, nothing is computed twice
    "dots": _DOTS,  # products with parameters; attention runs again, norms and activations too
    "attention": _ATTENTION,  # attention's results; products with parameters run again
    "dots_attention": jax.checkpoint_policies.save_from_both_policies(_DOTS, _ATTENTION),  # both; the cheap rest again
    "full": jax.checkpoint_policies.nothing_saveable,  # nothing: the least memory, a third more products
}


def spec(cfg: Config) -> Spec:
    """The blocks' parameters, stacked along a leading `layers` axis."""
    return stack(block.spec(cfg), cfg.layers)


def unstack(params: dict, *, consume: bool = False) -> tuple[dict, ...]:
    """The parameters of every block by itself, which all functions here take as well as stacked ones.

    For decoding where a scan copies each block's parameters before it uses them: XLA on CPUs does, for several rows.
    Compile time then grows with the number of blocks.

    Args:
      params: stacked.
      consume: delete them as they are taken apart, so that there is never more than one parameter twice.
    """

    def apart(stack: jax.Array) -> list[jax.Array]:
        each = [stack[i] for i in range(len(stack))]
        if consume and isinstance(stack, jax.Array):
            jax.block_until_ready(each)
            stack.delete()
        return each

    leaves, tree = jax.tree.flatten(params)
    each = [apart(leaf) for leaf in leaves]
    return tuple(jax.tree.unflatten(tree, layer) for layer in zip(*each, strict=True))


def apply(
    params: dict | tuple,
    x: Float[Array, "b l d"],
    cfg: Config,
    *,
    order: Int[Array, "b l"],
    lo: Int[Array, "b l"],
    hi: Int[Array, "b l"],
    position: Num[Array, "b l axes"] | None = None,
    length: Num[Array, "b l"] | None = None,
    window: tuple[Int[Array, "b l"], Int[Array, "b l"]] | None = None,
    added: Float[Array, "b l t d"] | None = None,
    relative: Float[Array, "h n"] | None = None,
    look: Look | None = None,
) -> Float[Array, "b l d"]:
    """All blocks in turn (no final norm).

    Args:
      params: as `spec(cfg)`, or a tuple of blocks (`unstack`).
      x: [B, L, D].
      order, lo, hi: who sees whom (see nn.attention).
      position: [B, L, axes], needed where cfg has a rotary embedding.
      length: [B, L], needed where its scaling depends on the document's length (see nn.rope).
      window: lo and hi of the blocks that cfg.windowed names.
      added: [B, L, T, D], what is added to the outputs of the first T blocks (DeepStack).
      relative: the table of cfg.relative.
      look: the tokens that blocks look at, where cfg.look.
    """
    see = {"order": order, "lo": lo, "hi": hi, "position": position, "length": length, "window": window}
    see |= {"added": added, "relative": relative, "look": look}
    return apply_with_taps(params, x, cfg, (), **see)[0]


def apply_with_taps(
    params: dict | tuple,
    x: Float[Array, "b l d"],
    cfg: Config,
    taps: tuple[int, ...],
    *,
    order: Int[Array, "b l"],
    lo: Int[Array, "b l"],
    hi: Int[Array, "b l"],
    position: Num[Array, "b l axes"] | None = None,
    length: Num[Array, "b l"] | None = None,
    window: tuple[Int[Array, "b l"], Int[Array, "b l"]] | None = None,
    added: Float[Array, "b l t d"] | None = None,
    relative: Float[Array, "h n"] | None = None,
    look: Look | None = None,
) -> tuple[Float[Array, "b l d"], Float[Array, "taps b l d"]]:
    """The same, and what the blocks named in `taps` put out, in rising order: block 0 is the first.

    Memory for the named ones alone: they are written down as the scan passes.

    Raises:
      InputError: taps that do not rise, or that name no block.
    """
    _refuse_window(cfg, window)
    if list(taps) != sorted(set(taps)) or not all(0 <= i < cfg.layers for i in taps):
        raise InputError(f"Taps {taps} must rise and name blocks from 0 to {cfg.layers - 1}.")
    count = x.shape[1]
    room = -count % meshes.parts("length")
    if room:
        # Rows that devices cannot share evenly get empty places at the end, which nothing sees.
        x, lo, position, length, added = _with_room((x, lo, position, length, added), room, 0)
        order, hi = _with_room((order, hi), room, -1)
        if look is not None:
            look = look._replace(lo=_with_room(look.lo, room, 0), hi=_with_room(look.hi, room, -1))
        window = None if window is None else (_with_room(window[0], room, 0), _with_room(window[1], room, -1))
    looks = (None, None) if look is None else (look.lo, look.hi)
    places = (order, lo, hi, position, length, window, added, *looks)
    x, kept = _dealt_blocks(params, x, cfg, taps, places, relative, look)
    if room:
        x = sharding.unsplit(x)[:, :count]
        kept = sharding.constrain(kept, (None, "batch", None, None))[:, :, :count]
    return x, kept


def apply_cached(
    params: dict | tuple,
    x: Float[Array, "b l d"],
    cfg: Config,
    cache: KVCache,
    *,
    order: Int[Array, "b s"],
    lo: Int[Array, "b l"],
    hi: Int[Array, "b l"],
    position: Num[Array, "b l axes"] | None = None,
    length: Num[Array, "b l"] | None = None,
    window: tuple[Int[Array, "b l"], Int[Array, "b l"]] | None = None,
    added: Float[Array, "b l t d"] | None = None,
    first: Int[Array, ""] | None = None,
    relative: Float[Array, "h n"] | None = None,
    own: Int[Array, "b l"] | None = None,
    look: Look | None = None,
) -> tuple[Float[Array, "b l d"], KVCache]:
    """All blocks in turn over L more tokens; their keys and values go to the cache, from place cache.at on.

    Arguments as of `apply`, but:

    Args:
      cache: stacked where params are, else a tuple. Its labels and `at` stay as they are (see nn.cache.labelled).
      order: i32[B, S], the labels of all places of the cache, these tokens' included.
      first: which layer of the cache the first of these blocks has, where they are some of several.
      own: these tokens' own labels, where cfg.relative.
      look: with the keys and values of `looked` instead of tokens.
    """
    _refuse_window(cfg, window)
    stacked = isinstance(params, dict)
    if stacked == isinstance(cache.k, tuple):
        raise InputError("Stacked blocks need a stacked cache, and a tuple of blocks a tuple of caches.")
    # A few tokens more are no rows that devices could share along their length.
    with meshes.whole("length"):
        bias = None if cfg.relative is None else biases.bias(relative, cfg.relative, own, order)
        sees = _sees(cfg, order, (lo, hi), window, _turns(cfg, position, length), bias, look)
        x = sharding.constrain(x, PLACE)
        if stacked:
            start = Past(cache.k, cache.v, cache.at, jnp.zeros((), jnp.int32) if first is None else first)
            x, past, _ = _scanned(params, x, cfg, (), sees, added, start)
            return x, cache.replace(k=past.k, v=past.v)
        each = tuple(Past(k, v, cache.at) for k, v in zip(cache.k, cache.v, strict=True))
        x, past, _ = _unrolled(params, x, cfg, (), sees, added, each)
        return x, cache.replace(k=tuple(p.k for p in past), v=tuple(p.v for p in past))


def looked(params: dict | tuple, tokens: Float[Array, "b m e"], cfg: Config) -> tuple[Any, Any]:
    """The keys and values that every block makes of what it looks at: stacked or tuples, as params are.

    Made once for an answer of any length.
    """
    if isinstance(params, dict):
        return jax.lax.map(lambda p: block.keys(p, tokens, cfg), params)
    made = [block.keys(p, tokens, cfg) for p in params]
    return tuple(k for k, _ in made), tuple(v for _, v in made)


def _refuse_window(cfg: Config, window: Any) -> None:
    if (window is None) != (not cfg.windowed):
        raise InputError("Windowed blocks and window intervals go together; give both or neither.")


def _turns(cfg: Config, position: Any, length: Any) -> tuple[Any, Any]:
    """The angles of all blocks, and of those that are windowed."""
    own = None if cfg.rope is None else rotary.angles(position, cfg.rope, length)
    return own, own if cfg.window_rope is None else rotary.angles(position, cfg.window_rope, length)


def _sees(
    cfg: Config, order: jax.Array, whole: tuple, window: tuple | None, turns: tuple, bias: Any, look: Any
) -> tuple[See, See | None]:
    """What a block is given that is not windowed, and what one is that is."""
    if (cfg.look is None) != (look is None):
        raise InputError("Blocks that look at other tokens and what they look at go together; give both or neither.")
    apart = None if window is None else See(order, *window, turns[1], None, look)
    return See(order, *whole, turns[0], bias, look), apart


def _chosen(sees: tuple[See, See | None], inside: Any) -> See:
    """One of the two; `inside` says whether the block is windowed, and may be traced."""
    whole, window = sees
    if window is None or isinstance(inside, bool):
        return window if window is not None and inside else whole
    turn = whole.turn
    if turn is not window.turn:
        turn = jax.tree.map(lambda w, a: jnp.where(inside, w, a), window.turn, turn)
    lo, hi = (jnp.where(inside, w, a) for w, a in ((window.lo, whole.lo), (window.hi, whole.hi)))
    return whole._replace(lo=lo, hi=hi, turn=turn)


def _dealt_blocks(
    params: Any, x: jax.Array, cfg: Config, taps: tuple[int, ...], places: tuple, relative: Any, look: Look | None
) -> tuple:
    """All blocks, of rows that are dealt meanwhile where keys and values go round the devices."""
    dealt = goes_round(*x.shape[:2], x.shape[1], cfg.kv_heads, 2 * cfg.head * x.dtype.itemsize)
    if dealt:
        x, places = ring.deal((x, places))
    order, lo, hi, position, length, window, added, *bounds = places
    with context("dealt") if dealt else contextlib.nullcontext():
        # Labels are gathered once, not in every block.
        keys = sharding.unsplit(order)
        bias = None if cfg.relative is None else biases.bias(relative, cfg.relative, order, keys)
        look = None if look is None else look._replace(lo=bounds[0], hi=bounds[1])
        sees = _sees(cfg, keys, (lo, hi), window, _turns(cfg, position, length), bias, look)
        run = _scanned if isinstance(params, dict) else _unrolled
        x, _, kept = run(params, sharding.constrain(x, PLACE), cfg, taps, sees, added)
    return (ring.undeal(x), ring.undeal(kept, axis=2)) if dealt else (x, kept)


def _with_room(tree: Any, room: int, fill: int) -> Any:
    """Arrays [B, L, …] with so many places more at the end of every row."""

    def one(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, room)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)

    return jax.tree.map(one, sharding.unsplit(tree))


def _one(params: dict, x: jax.Array, cfg: Config, see: See, past: Past | None = None) -> tuple[jax.Array, Past | None]:
    """A block, computed again in the backward pass as far as cfg.remat says."""
    if cfg.remat == "none" or past is not None:
        return block.apply(params, x, cfg, see, past)
    run = jax.checkpoint(lambda p, x, see: block.apply(p, x, cfg, see)[0], policy=REMAT[cfg.remat], prevent_cse=False)
    return run(params, x, see), None


def _scanned(
    params: dict,
    x: jax.Array,
    cfg: Config,
    taps: tuple[int, ...],
    sees: tuple[See, See | None],
    added: jax.Array | None,
    past: Past | None = None,
) -> tuple[jax.Array, Past | None, jax.Array]:
    """What all blocks put out, the cache, and what the blocks in `taps` put out."""
    own = block.spec(cfg)

    def step(carry: tuple, of: tuple) -> tuple[tuple, None]:
        (x, kept, past), (layer, inside, place, number, looked) = carry, of
        see = _looking(_chosen(sees, inside), looked)
        x, past = _one(gradients_laid(layer, own), x, cfg, see, past)
        past = None if past is None else past.replace(layer=past.layer + 1)
        x = x if added is None else x + _added(added, number).astype(x.dtype)
        # Blocks that nobody asked for write to one more place, past the end.
        kept = None if kept is None else jax.lax.dynamic_update_index_in_dim(kept, x, place, 0)
        return (x, kept, past), None

    inside = jnp.array([i in cfg.windowed for i in range(cfg.layers)]) if cfg.windowed else None
    number = None if added is None else jnp.arange(cfg.layers, dtype=jnp.int32)
    kept = place = None
    if taps:
        place = jnp.array([taps.index(i) if i in taps else len(taps) for i in range(cfg.layers)], jnp.int32)
        kept = jnp.repeat(jnp.zeros_like(x)[None], len(taps) + 1, axis=0)
        kept = sharding.constrain(sharding.vary(kept, x), (None, *PLACE))
    unroll = min(cfg.unroll, cfg.layers)
    look = sees[0].look
    looked = None if look is None or look.k is None else (look.k, look.v)
    of = (params, inside, place, number, looked)
    (x, kept, past), _ = jax.lax.scan(step, (x, kept, past), of, unroll=unroll)
    return x, past, jnp.zeros((0, *x.shape), x.dtype) if kept is None else kept[:-1]


def _looking(see: See, looked: tuple | None) -> See:
    """With a block's own keys and values of what it looks at, where they are known."""
    return see if looked is None else see._replace(look=see.look._replace(k=looked[0], v=looked[1]))


def _added(added: jax.Array, number: jax.Array) -> jax.Array:
    """What is added after the block of this number: nothing after the first T."""
    some = added.shape[2]
    one = jax.lax.dynamic_index_in_dim(added, jnp.minimum(number, some - 1), 2, keepdims=False)
    return jnp.where(number < some, one, jnp.zeros_like(one))


def _unrolled(
    params: tuple,
    x: jax.Array,
    cfg: Config,
    taps: tuple[int, ...],
    sees: tuple[See, See | None],
    added: jax.Array | None,
    past: tuple[Past, ...] | None = None,
) -> tuple[jax.Array, Any, jax.Array]:
    """The same of a tuple of blocks, one after the other."""
    kept, new = [], []
    for i, layer in enumerate(params):
        look = sees[0].look
        looked = None if look is None or look.k is None else (look.k[i], look.v[i])
        see = _looking(_chosen(sees, i in cfg.windowed), looked)
        x, mine = _one(layer, x, cfg, see, None if past is None else past[i])
        x = x if added is None or i >= added.shape[2] else x + added[:, :, i].astype(x.dtype)
        kept += [x] if i in taps else []
        new.append(mine)
    return x, new, jnp.stack(kept) if kept else jnp.zeros((0, *x.shape), x.dtype)
