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
    """In positions: queries of a block (of every head that shares keys), keys fetched, keys computed at a time."""

    queries: int
    keys: int
    part: int
    size_last: bool  # arrays [.., positions, head size]; else [.., head size, positions]: lanes full at any head size

    @classmethod
    def of(cls, x: Inputs) -> "Blocks":
        group, length, keys = x.q.shape[2], _up(x.q.shape[3], LANES), _up(x.k.shape[2], LANES)
        wide = x.k.dtype.itemsize * max(x.k.shape[3], x.v.shape[3]) > 512
        part = _divisor(keys, 256)
        queries = _divisor(length, max(LANES, 1024 // group))
        size_last = x.k.shape[3] % LANES == 0 and x.v.shape[3] % LANES == 0
        return cls(queries, part * _divisor(keys // part, 2 if wide else 4), part, size_last)


def _up(n: int, of: int) -> int:
    return -(-n // of) * of


def _divisor(n: int, most: int) -> int:
    """The greatest power of two up to `most` that divides n."""
    return math.gcd(n, 1 << (most.bit_length() - 1))


def supports(static: Static, x: Inputs) -> bool:
    """Whether these kernels can compute it, and are worth it: a short row is one tile, which XLA does as well."""
    return static.bias is None and x.q.shape[3] >= LANES and x.k.shape[2] >= 2 * LANES


@dataclass(frozen=True)
class Grid:
    """Blocks, how many of each, and what the kernels read as scalars (i32, flat over rows and blocks)."""

    blocks: Blocks
    rows: int
    kv_heads: int
    group: int
    query_blocks: int
    key_blocks: int

    @property
    def parts(self) -> int:
        return self.blocks.keys // self.blocks.part


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
    )


def ranges(x: Inputs, g: Grid) -> tuple[dict, jax.Array]:
    """What is known of every block before it is read, and which blocks of keys and of queries reach each other.

    Returns:
      by block of queries the least `lo`, greatest `hi`, greatest `lo` and least `hi`; by part of the keys the least
      label, the greatest, and the least with -1 for an empty slot. Then bool[B, query blocks, key blocks]: a part of
      the block of keys is touched.
    """
    lo, hi = (a.reshape(g.rows, g.query_blocks, -1) for a in (x.lo, x.hi))
    order = x.order.reshape(g.rows, g.key_blocks * g.parts, -1)
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
    return of, touch.reshape(g.rows, g.query_blocks, g.key_blocks, g.parts).any(-1)


def _layout(x: Inputs) -> tuple[Inputs, Grid]:
    blocks = Blocks.of(x)
    padded = _padded(x, blocks)
    b, kv, group, length, _ = padded.q.shape
    return padded, Grid(blocks, b, kv, group, length // blocks.queries, padded.k.shape[2] // blocks.keys)


def _arrays(static: Static, x: Inputs, g: Grid) -> dict:
    """What every kernel reads; what there is one of per position lies along the lanes."""
    arrays = {name: _turned(a, g) for name, a in (("q", x.q), ("k", x.k), ("v", x.v))}
    arrays |= {"lo": x.lo[:, None], "hi": x.hi[:, None], "order": x.order[:, None]}
    if x.key_bias is not None:
        arrays["key_bias"] = x.key_bias.astype(jnp.float32)[:, None] * LOG2E
    return arrays


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
            lambda b, h, j: (b, h, j, 0) if last else (b, h, 0, j),
            lambda a: (1, 1, m, a.shape[-1]) if last else (1, 1, a.shape[-2], m),
        ),
        "order": (lambda b, h, j: (b, 0, j), lambda a: (1, 1, m)),
        "d_key_bias": (lambda b, h, j: (b, h, 0, j), lambda a: (1, 1, 8, m)),
    }
    by_query |= {"d_out": by_query["q"], "out": by_query["q"], "d_q": by_query["q"], "hi": by_query["lo"]}
    by_query |= {"delta": by_query["lse"]}
    by_key |= {"v": by_key["k"], "d_k": by_key["k"], "d_v": by_key["k"], "key_bias": by_key["order"]}

    def spec(name: str, a: Any) -> pl.BlockSpec:
        if name == "sinks":
            return pl.BlockSpec((1, 1, a.shape[-1]), lambda b, h, *rest: (h, 0, 0))
        (place, shape), which = (by_query[name], query) if name in by_query else (by_key[name], key)
        return pl.BlockSpec(shape(a), lambda b, h, i, j, *scalars: place(b, h, which(b, i, j, *scalars)))

    return {name: spec(name, a) for name, a in arrays.items()}


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
            grid=(g.rows, g.kv_heads, mine, steps),
            in_specs=[{name: specs[name] for name in arrays}],
            out_specs={name: specs[name] for name in out},
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        interpret=interpret,
    )(flat, arrays)


def _row(ref: Any, g: Grid) -> jax.Array:
    """[1, heads × queries] of a block [1, 1, queries] (alike for all heads) or [1, 1, heads, queries]."""
    if len(ref.shape) == 3:
        return jnp.concatenate([ref[0]] * g.group, axis=1)
    return jnp.concatenate([ref[0, 0, h : h + 1, :] for h in range(g.group)], axis=1)


def _column(row: jax.Array) -> jax.Array:
    """[1, n] -> [n, 1]."""
    return jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1]


def _heads(ref: Any, g: Grid) -> jax.Array:
    """[heads × queries, head size] or [head size, heads × queries] of a block [1, 1, heads, ...]."""
    if g.blocks.size_last:
        return ref[0, 0].reshape(-1, ref.shape[-1])
    return jnp.concatenate([ref[0, 0, h] for h in range(g.group)], axis=1)


def _put(ref: Any, x: jax.Array, g: Grid) -> None:
    """The way back of `_heads`, from [head size, heads × queries]."""
    if g.blocks.size_last:
        ref[0, 0] = x.T.astype(ref.dtype).reshape(ref.shape[2:])
        return
    for h in range(g.group):
        ref[0, 0, h] = x[:, h * g.blocks.queries : (h + 1) * g.blocks.queries].astype(ref.dtype)


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


def _scores(static: Static, g: Grid, q: jax.Array, part: dict, lo: jax.Array, hi: jax.Array, masked: bool) -> tuple:
    """f32[keys, heads × queries], times log₂ e; and the slope of the soft cap."""
    s, slope = _products(part["k"], q, g), None
    if static.softcap is None:
        s = s * (static.scale * LOG2E)
    else:
        tanh = jnp.tanh(s * (static.scale / static.softcap))
        s, slope = (static.softcap * LOG2E) * tanh, 1.0 - tanh * tanh
    if "key_bias" in part:
        s = s + _column(part["key_bias"])
    if masked:
        order = _column(part["order"])
        s = jnp.where((lo <= order) & (order <= hi), s, -jnp.inf)
    return s, slope


def _dot(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    dims = ((axes[:1], axes[1:]), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _tiles(scalars: dict, x: dict, g: Grid, b: Any, i: Any, j: Any, compute: Callable) -> None:
    """compute(at, part, masked) for every part of the block of keys j that the block of queries i of row b reaches."""
    n = g.blocks.part

    def one(p, _):
        q_at, k_at = b * g.query_blocks + i, (b * g.key_blocks + j) * g.parts + p
        first, last, most, least = (scalars[name][q_at] for name in ("first", "last", "most", "least"))
        low, high, whole = (scalars[name][k_at] for name in ("low", "high", "whole"))
        touched = (first <= high) & (low <= last)
        full = (most <= whole) & (high <= least)
        at = pl.ds(pl.multiple_of(p * n, n), n)

        def run(masked):
            part = {name: x[name][(0, 0, *_positions(at, g))] for name in ("k", "v")}
            part |= {name: x[name][0, :, at] for name in ("order", "key_bias") if name in x}
            compute(at, part, masked)

        pl.when(touched & full)(lambda: run(False))
        pl.when(touched & jnp.logical_not(full))(lambda: run(True))

    jax.lax.fori_loop(0, g.parts, one, None)


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
            top[...] = jnp.maximum(top[...], x["sinks"][0])
            total[...] = jnp.exp2(x["sinks"][0] - top[...])

    def compute(_, part, masked):
        s, _ = _scores(static, g, _heads(x["q"], g), part, _row(x["lo"], g), _row(x["hi"], g), masked)
        new = jnp.maximum(top[...], s.max(0, keepdims=True))
        shrink, p = jnp.exp2(top[...] - new), jnp.exp2(s - new)
        total[...] = shrink * total[...] + p.sum(0, keepdims=True)
        acc[...] = shrink * acc[...] + _over_keys(part["v"], p, g)
        top[...] = new

    @pl.when(block < scalars["end"][at])
    def _():
        _tiles(scalars, x, g, b, i, block, compute)

    @pl.when(j == last)
    def _():
        some = total[...] > 0
        safe = jnp.where(some, total[...], 1.0)
        _put(out["out"], acc[...] / safe, g)
        lse = jnp.where(some, (top[...] + jnp.log2(safe)) / LOG2E, -jnp.inf)
        for h in range(g.group):
            out["lse"][0, 0, h : h + 1, :] = lse[:, h * g.blocks.queries : (h + 1) * g.blocks.queries]


def forward(static: Static, x: Inputs, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """(out [B, K, G, L, Ev] in v's dtype, log-sum-exp f32[B, K, G, L])."""
    x = sharding.vary(x)
    length = x.q.shape[3]
    x, g = _layout(x)
    of, touch = ranges(x, g)
    of |= _span(touch)
    arrays, n = _arrays(static, x, g), g.blocks.queries
    if x.sinks is not None:
        arrays["sinks"] = jnp.repeat(x.sinks.astype(jnp.float32) * LOG2E, n, axis=1)[:, None]
    shape = (*x.q.shape[:4], x.v.shape[-1])
    out = {"out": _like(_turn(shape, g), x.v.dtype, x.q), "lse": _like(shape[:4], jnp.float32, x.q)}
    stat = pltpu.VMEM((1, g.group * n), jnp.float32)
    scratch = [pltpu.VMEM((shape[-1], g.group * n), jnp.float32), stat, stat]
    got = _call(functools.partial(_forward_kernel, static), arrays, out, scratch, of, g, "queries", interpret)
    return _turned(got["out"], g)[:, :, :, :length], got["lse"][..., :length]


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


def _gradients(static: Static, g: Grid, q: jax.Array, d_out: jax.Array, part: dict, x: dict, masked: bool) -> tuple:
    """Of a tile: the weights, and the derivatives of the scores before and after the soft cap and the scale."""
    s, slope = _scores(static, g, q, part, _row(x["lo"], g), _row(x["hi"], g), masked)
    p = jnp.exp2(s - _row(x["lse"], g))
    d_s = p * (_products(part["v"], d_out, g) - _row(x["delta"], g))
    return p, d_s, (d_s if slope is None else d_s * slope) * static.scale


def _query_kernel(static: Static, g: Grid, scalars: dict, x: dict, out: dict, acc: Any) -> None:
    b, i, j, last = pl.program_id(0), pl.program_id(2), pl.program_id(3), pl.num_programs(3) - 1
    at = b * g.query_blocks + i
    block = scalars["begin"][at] + j

    @pl.when(j == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)

    def compute(_, part, masked):
        _, _, d_s = _gradients(static, g, _heads(x["q"], g), _heads(x["d_out"], g), part, x, masked)
        acc[...] += _over_keys(part["k"], d_s, g)

    @pl.when(block < scalars["end"][at])
    def _():
        _tiles(scalars, x, g, b, i, block, compute)

    @pl.when(j == last)
    def _():
        _put(out["d_q"], acc[...], g)


def _key_kernel(static: Static, g: Grid, scalars: dict, x: dict, out: dict, d_k: Any, d_v: Any, d_bias: Any) -> None:
    b, i, j, last = pl.program_id(0), pl.program_id(2), pl.program_id(3), pl.num_programs(3) - 1
    at = b * g.key_blocks + i
    block = scalars["begin"][at] + j

    @pl.when(j == 0)
    def _():
        for sums in (d_k, d_v, d_bias):
            sums[...] = jnp.zeros_like(sums)

    def compute(at, part, masked):
        q, d_out, place = _heads(x["q"], g), _heads(x["d_out"], g), _positions(at, g)
        p, d_score, d_s = _gradients(static, g, q, d_out, part, x, masked)
        d_v[place] += _over_queries(p, d_out, g)
        d_k[place] += _over_queries(d_s, q, g)
        if "key_bias" in x:
            # A sum over the queries that comes out along the lanes: a product with ones.
            ones = jnp.ones((8, d_score.shape[1]), jnp.float32)
            d_bias[:, at] += jax.lax.dot_general(
                ones, d_score, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST
            )

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
    """Cotangents of the inputs (None for labels)."""
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
    arrays = _arrays(static, x, g) | {"d_out": _turned(pad(d_out), g), "lse": pad(lse) * LOG2E, "delta": pad(delta)}
    n, m = g.group * g.blocks.queries, g.blocks.keys
    size, v_size = x.k.shape[3], x.v.shape[3]
    d_q = _call(
        functools.partial(_query_kernel, static),
        arrays,
        {"d_q": _like(_turn(x.q.shape, g), x.q.dtype, x.q)},
        [pltpu.VMEM((size, n), jnp.float32)],
        of | _span(touch),
        g,
        "queries",
        interpret,
    )["d_q"]
    wanted = {name: _like(_turn(a.shape, g), a.dtype, x.q) for name, a in (("d_k", x.k), ("d_v", x.v))}
    if x.key_bias is not None:
        wanted["d_key_bias"] = _like((g.rows, g.kv_heads, 8, x.k.shape[2]), jnp.float32, x.q)
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
        _turned(d_q, g)[:, :, :, :length],
        _turned(got["d_k"], g)[:, :, :keys],
        _turned(got["d_v"], g)[:, :, :keys],
        None,
        None,
        None,
        d_key_bias,
        d_sinks,
        None,
        None,
        None,
    )
    return jax.tree.map(
        lambda d, a: None if d is None else sharding.unvary(d, a).astype(a.dtype),
        found,
        primal,
        is_leaf=lambda d: d is None,
    )
