"""Interval attention as Pallas kernels for TPUs, both ways.

Dao et al. 2022 (FlashAttention, algorithms 1 and 4), laid out for a TPU: scores are [keys, queries], so that what
there is one of per query (interval, maximum, sum, log-sum-exp) lies along the lanes, is reduced over sublanes and is
stored as it is computed. Queries that share a key head go through together: keys are never repeated.

Which blocks of keys a block of queries reaches is data. Labels are reduced to the least and the greatest of every block
first; the kernels get those as scalars ahead of the grid, which is as long as the longest of all blocks of queries
needs. Inside a block of keys, a part that no interval reaches is not computed, and one that all see is not masked.

    queries, 256 (× heads)      a block of keys is fetched once a step, by parts computed:
      ┌──────────┬──────────┐   ▓ computed and masked, █ computed whole, · neither computed nor (where a whole block
    0 │▓ · · ·   │          │   is so) fetched
    1 │█ ▓ · ·   │          │
    2 │· · ▓ ·   │          │   ◂ a second document begins
    …
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mmjax.core import sharding
from mmjax.nn.kernels.inputs import Inputs, Static

LANES = 128
LOG2E = math.log2(math.e)
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
        group, length, keys = _group(x), _up(x.q.shape[3], LANES), _up(x.k.shape[2], LANES)
        query_part, key_part = _divisor(length, max(LANES, min(2 * LANES, 512 // group))), _divisor(keys, 256)
        queries = query_part * _divisor(length // query_part, max(1, 1024 // (group * query_part)))
        size_last = x.k.shape[3] % LANES == 0 and x.v.shape[3] % LANES == 0
        return cls(
            queries, query_part, key_part * _divisor(keys // key_part, 2 if _wide(x) else 4), key_part, size_last
        )


def _group(x: Inputs) -> int:
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


def supports(static: Static, x: Inputs) -> bool:
    """Whether these kernels can compute it, and are worth it: a short row is one tile, which XLA does as well.

    Head sizes up to 256. A bias whose function Pallas can lower for a TPU: arithmetic, comparisons and choices of what
    it is given, not a table that it looks things up in (a sum over `where(bin == n, table[:, n], 0)` does as well).
    """
    return (
        x.q.shape[3] >= LANES
        and x.k.shape[2] >= 2 * LANES
        and max(x.k.shape[3], x.v.shape[3]) <= 2 * LANES
        and (static.bias is None or _lowers(static, x))
    )


def _lowers(static: Static, x: Inputs) -> bool:
    """Whether the bias and its gradient can be part of a kernel: asked by lowering one that has nothing else."""
    heads = max([a.shape[0] for a in jax.tree.leaves(x.bias_params)], default=1)
    params, query, key = (
        jax.tree.map(lambda a: jax.ShapeDtypeStruct((*first, *a.shape[len(first) :]), a.dtype), tree)  # noqa: B023
        for tree, first in ((x.bias_params, (heads,)), (x.bias_query, (1, LANES)), (x.bias_key, (1, LANES)))
    )

    def body(given, out):
        params, query, key = jax.tree.map(lambda ref: ref[...], given)
        bias, back = jax.vjp(lambda p: static.bias(p, query, key), params)
        out["bias"][...] = bias[0, 0].T
        for ref, d in zip(out["params"], jax.tree.leaves(back(bias)), strict=True):
            ref[...] = d

    out = {
        "bias": jax.ShapeDtypeStruct((LANES, LANES), jnp.float32),
        "params": [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in jax.tree.leaves(params)],
    }
    trial = jax.jit(lambda *given: pl.pallas_call(body, out_shape=out)(given))
    try:
        trial.trace(params, query, key).lower(lowering_platforms=("tpu",))
    except Exception:  # whatever Pallas says of what it cannot do
        return False
    return True


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


def _layout(x: Inputs) -> tuple[Inputs, Grid]:
    """The inputs in whole blocks, q as [B, groups, group, L, E]."""
    blocks, group = Blocks.of(x), _group(x)
    x = _padded(x, blocks)
    b, kv, heads, length, _ = x.q.shape
    share = heads // group
    grid = Grid(blocks, b, kv * share, group, share, length // blocks.queries, x.k.shape[2] // blocks.keys)
    sinks = None if x.sinks is None else _grouped(x.sinks, grid, 0)
    return x.replace(q=_grouped(x.q, grid), sinks=sinks), grid


def _grouped(x: jax.Array, g: Grid, axis: int = 1) -> jax.Array:
    """[.., K, G, ..] as [.., groups, group, ..]."""
    return x.reshape(*x.shape[:axis], g.groups, g.group, *x.shape[axis + 2 :])


def _ungrouped(x: jax.Array, g: Grid) -> jax.Array:
    """The way back: [B, groups, group, ..] as [B, K, G, ..]."""
    return x.reshape(x.shape[0], g.groups // g.share, g.group * g.share, *x.shape[3:])


def _arrays(x: Inputs, g: Grid) -> dict:
    """What every kernel reads; what there is one of per position lies along the lanes."""
    arrays = {name: _turned(a, g) for name, a in (("q", x.q), ("k", x.k), ("v", x.v))}
    arrays |= {"lo": x.lo[:, None], "hi": x.hi[:, None], "order": x.order[:, None]}
    if x.key_bias is not None:
        arrays["key_bias"] = x.key_bias.astype(jnp.float32)[:, None] * LOG2E
    for name, tree in (("bias_query", x.bias_query), ("bias_key", x.bias_key)):
        arrays[name] = jax.tree.map(lambda a: a[:, None] if a.ndim == 2 else a, tree)
    arrays["bias_params"] = jax.tree.map(lambda a: _of_groups(a, g), x.bias_params)
    return arrays


def _of_groups(a: jax.Array, g: Grid) -> jax.Array:
    """[H, ...] as [groups, group, ...] or, where there is one number a head, [groups, 1, group]."""
    return a.reshape((g.groups, g.group, *a.shape[1:]) if a.ndim > 1 else (g.groups, 1, g.group))


def _turned(x: jax.Array, g: Grid) -> jax.Array:
    """[.., positions, head size] as the kernels want it, and back. No copy: where lanes would not be full, XLA turns
    what it stores by itself.
    """
    return x if g.blocks.size_last else x.swapaxes(-1, -2)


def _turn(shape: tuple, g: Grid) -> tuple:
    return shape if g.blocks.size_last else (*shape[:-2], shape[-1], shape[-2])


def _specs(arrays: dict, g: Grid, query: Callable, key: Callable) -> dict:
    """How arrays are cut: `query` and `key` give, from the grid's indices, which block of either a step wants."""
    n, m, last = g.blocks.queries, g.blocks.keys, g.blocks.size_last
    by_query = {
        "q": (
            lambda b, h, i: (b, h, 0, i, 0) if last else (b, h, 0, 0, i),
            lambda a: (1, 1, g.group, n, a.shape[-1]) if last else (1, 1, g.group, a.shape[-2], n),
        ),
        "lo": (lambda b, h, i: (b, 0, i), lambda a: (1, 1, n)),
        "lse": (lambda b, h, i: (b, h, 0, i), lambda a: (1, 1, g.group, n)),
    }
    by_key = {
        "k": (
            lambda b, h, j: (b, jax.lax.div(h, g.share), j, 0) if last else (b, jax.lax.div(h, g.share), 0, j),
            lambda a: (1, 1, m, a.shape[-1]) if last else (1, 1, a.shape[-2], m),
        ),
        "d_k": (
            lambda b, h, j: (b, h, j, 0) if last else (b, h, 0, j),
            lambda a: (1, 1, m, a.shape[-1]) if last else (1, 1, a.shape[-2], m),
        ),
        "order": (lambda b, h, j: (b, 0, j), lambda a: (1, 1, m)),
        "d_key_bias": (lambda b, h, j: (b, h, 0, j), lambda a: (1, 1, 8, m)),
    }
    by_query |= {"d_out": by_query["q"], "out": by_query["q"], "d_q": by_query["q"], "hi": by_query["lo"]}
    by_query |= {"delta": by_query["lse"], "bias_query": by_query["lo"]}
    by_key |= {"v": by_key["k"], "d_v": by_key["d_k"], "key_bias": by_key["order"], "bias_key": by_key["order"]}

    def spec(name: str, a: Any) -> pl.BlockSpec:
        if name in ("sinks", "bias_params"):  # [groups, ...]
            return pl.BlockSpec((1, *a.shape[1:]), lambda b, h, *rest: (h,) + (0,) * (a.ndim - 1))
        if name == "d_bias_params":  # [B, groups, ...]
            return pl.BlockSpec((1, 1, *a.shape[2:]), lambda b, h, *rest: (b, h) + (0,) * (a.ndim - 2))
        (place, shape), which = (by_query[name], query) if name in by_query else (by_key[name], key)
        if name in ("bias_query", "bias_key") and a.shape[1] > 1:  # [B, positions, ...]
            size, none = (1, n if which is query else m, *a.shape[2:]), (0,) * (a.ndim - 2)
            return pl.BlockSpec(size, lambda b, h, i, j, *scalars: (b, which(b, i, j, *scalars), *none))
        return pl.BlockSpec(shape(a), lambda b, h, i, j, *scalars: place(b, h, which(b, i, j, *scalars)))

    return {name: jax.tree.map(functools.partial(spec, name), a) for name, a in arrays.items()}


