"""Interval attention in plain XLA: a tile of scores (a block of queries × a block of keys) at a time, both ways.

Dao et al. 2022 (FlashAttention, algorithms 1 and 4) with one change: for every block of queries only the tiles between
the first and the last that one of its intervals touches are computed, in a loop whose bounds are data. The backward
pass computes the scores again from the saved log-sum-exp, so memory is O(L + S). A tile that nothing sees adds exact
zeros: how rows are grouped never changes a row's numbers.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from mmjax.core import sharding
from mmjax.nn.kernels import cotangents
from mmjax.nn.kernels.inputs import Inputs, Static

QUERIES, KEYS = 256, 256  # a tile
SCORES = 2**21  # float32 scores alive at a time; where one row has fewer, several rows go together


@dataclass(frozen=True)
class Tiling:
    """How many tiles, of what size, and how many rows go together."""

    rows: int
    queries: int
    keys: int
    query_blocks: int
    key_blocks: int

    @classmethod
    def of(cls, x: Inputs) -> "Tiling":
        b, kv, group, length, _ = x.q.shape
        s = x.k.shape[2]
        nq, nk = -(-length // QUERIES), -(-s // KEYS)
        bq, bk = -(-length // nq), -(-s // nk)
        rows = max(n for n in range(1, b + 1) if b % n == 0 and (n == 1 or n * kv * group * bq * bk <= SCORES))
        return cls(rows, bq, bk, nq, nk)


def _cut(x: jax.Array, rows: int, axis: int, count: int, size: int, fill=0) -> jax.Array:
    """[B, …, length, …] -> [B / rows, count, rows, …, size, …]: padded and cut into blocks along `axis`."""
    pad = count * size - x.shape[axis]
    if pad:
        x = jnp.pad(x, [(0, pad if i == axis else 0) for i in range(x.ndim)], constant_values=fill)
    x = x.reshape(-1, rows, *x.shape[1:axis], count, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis + 1, 1)


def _join(x: jax.Array, axis: int, length: int) -> jax.Array:
    """The way back of _cut."""
    x = jnp.moveaxis(x, 1, axis + 1)
    x = x.reshape(-1, *x.shape[2 : axis + 1], x.shape[axis + 1] * x.shape[axis + 2], *x.shape[axis + 3 :])
    return jax.lax.slice_in_dim(x, 0, length, axis=axis)


def _tiles(x: Inputs, t: Tiling) -> tuple[dict, dict, jax.Array, jax.Array]:
    """Query blocks, key blocks, and for every query block the first key block it reaches and one past the last."""
    cut_q = functools.partial(_cut, rows=t.rows, count=t.query_blocks, size=t.queries)
    cut_k = functools.partial(_cut, rows=t.rows, count=t.key_blocks, size=t.keys)
    query = {
        "q": cut_q(x.q, axis=3),
        "lo": cut_q(x.lo, axis=1),
        "hi": cut_q(x.hi, axis=1, fill=-1),
        "bias": jax.tree.map(lambda a: cut_q(a, axis=1), x.bias_query),
    }
    key = {
        "k": cut_k(x.k, axis=2),
        "v": cut_k(x.v, axis=2),
        "order": cut_k(x.order, axis=1, fill=-1),
        "key_bias": None if x.key_bias is None else cut_k(x.key_bias.astype(jnp.float32), axis=1),
        "bias": jax.tree.map(lambda a: cut_k(a, axis=1), x.bias_key),
    }
    big = jnp.iinfo(jnp.int32).max
    order, some = key["order"], query["lo"] <= query["hi"]
    low = jnp.where(order >= 0, order, big).min((-2, -1))  # [B / rows, key blocks]
    high = order.max((-2, -1))
    first = jnp.where(some, query["lo"], big).min((-2, -1))  # [B / rows, query blocks]
    last = jnp.where(some, query["hi"], -1).max((-2, -1))
    touch = (first[:, :, None] <= high[:, None, :]) & (low[:, None, :] <= last[:, :, None])
    at = jnp.arange(t.key_blocks, dtype=jnp.int32)[None, None]
    start = jnp.where(touch, at, t.key_blocks).min(-1)
    stop = jnp.where(touch, at + 1, 0).max(-1)
    return query, key, start, stop


def _score(static: Static, params, query: dict, key: dict) -> tuple[jax.Array, jax.Array | None]:
    """Scores f32[rows, K, G, queries, keys] of a tile, -inf where not seen, and the derivative of the soft cap."""
    q, k = query["q"], key["k"]
    if q.dtype.itemsize < 4:
        # Groups and queries as one axis: XLA of jax 0.7 has no product of bfloat16 with two on CPUs.
        s = _dot("rkme,rkse->rkms", q.reshape(*q.shape[:2], -1, q.shape[-1]), k).reshape(*q.shape[:-1], -1)
    else:
        s = _dot("rkgqe,rkse->rkgqs", q, k)
    s = s * static.scale
    slope = None
    if static.softcap is not None:
        tanh = jnp.tanh(s / static.softcap)
        s, slope = static.softcap * tanh, 1.0 - tanh * tanh
    if static.bias is not None:
        more = static.bias(params, query["bias"], key["bias"])
        rows, kv, group = s.shape[:3]
        s = s + (more[:, :, None] if more.shape[1] == 1 else more.reshape(rows, kv, group, *more.shape[2:]))
    if key["key_bias"] is not None:
        s = s + key["key_bias"][:, None, None, None, :]
    order = key["order"][:, None, :]
    seen = (query["lo"][:, :, None] <= order) & (order <= query["hi"][:, :, None])
    return jnp.where(seen[:, None, None], s, -jnp.inf), slope


def _at(blocks: dict, j: Any) -> dict:
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, j, keepdims=False), blocks)


def at_once(static: Static, x: Inputs) -> tuple[jax.Array, jax.Array]:
    """The same as `forward` with all scores at once: for a few queries, as those of the next token, over a cache.

    There are no sinks.
    """
    rows, kv, group, length, size = x.q.shape
    # Groups and queries as one axis: XLA of jax 0.7 has no product of bfloat16 with two on CPUs.
    lo, hi = (jnp.tile(a, (1, group)) for a in (x.lo, x.hi))
    query = {"q": x.q.reshape(rows, kv, 1, group * length, size), "lo": lo, "hi": hi, "bias": None}
    key = {"k": x.k, "order": x.order, "key_bias": x.key_bias, "bias": None}
    s, _ = _score(replace(static, bias=None), None, query, key)
    s = s[:, :, 0]
    if static.bias is not None:
        more = static.bias(x.bias_params, x.bias_query, x.bias_key)
        more = jnp.broadcast_to(more, (rows, kv * group, *more.shape[2:]))
        s = s + more.reshape(s.shape)
    most = s.max(-1, keepdims=True)
    weight = jnp.exp(s - jnp.where(jnp.isfinite(most), most, 0.0))
    total = weight.sum(-1, keepdims=True)
    out = _dot("rkms,rksf->rkmf", weight.astype(x.v.dtype), x.v) / jnp.where(total > 0, total, 1.0)
    shape = (rows, kv, group, length)
    return out.astype(x.v.dtype).reshape(*shape, -1), (most + jnp.log(total)).reshape(shape)


def forward(static: Static, x: Inputs) -> tuple[jax.Array, jax.Array]:
    """(out [B, K, G, L, Ev] in v's dtype, or wide; log-sum-exp f32[B, K, G, L])."""
    x = sharding.vary(x)
    kind = jnp.float32 if static.wide else x.v.dtype
    t = Tiling.of(x)
    query, key, start, stop = _tiles(x, t)

    def block(mine, key, first, last):
        def step(j, carry):
            out, total, top = carry
            theirs = _at(key, j)
            s, _ = _score(static, x.bias_params, mine, theirs)
            new = jnp.maximum(top, s.max(-1))
            shrink, p = jnp.exp(top - new), jnp.exp(s - new[..., None])
            more = _dot("rkgqs,rkse->rkgqe", p.astype(x.v.dtype), theirs["v"])
            return shrink[..., None] * out + more, shrink * total + p.sum(-1), new

        shape = mine["q"].shape[:-1]
        # A finite floor: a query that sees nothing gets exp(-inf) = 0 and no NaN.
        top, total = jnp.full(shape, -1e30, jnp.float32), jnp.zeros(shape, jnp.float32)
        if x.sinks is not None:
            sinks = x.sinks.astype(jnp.float32)[None, :, :, None]
            top = jnp.maximum(top, sinks)
            total = jnp.exp(sinks - top)
        carry = sharding.vary((jnp.zeros((*shape, x.v.shape[-1]), jnp.float32), total, top), x)
        out, total, top = _loop(t, first, last, step, carry)
        some = total > 0
        safe = jnp.where(some, total, 1.0)
        return (out / safe[..., None]).astype(kind), jnp.where(some, top + jnp.log(safe), -jnp.inf)

    def rows(of):
        query, key, start, stop = of
        return _map(lambda one: block(one[0], key, *one[1:]), (query, start, stop))

    out, lse = _map(rows, (query, key, start, stop))
    return _join(out, 3, x.q.shape[3]), _join(lse, 3, x.q.shape[3])


def _dot(formula: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(formula, a, b, preferred_element_type=jnp.float32)


def _loop(t: Tiling, first: jax.Array, last: jax.Array, step: Callable, carry: Any) -> Any:
    """Over the key blocks first … last - 1, or straight down where there is one."""
    return step(0, carry) if t.key_blocks == 1 else jax.lax.fori_loop(first, last, step, carry)


def _map(f: Callable, xs: Any) -> Any:
    """lax.map, without a loop where there is one turn."""
    if jax.tree.leaves(xs)[0].shape[0] == 1:
        return jax.tree.map(lambda a: a[None], f(jax.tree.map(lambda a: a[0], xs)))
    return jax.lax.map(f, xs)


def backward(static: Static, x: Inputs, out: jax.Array, lse: jax.Array, d_out: jax.Array, d_lse: jax.Array) -> Inputs:
    """Cotangents of the inputs, in their dtypes or wide (None for labels and what the bias reads)."""
    primal = x
    x, out, lse, d_out, d_lse = sharding.vary((x, out, lse, d_out, d_lse))
    t = Tiling.of(x)
    query, key, start, stop = _tiles(x, t)
    results = out, lse, d_out, d_lse
    delta, lse = cotangents.delta(*results), jnp.where(jnp.isfinite(lse), lse, 0.0)
    cut = functools.partial(_cut, rows=t.rows, axis=3, count=t.query_blocks, size=t.queries)
    query |= {"d_out": cut(d_out), "lse": cut(lse), "delta": cut(delta)}

    def step(j, carry, mine, key):
        d_q, sums, d_params = carry
        theirs = _at(key, j)
        s, slope = _score(static, x.bias_params, mine, theirs)
        p = jnp.exp(s - mine["lse"][..., None])
        more = {"v": _dot("rkgqs,rkgqe->rkse", p.astype(x.v.dtype), mine["d_out"])}
        d_s = p * (_dot("rkgqe,rkse->rkgqs", mine["d_out"], theirs["v"]) - mine["delta"][..., None])
        if x.key_bias is not None:
            more["key_bias"] = d_s.sum((1, 2, 3))
        if x.bias_params is not None:
            d_params = jax.tree.map(jnp.add, d_params, _bias_params(static, x.bias_params, mine, theirs, d_s))
        if slope is not None:
            d_s = d_s * slope
        d_s = (d_s * static.scale).astype(x.k.dtype)
        d_q = d_q + _dot("rkgqs,rkse->rkgqe", d_s, theirs["k"])
        more["k"] = _dot("rkgqs,rkgqe->rkse", d_s, mine["q"])
        return d_q, jax.tree.map(lambda a, m: a.at[j].add(m), sums, more), d_params

    def rows(of):
        query, key, start, stop = of
        which = ["k", "v"] + (["key_bias"] if x.key_bias is not None else [])
        sums = {name: jnp.zeros(key[name].shape, jnp.float32) for name in which}
        d_params = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), x.bias_params)

        def block(carry, one):
            mine, first, last = one
            carry = sharding.vary((jnp.zeros(mine["q"].shape, jnp.float32), *carry), x)
            d_q, *carry = _loop(t, first, last, functools.partial(step, mine=mine, key=key), carry)
            return tuple(carry), d_q.astype(jnp.float32 if static.wide else x.q.dtype)

        carry, d_q = _scan(block, sharding.vary((sums, d_params), x), (query, start, stop))
        return d_q, *carry

    d_q, sums, d_params = _map(rows, (query, key, start, stop))
    length, s = x.q.shape[3], x.k.shape[2]
    d_sinks = None if x.sinks is None else cotangents.of_sinks(x.sinks, *results)
    d_key_bias = None if x.key_bias is None else _join(sums["key_bias"], 1, s)
    d_k, d_v = _join(sums["k"], 2, s), _join(sums["v"], 2, s)
    d_params = jax.tree.map(lambda a: a.sum(0), d_params)
    found = Inputs(_join(d_q, 3, length), d_k, d_v, None, None, None, d_key_bias, d_sinks, d_params, None, None)
    return cotangents.settled(static, found, primal)


