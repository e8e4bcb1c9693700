"""Transformer blocks with cross-attention layers between them (nn.cross_attention.Config says where)."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmjax.core.errors import InputError
from mmjax.core.spec import gradients_laid
from mmjax.nn import cross_attention, transformer
from mmjax.nn.cache import KVCache, Past


class Look(NamedTuple):
    """What the cross-attention layers are given."""

    media: Any  # [B, M, E]; None: nothing (new) to look at
    order: Any  # i32[B, M], labels of the keys, which are the cache's where there is one
    lo: Any  # i32[B, L]
    hi: Any


def apply(
    blocks: Any,
    layers: Any,
    x: jax.Array,
    cfg: transformer.Config,
    cross: cross_attention.Config,
    see: dict,
    look: Look,
    cache: KVCache | None = None,
) -> tuple[jax.Array, KVCache | None]:
    """All blocks and layers in turn, and the cache with what is new in it, where there is one.

    Args:
      blocks, layers: their parameters: both stacked, or both tuples (nn.transformer.unstack).
      x: [B, L, D].
      cfg, cross: their configs.
      see, look: what blocks and layers are given (nn.transformer, nn.cross_attention).
      cache: for inference; `cache.media` is that of the layers.

    Raises:
      InputError: something is to be added after the blocks.
    """
    if see["added"] is not None:
        raise InputError("Nothing can be added after the blocks of a decoder that looks at media by cross-attention.")
    at = cross.places(cfg.layers)
    if not isinstance(blocks, dict) or not _even(cfg, at):
        return _unrolled(blocks, layers, x, cfg, cross, see, look, cache)
    every = cfg.layers // len(at)
    parts = ((0, at[0]), (at[0], every))

    def group(carry: tuple, of: tuple) -> tuple[tuple, None]:
        (x, cache), (layer, blocks, number) = carry, of
        for i, (start, stop) in enumerate(parts):
            some = jax.tree.map(lambda p, start=start, stop=stop: p[start:stop], blocks)
            first = number * every + start
            x, cache = _blocks(some, x, _part(cfg, start, stop), see, cache, first)
            if i == 0:
                x, cache = _layer(layer, x, cfg, cross, look, cache, number)
        return (x, cache), None

    blocks = jax.tree.map(lambda p: p.reshape(-1, every, *p.shape[1:]), blocks)
    carry, _ = jax.lax.scan(group, (x, cache), (layers, blocks, jnp.arange(len(at), dtype=jnp.int32)))
    return carry


def _unrolled(
    blocks: Any,
    layers: Any,
    x: jax.Array,
    cfg: transformer.Config,
    cross: cross_attention.Config,
    see: dict,
    look: Look,
    cache: KVCache | None,
) -> tuple[jax.Array, KVCache | None]:
    """One layer after the other, and the blocks between two of them as they are: stacked, or a tuple."""
    at = cross.places(cfg.layers)
    start = 0
    for i, stop in enumerate((*at, cfg.layers)):
        some = blocks[start:stop] if isinstance(blocks, tuple) else jax.tree.map(lambda p: p[start:stop], blocks)  # noqa: B023
        x, cache = _blocks(some, x, _part(cfg, start, stop), see, cache, start)
        if i < len(at):
            layer = layers[i] if isinstance(layers, tuple) else jax.tree.map(lambda p: p[i], layers)  # noqa: B023
            x, cache = _layer(layer, x, cfg, cross, look, cache, i)
        start = stop
    return x, cache


def _even(cfg: transformer.Config, at: tuple[int, ...]) -> bool:
    """Whether the blocks fall into equal groups, each with one layer in it at the same place."""
    every = cfg.layers // len(at)
    groups = {_part(cfg, start, start + every) for start in range(0, cfg.layers, every)} if every else set()
    return len(groups) == 1 and at[0] <= every and at == tuple(range(at[0], at[0] + cfg.layers, every))


def _part(cfg: transformer.Config, start: int, stop: int) -> transformer.Config:
    """The config of some of the blocks."""
    windowed = tuple(i - start for i in cfg.windowed if start <= i < stop)
    return replace(cfg, layers=stop - start, windowed=windowed, window_rope=cfg.window_rope if windowed else None)


def _blocks(
    params: Any, x: jax.Array, cfg: transformer.Config, see: dict, cache: KVCache | None, first: Any
) -> tuple[jax.Array, KVCache | None]:
    """Some of the blocks; `first` is the number of their first."""
    if not cfg.layers:
        return x, cache
    see = see if cfg.windowed else see | {"window": None}
    if cache is None:
        return transformer.apply(params, x, cfg, **see), None
    if isinstance(params, dict):
        return transformer.apply_cached(params, x, cfg, cache, first=jnp.asarray(first, jnp.int32), **see)
    some = slice(first, first + cfg.layers)
    x, new = transformer.apply_cached(params, x, cfg, cache.replace(k=cache.k[some], v=cache.v[some]), **see)
    k, v = (old[:first] + mine + old[some.stop :] for old, mine in ((cache.k, new.k), (cache.v, new.v)))
    return x, cache.replace(k=k, v=v)


def _layer(
    params: dict,
    x: jax.Array,
    cfg: transformer.Config,
    cross: cross_attention.Config,
    look: Look,
    cache: KVCache | None,
    number: Any,
) -> tuple[jax.Array, KVCache | None]:
    """One cross-attention layer, computed again in the backward pass as far as the blocks are."""
    see = {"order": look.order, "lo": look.lo, "hi": look.hi}
    if cache is None:
        params = gradients_laid(params, cross_attention.spec(cross))

        def run(params: dict, x: jax.Array, media: Any, see: dict) -> jax.Array:
            return cross_attention.apply(params, x, media, cross, **see)

        if cfg.remat != "none":
            run = jax.checkpoint(run, policy=transformer.REMAT[cfg.remat], prevent_cse=False)
        return run(params, x, look.media, see), None
    held = cache.media
    if isinstance(held.k, tuple):
        x, past = cross_attention.cached(
            params, x, look.media, cross, Past(held.k[number], held.v[number], held.at), **see
        )
        k, v = ((*old[:number], new, *old[number + 1 :]) for old, new in ((held.k, past.k), (held.v, past.v)))
        return x, cache.replace(media=held.replace(k=k, v=v))
    past = Past(held.k, held.v, held.at, jnp.asarray(number, jnp.int32))
    x, past = cross_attention.cached(params, x, look.media, cross, past, **see)
    return x, cache.replace(media=held.replace(k=past.k, v=past.v))