def _call(body: Callable, arrays: dict, out: dict, scratch: list, scalars: dict, g: Grid, over: str, interpret) -> dict:
    """A kernel over (rows, key heads, blocks of queries or keys, what such a block reaches of the others)."""
    begin, end = scalars["begin"], scalars["end"]
    steps = jnp.maximum((end - begin).max(), 1)
    flat = {name: a.reshape(-1) for name, a in scalars.items()}
    mine = g.query_blocks if over == "queries" else g.key_blocks

    def own(b, i, j, s):
        return i

    def other(b, i, j, s):
        # The last one again where there are no more: what is there already is not fetched.
        first, last = s["begin"][b * mine + i], s["end"][b * mine + i]
        return jnp.clip(first + j, 0, jnp.maximum(last - 1, 0))

    query, key = (own, other) if over == "queries" else (other, own)
    specs = _specs(arrays | out, g, query, key)
    return pl.pallas_call(
        functools.partial(body, g),
        out_shape=out,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(g.rows, g.groups, mine, steps),
            in_specs=[{name: specs[name] for name in arrays}],
            out_specs={name: specs[name] for name in out},
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            # Cotangents of a bias's parameters are summed over all blocks of a row's heads.
            dimension_semantics=(
                "parallel",
                "parallel",
                "arbitrary" if "d_bias_params" in out else "parallel",
                "arbitrary",
            )
        ),
        interpret=interpret,
    )(flat, arrays)