def _bias_params(static: Static, params: Any, mine: dict, theirs: dict, d_s: jax.Array) -> Any:
    """What a tile adds to the cotangent of the bias's parameters."""
    bias, back = jax.vjp(lambda p: static.bias(p, mine["bias"], theirs["bias"]), params)
    d_s = d_s.reshape(d_s.shape[0], -1, *d_s.shape[3:])
    return back(d_s.sum(1, keepdims=True) if bias.shape[1] == 1 else d_s)[0]


def _scan(f: Callable, carry: Any, xs: Any) -> tuple[Any, Any]:
    """lax.scan, without a loop where there is one turn."""
    if jax.tree.leaves(xs)[0].shape[0] > 1:
        return jax.lax.scan(f, carry, xs)
    carry, y = f(carry, jax.tree.map(lambda a: a[0], xs))
    return carry, jax.tree.map(lambda a: a[None], y)


def received(static: Static, x: Inputs, lse: jax.Array, weight: jax.Array) -> jax.Array:
    """Weighted attention mass of every key, f32[B, K, G, S]; `weight` f32[B, L] is how much each query counts."""
    x, lse, weight = sharding.vary((x, lse, weight))
    t = Tiling.of(x)
    query, key, start, stop = _tiles(x, t)
    cut = functools.partial(_cut, rows=t.rows, count=t.query_blocks, size=t.queries)
    alive = jnp.isfinite(lse)
    counts = jnp.where(alive, weight[:, None, None, :], 0.0)
    query |= {"lse": cut(jnp.where(alive, lse, 0.0), axis=3), "count": cut(counts, axis=3)}

    def rows(of):
        query, key, start, stop = of

        def block(mass, one):
            mine, first, last = one

            def step(j, mass):
                s, _ = _score(static, x.bias_params, mine, _at(key, j))
                return mass.at[j].add(_dot("rkgq,rkgqs->rkgs", mine["count"], jnp.exp(s - mine["lse"][..., None])))

            return _loop(t, first, last, step, mass), None

        shape = (t.key_blocks, *x.q.shape[1:3], t.keys)
        zeros = jnp.zeros((shape[0], t.rows, *shape[1:]), jnp.float32)
        return _scan(block, sharding.vary(zeros, x), (query, start, stop))[0]

    return _join(_map(rows, (query, key, start, stop)), 3, x.k.shape[2])
