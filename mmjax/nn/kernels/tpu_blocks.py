"""How interval attention is cut for a TPU: blocks that are fetched, tiles that are computed, and what reaches what."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mmjax.nn.kernels.inputs import Inputs

LANES = 128
BIG = 2**31 - 1


@dataclass(frozen=True)
class Blocks:
    """How many positions are fetched, and how many (and of queries those of every head that shares keys) are a tile.

    What is fetched is large, because keys are read again for every block of queries (a TPU v6e computes 560 products in
    the time of a byte); what is computed is small, because what a tile's edges add to the work inside the intervals
    grows with its size.
    """

    queries: int
    query_part: int
    keys: int
    key_part: int
    size_last: bool  # arrays [.., positions, head size]; else [.., head size, positions]: lanes full at any head size

    @classmethod
    def of(cls, x: Inputs) -> "Blocks":
        group, length, keys = group_of(x), _up(x.q.shape[3], LANES), _up(x.k.shape[2], LANES)
        query_part, key_part = _divisor(length, max(LANES, min(2 * LANES, 512 // group))), _divisor(keys, 256)
        queries = query_part * _divisor(length // query_part, max(1, 1024 // (group * query_part)))
        size_last = x.k.shape[3] % LANES == 0 and x.v.shape[3] % LANES == 0
        return cls(
            queries, query_part, key_part * _divisor(keys // key_part, 2 if _wide(x) else 4), key_part, size_last
        )


def group_of(x: Inputs) -> int:
    """How many heads that share keys go through together: all, or as many of them as on-chip memory has room for."""
    return max(n for n in range(1, 5 if _wide(x) else 9) if x.q.shape[2] % n == 0)


def _wide(x: Inputs) -> bool:
    """Whether a position takes more than 512 bytes."""
    return x.k.dtype.itemsize * max(x.k.shape[3], x.v.shape[3]) > 512


def _up(n: int, of: int) -> int:
    return -(-n // of) * of


def _divisor(n: int, most: int) -> int:
    """The greatest power of two up to `most` that divides n."""
    return math.gcd(n, 1 << (most.bit_length() - 1))


@dataclass(frozen=True)
class Grid:
    """Blocks, how many of each, and what the kernels read as scalars (i32, flat over rows and blocks)."""

    blocks: Blocks
    rows: int
    groups: int  # of query heads, `group` in each; `share` of them read the same keys
    group: int
    share: int
    query_blocks: int
    key_blocks: int
    flat: tuple[bool, ...]  # of the bias's parameters, which are one number a head

    @property
    def query_parts(self) -> int:
        return self.blocks.queries // self.blocks.query_part

    @property
    def key_parts(self) -> int:
        return self.blocks.keys // self.blocks.key_part

    @property
    def lanes(self) -> int:
        """Of a tile: its queries, of every head that shares keys."""
        return self.group * self.blocks.query_part


def _padded(x: Inputs, blocks: Blocks) -> Inputs:
    """Whole blocks: what is added has no label and sees nothing. A row of whole blocks is not copied."""
    more_q, more_k = -x.q.shape[3] % blocks.queries, -x.k.shape[2] % blocks.keys

    def pad(a: Any, axis: int, more: int, fill: int = 0) -> Any:
        if a is None or not more:
            return a
        return jnp.pad(a, [(0, more if i == axis else 0) for i in range(a.ndim)], constant_values=fill)

    return x.replace(
        q=pad(x.q, 3, more_q),
        k=pad(x.k, 2, more_k),
        v=pad(x.v, 2, more_k),
        order=pad(x.order, 1, more_k, -1),
        lo=pad(x.lo, 1, more_q),
        hi=pad(x.hi, 1, more_q, -1),
        key_bias=pad(x.key_bias, 1, more_k),
        bias_query=jax.tree.map(lambda a: pad(a, 1, more_q), x.bias_query),
        bias_key=jax.tree.map(lambda a: pad(a, 1, more_k), x.bias_key),
    )


def ranges(x: Inputs, g: Grid) -> tuple[dict, jax.Array]:
    """What is known of every tile before it is read, and which blocks of keys and of queries reach each other.

    Returns:
      by part of the queries the least `lo`, greatest `hi`, greatest `lo` and least `hi`; by part of the keys the least
      label, the greatest, and the least with -1 for an empty slot. Then bool[B, query blocks, key blocks]: a part of
      one reaches a part of the other.
    """
    lo, hi = (a.reshape(g.rows, g.query_blocks * g.query_parts, -1) for a in (x.lo, x.hi))
    order = x.order.reshape(g.rows, g.key_blocks * g.key_parts, -1)
    some = lo <= hi
    of = {
        "first": jnp.where(some, lo, BIG).min(-1),
        "last": jnp.where(some, hi, -1).max(-1),
        "most": jnp.where(some, lo, BIG).max(-1),
        "least": jnp.where(some, hi, -1).min(-1),
        "low": jnp.where(order >= 0, order, BIG).min(-1),
        "high": order.max(-1),
        "whole": order.min(-1),
    }
    touch = (of["first"][:, :, None] <= of["high"][:, None]) & (of["low"][:, None] <= of["last"][:, :, None])
    return of, touch.reshape(g.rows, g.query_blocks, g.query_parts, g.key_blocks, g.key_parts).any((2, 4))


def layout(x: Inputs) -> tuple[Inputs, Grid]:
    """The inputs in whole blocks, q as [B, groups, group, L, E]."""
    blocks, group = Blocks.of(x), group_of(x)
    x = _padded(x, blocks)
    b, kv, heads, length, _ = x.q.shape
    share, flat = heads // group, tuple(a.ndim == 1 for a in jax.tree.leaves(x.bias_params))
    grid = Grid(blocks, b, kv * share, group, share, length // blocks.queries, x.k.shape[2] // blocks.keys, flat)
    sinks = None if x.sinks is None else grouped(x.sinks, grid, 0)
    return x.replace(q=grouped(x.q, grid), sinks=sinks), grid


def grouped(x: jax.Array, g: Grid, axis: int = 1) -> jax.Array:
    """[.., K, G, ..] as [.., groups, group, ..]."""
    return x.reshape(*x.shape[:axis], g.groups, g.group, *x.shape[axis + 2 :])


def ungrouped(x: jax.Array, g: Grid) -> jax.Array:
    """The way back: [B, groups, group, ..] as [B, K, G, ..]."""
    return x.reshape(x.shape[0], g.groups // g.share, g.group * g.share, *x.shape[3:])


def of_groups(a: jax.Array, g: Grid) -> jax.Array:
    """[H, ...] as [groups, group, ...] or, where there is one number a head, [groups, 1, group]."""
    return a.reshape((g.groups, g.group, *a.shape[1:]) if a.ndim > 1 else (g.groups, 1, g.group))


def turned(x: jax.Array, g: Grid) -> jax.Array:
    """[.., positions, head size] as the kernels want it, and back. No copy: where lanes would not be full, XLA turns
    what it stores by itself.
    """
    return x if g.blocks.size_last else x.swapaxes(-1, -2)


def turn(shape: tuple, g: Grid) -> tuple:
    return shape if g.blocks.size_last else (*shape[:-2], shape[-1], shape[-2])


def span(touch: jax.Array) -> dict:
    """For every block of the second axis's kind the first of the third's that it touches, and one past the last."""
    at = jnp.arange(touch.shape[2], dtype=jnp.int32)[None, None]
    begin = jnp.where(touch, at, touch.shape[2] - 1).min(-1)
    return {"begin": begin, "end": jnp.where(touch, at + 1, 0).max(-1)}