def _row(ref: Any, at: Any, g: Grid) -> jax.Array:
    """[1, heads × queries] of a block [1, 1, queries] (alike for all heads) or [1, 1, heads, queries]."""
    if len(ref.shape) == 3:
        return jnp.concatenate([ref[0, :, at]] * g.group, axis=1)
    return jnp.concatenate([ref[0, 0, h : h + 1, at] for h in range(g.group)], axis=1)


def _column(row: jax.Array) -> jax.Array:
    """[1, n] -> [n, 1]."""
    return jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1]


def _heads(ref: Any, at: Any, g: Grid) -> jax.Array:
    """[heads × queries, head size] or [head size, heads × queries] of a block [1, 1, heads, ...]."""
    if g.blocks.size_last:
        return ref[0, 0, :, at, :].reshape(-1, ref.shape[-1])
    return jnp.concatenate([ref[0, 0, h, :, at] for h in range(g.group)], axis=1)


def _put(ref: Any, p: int, x: jax.Array, g: Grid) -> None:
    """The way back of `_heads`, from [head size, heads × queries] of part p of the queries."""
    n = g.blocks.query_part
    for h in range(g.group):
        one, at = x[:, h * n : (h + 1) * n], slice(p * n, (p + 1) * n)
        if g.blocks.size_last:
            ref[0, 0, h, at, :] = one.T.astype(ref.dtype)
        else:
            ref[0, 0, h, :, at] = one.astype(ref.dtype)


def _positions(at: Any, g: Grid) -> Any:
    """An index of these positions in [positions, head size] or the other way round."""
    return (at, slice(None)) if g.blocks.size_last else (slice(None), at)


def _products(a: jax.Array, b: jax.Array, g: Grid) -> jax.Array:
    """[positions of a, positions of b]: sums over the head size."""
    return _dot(a, b, (1, 1) if g.blocks.size_last else (0, 0))


def _over_keys(a: jax.Array, weights: jax.Array, g: Grid) -> jax.Array:
    """[head size, queries]: sums over keys, of a and weights [keys, queries]."""
    return _dot(a, weights.astype(a.dtype), (0 if g.blocks.size_last else 1, 0))


def _over_queries(weights: jax.Array, a: jax.Array, g: Grid) -> jax.Array:
    """[keys, head size], or the other way round: sums over queries, of weights [keys, queries] and a."""
    weights = weights.astype(a.dtype)
    return _dot(weights, a, (1, 0)) if g.blocks.size_last else _dot(a, weights, (1, 1))


def _params(x: dict) -> Any:
    """What the bias's function has of this group of heads."""
    return jax.tree.map(
        lambda ref: ref[0, 0] if len(ref.shape) == 3 and ref.shape[1] == 1 else ref[0], x["bias_params"]
    )


def _at(ref: Any, at: Any) -> jax.Array:
    """[1, positions, ...] of a block [1, 1, positions] or [1, positions, ...]."""
    return ref[0, :, at] if ref.shape[1] == 1 else ref[:, at]


def _bias(static: Static, x: dict, queries: Any, part: dict) -> Callable:
    """The bias [1, heads or 1, queries, keys] of a tile, as a function of its parameters."""
    query = jax.tree.map(lambda ref: _at(ref, queries), x["bias_query"])
    return lambda params: static.bias(params, query, part["bias_key"])


def _scores(static: Static, g: Grid, q: jax.Array, queries: Any, part: dict, x: dict, masked: bool) -> tuple:
    """f32[keys, heads × queries], times log₂ e; and the slope of the soft cap."""
    s, slope = _products(part["k"], q, g), None
    if static.softcap is None:
        s = s * (static.scale * LOG2E)
    else:
        tanh = jnp.tanh(s * (static.scale / static.softcap))
        s, slope = (static.softcap * LOG2E) * tanh, 1.0 - tanh * tanh
    if static.bias is not None:
        bias = _bias(static, x, queries, part)(_params(x))
        s = s + LOG2E * jnp.concatenate(
            [bias[0, h].T for h in range(bias.shape[1])] * (g.group // bias.shape[1]), axis=1
        )
    if "key_bias" in part:
        s = s + _column(part["key_bias"])
    if masked:
        order, lo, hi = _column(part["order"]), _row(x["lo"], queries, g), _row(x["hi"], queries, g)
        s = jnp.where((lo <= order) & (order <= hi), s, -jnp.inf)
    return s, slope


def _dot(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    # A product of bfloat16 is exact in any case, and Mosaic refuses to be asked for more.
    precision = None if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dims = ((axes[:1], axes[1:]), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _tiles(scalars: dict, x: dict, g: Grid, b: Any, i: Any, j: Any, compute: Callable) -> None:
    """compute(part of the queries, their positions, those of keys, the keys, masked) for what is not empty.

    Of row b the tiles of the block of queries i with the block of keys j.
    """
    n, m = g.blocks.query_part, g.blocks.key_part

    def one(p, r):
        q_at, k_at = (b * g.query_blocks + i) * g.query_parts + p, (b * g.key_blocks + j) * g.key_parts + r
        first, last, most, least = (scalars[name][q_at] for name in ("first", "last", "most", "least"))
        low, high, whole = (scalars[name][k_at] for name in ("low", "high", "whole"))
        touched = (first <= high) & (low <= last)
        full = (most <= whole) & (high <= least)
        queries, keys = pl.ds(pl.multiple_of(p * n, n), n), pl.ds(pl.multiple_of(r * m, m), m)

        def run(masked):
            part = {name: x[name][(0, 0, *_positions(keys, g))] for name in ("k", "v")}
            part |= {name: x[name][0, :, keys] for name in ("order", "key_bias") if name in x}
            part["bias_key"] = jax.tree.map(lambda ref: _at(ref, keys), x["bias_key"])
            compute(p, queries, keys, part, masked)

        pl.when(touched & full)(lambda: run(False))
        pl.when(touched & jnp.logical_not(full))(lambda: run(True))

    def row(p, _):
        jax.lax.fori_loop(0, g.key_parts, lambda r, _: one(p, r), None)

    jax.lax.fori_loop(0, g.query_parts, row, None)


def _forward_kernel(static: Static, g: Grid, scalars: dict, x: dict, out: dict, acc: Any, top: Any, total: Any) -> None:
    b, i, j, last = pl.program_id(0), pl.program_id(2), pl.program_id(3), pl.num_programs(3) - 1
    at = b * g.query_blocks + i
    block = scalars["begin"][at] + j

    @pl.when(j == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)
        # A finite floor: a query that sees nothing gets exp(-inf) = 0 and no NaN.
        top[...] = jnp.full_like(top, -1e30)
        total[...] = jnp.zeros_like(total)
        if "sinks" in x:
            top[...] = jnp.maximum(top[...], x["sinks"][...])
            total[...] = jnp.exp2(x["sinks"][...] - top[...])

    def compute(p, queries, keys, part, masked):
        s, _ = _scores(static, g, _heads(x["q"], queries, g), queries, part, x, masked)
        new = jnp.maximum(top[p], s.max(0, keepdims=True))
        shrink, weights = jnp.exp2(top[p] - new), jnp.exp2(s - new)
        total[p] = shrink * total[p] + weights.sum(0, keepdims=True)
        acc[p] = shrink * acc[p] + _over_keys(part["v"], weights, g)
        top[p] = new

    @pl.when(block < scalars["end"][at])
    def _():
        _tiles(scalars, x, g, b, i, block, compute)

    @pl.when(j == last)
    def _():
        n = g.blocks.query_part
        for p in range(g.query_parts):
            some = total[p] > 0
            safe = jnp.where(some, total[p], 1.0)
            _put(out["out"], p, acc[p] / safe, g)
            lse = jnp.where(some, (top[p] + jnp.log2(safe)) / LOG2E, -jnp.inf)
            for h in range(g.group):
                out["lse"][0, 0, h : h + 1, p * n : (p + 1) * n] = lse[:, h * n : (h + 1) * n]


def forward(static: Static, x: Inputs, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """(out [B, K, G, L, Ev] in v's dtype, log-sum-exp f32[B, K, G, L])."""
    x = sharding.vary(x)
    length = x.q.shape[3]
    x, g = _layout(x)
    of, touch = ranges(x, g)
    of |= _span(touch)
    arrays = _arrays(x, g)
    if x.sinks is not None:
        arrays["sinks"] = jnp.repeat(x.sinks.astype(jnp.float32) * LOG2E, g.blocks.query_part, axis=1)[:, None]
    shape = (*x.q.shape[:4], x.v.shape[-1])
    out = {"out": _like(_turn(shape, g), x.v.dtype, x.q), "lse": _like(shape[:4], jnp.float32, x.q)}
    stat = pltpu.VMEM((g.query_parts, 1, g.lanes), jnp.float32)
    scratch = [pltpu.VMEM((g.query_parts, shape[-1], g.lanes), jnp.float32), stat, stat]
    got = _call(functools.partial(_forward_kernel, static), arrays, out, scratch, of, g, "queries", interpret)
    out, lse = _turned(got["out"], g)[:, :, :, :length], got["lse"][..., :length]
    return _ungrouped(out, g), _ungrouped(lse, g)


def _span(touch: jax.Array) -> dict:
    """For every block of the second axis's kind the first of the third's that it touches, and one past the last."""
    at = jnp.arange(touch.shape[2], dtype=jnp.int32)[None, None]
    begin = jnp.where(touch, at, touch.shape[2] - 1).min(-1)
    return {"begin": begin, "end": jnp.where(touch, at + 1, 0).max(-1)}


def _like(shape: tuple, dtype: Any, x: jax.Array) -> jax.ShapeDtypeStruct:
    kind = jax.typeof(x)
    if hasattr(kind, "manual_axis_type"):
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind.manual_axis_type)
    return jax.ShapeDtypeStruct(shape, dtype, vma=kind.vma)  # before jax 0.11 or so


def _gradients(static: Static, g: Grid, q: jax.Array, d_out: jax.Array, at: Any, part: dict, x: dict, masked) -> tuple:
    """Of a tile: the weights, and the derivatives of the scores before and after the soft cap and the scale."""
    s, slope = _scores(static, g, q, at, part, x, masked)
    p = jnp.exp2(s - _row(x["lse"], at, g))
    d_s = p * (_products(part["v"], d_out, g) - _row(x["delta"], at, g))
    return p, d_s, (d_s if slope is None else d_s * slope) * static.scale


def _query_kernel(static: Static, g: Grid, scalars: dict, x: dict, out: dict, acc: Any) -> None:
    b, i, j, last = pl.program_id(0), pl.program_id(2), pl.program_id(3), pl.num_programs(3) - 1
    at = b * g.query_blocks + i
    block = scalars["begin"][at] + j

    @pl.when(j == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)

    def compute(p, queries, keys, part, masked):
        q, d_out = _heads(x["q"], queries, g), _heads(x["d_out"], queries, g)
        acc[p] += _over_keys(part["k"], _gradients(static, g, q, d_out, queries, part, x, masked)[2], g)

    @pl.when(block < scalars["end"][at])
    def _():
        _tiles(scalars, x, g, b, i, block, compute)

    @pl.when(j == last)
    def _():
        for p in range(g.query_parts):
            _put(out["d_q"], p, acc[p], g)


def _key_kernel(static: Static, g: Grid, scalars: dict, x: dict, out: dict, d_k: Any, d_v: Any, d_bias: Any) -> None:
    b, i, j, last = pl.program_id(0), pl.program_id(2), pl.program_id(3), pl.num_programs(3) - 1
    at = b * g.key_blocks + i
    block = scalars["begin"][at] + j

    @pl.when(j == 0)
    def _():
        for sums in (d_k, d_v, d_bias):
            sums[...] = jnp.zeros_like(sums)

    @pl.when((i == 0) & (j == 0))
    def _():
        for sums in jax.tree.leaves(out["d_bias_params"]):
            sums[...] = jnp.zeros_like(sums)

    def compute(_, queries, keys, part, masked):
        q, d_out, place = _heads(x["q"], queries, g), _heads(x["d_out"], queries, g), _positions(keys, g)
        p, d_score, d_s = _gradients(static, g, q, d_out, queries, part, x, masked)
        d_v[place] += _over_queries(p, d_out, g)
        d_k[place] += _over_queries(d_s, q, g)
        if "key_bias" in x:
            # A sum over the queries that comes out along the lanes: a product with ones.
            ones = jnp.ones((8, d_score.shape[1]), jnp.float32)
            d_bias[:, keys] += jax.lax.dot_general(
                ones, d_score, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST
            )

        if jax.tree.leaves(x["bias_params"]):
            bias, back = jax.vjp(_bias(static, x, queries, part), _params(x))
            n = g.blocks.query_part
            each = [d_score[:, h * n : (h + 1) * n].T for h in range(g.group)]
            d_bias_tile = sum(each)[None, None] if bias.shape[1] == 1 else jnp.stack(each)[None]
            for ref, d in zip(jax.tree.leaves(out["d_bias_params"]), jax.tree.leaves(back(d_bias_tile)), strict=True):
                ref[...] += d.reshape(ref.shape)

    @pl.when(block < scalars["end"][at])
    def _():
        _tiles(scalars, x, g, b, block, i, compute)

    @pl.when(j == last)
    def _():
        out["d_k"][0, 0], out["d_v"][0, 0] = d_k[...].astype(out["d_k"].dtype), d_v[...].astype(out["d_v"].dtype)
        if "key_bias" in x:
            out["d_key_bias"][0, 0] = d_bias[...]


def backward(
    static: Static,
    x: Inputs,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    d_lse: jax.Array,
    interpret: bool = False,
) -> Inputs:
    """Cotangents of the inputs (None for labels and what the bias reads)."""
    primal = x
    x, out, lse, d_out, d_lse = sharding.vary((x, out, lse, d_out, d_lse))
    length, keys = x.q.shape[3], x.k.shape[2]
    # Where nothing is seen, lse is -inf whatever the inputs are: its cotangent ends there.
    alive = jnp.isfinite(lse)
    lse = jnp.where(alive, lse, 0.0)
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - jnp.where(alive, d_lse, 0.0)
    d_sinks = None
    if x.sinks is not None:
        p = jnp.where(alive, jnp.exp(x.sinks.astype(jnp.float32)[None, :, :, None] - lse), 0.0)
        d_sinks = -(p * delta).sum((0, 3))

    x, g = _layout(x)
    of, touch = ranges(x, g)
    more = x.q.shape[3] - length
    pad = lambda a: jnp.pad(a, [(0, 0)] * 3 + [(0, more)] + [(0, 0)] * (a.ndim - 4)) if more else a  # noqa: E731
    arrays = _arrays(x, g) | {
        "d_out": _turned(_grouped(pad(d_out), g), g),
        "lse": _grouped(pad(lse) * LOG2E, g),
        "delta": _grouped(pad(delta), g),
    }
    m = g.blocks.keys
    size, v_size = x.k.shape[3], x.v.shape[3]
    d_q = _call(
        functools.partial(_query_kernel, static),
        arrays,
        {"d_q": _like(_turn(x.q.shape, g), x.q.dtype, x.q)},
        [pltpu.VMEM((g.query_parts, size, g.lanes), jnp.float32)],
        of | _span(touch),
        g,
        "queries",
        interpret,
    )["d_q"]
    # Where several groups share keys, their sums are added here, in float32.
    of_keys = (("d_k", x.k), ("d_v", x.v))
    wanted = {
        name: _like(_turn((g.rows, g.groups, *a.shape[2:]), g), a.dtype if g.share == 1 else jnp.dtype("float32"), x.q)
        for name, a in of_keys
    }
    wanted["d_bias_params"] = jax.tree.map(
        lambda a: _like((g.rows, *_of_groups(a, g).shape), jnp.float32, x.q), x.bias_params
    )
    if x.key_bias is not None:
        wanted["d_key_bias"] = _like((g.rows, g.groups, 8, x.k.shape[2]), jnp.float32, x.q)
    shapes = (_turn((m, size), g), _turn((m, v_size), g), (8, m))
    sums = [pltpu.VMEM(shape, jnp.float32) for shape in shapes]
    got = _call(
        functools.partial(_key_kernel, static),
        arrays,
        wanted,
        sums,
        of | _span(touch.swapaxes(1, 2)),
        g,
        "keys",
        interpret,
    )
    d_key_bias = got["d_key_bias"][:, :, 0, :keys].sum(1) if x.key_bias is not None else None
    found = Inputs(
        _ungrouped(_turned(d_q, g)[:, :, :, :length], g),
        *(
            _turned(got[name], g)[:, :, :keys].reshape(g.rows, -1, g.share, keys, a.shape[3]).sum(2)
            for name, a in of_keys
        ),
        None,
        None,
        None,
        d_key_bias,
        d_sinks,
        jax.tree.map(lambda d, a: d.sum(0).reshape(a.shape), got["d_bias_params"], x.bias_params),
        None,
        None,
    )
    return jax.tree.map(
        lambda d, a: None if d is None else sharding.unvary(d, a).astype(a.dtype),
        found,
        primal,
        is_leaf=lambda d: d is None,
    )
