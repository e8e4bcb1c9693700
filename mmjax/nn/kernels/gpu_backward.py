"""The backward pass of nn.kernels.gpu: one kernel by blocks of queries, one by blocks of keys; both compute the scores
again from the saved log-sum-exp."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from mmjax.nn.kernels import cotangents
from mmjax.nn.kernels import gpu_tiles as tiles
from mmjax.nn.kernels.gpu_blocks import LOG2E, Blocks, Plan, Shape, padded
from mmjax.nn.kernels.inputs import Inputs, Static

PROGRAMS = 264  # what keeps a large GPU busy: two for each of 132 multiprocessors


def _by_query(s: Shape, given: dict, d_q_ref: Any) -> None:
    at_q = (s.query_blocks - 1 - pl.program_id(0)) * s.queries
    q = tiles.read(given["q"], (slice(None),), s.size, s.length, s.width, at_q, s.queries)
    d_out = tiles.read(given["d_out"], (slice(None),), s.size_v, s.length, s.width_v, at_q, s.queries)
    lo, hi, lse, delta = (
        tiles.vector(given[name].at[:], at_q, s.queries, s.length, fill)
        for name, fill in (("lo", 0), ("hi", -1), ("lse", 0.0), ("delta", 0.0))
    )
    bounds = tiles.reach(tiles.of_queries(lo, hi), tiles.vectors(given, tiles.KEYS, s.key_blocks))
    lo, hi, lse, delta = (a[:, None] for a in (lo, hi, lse, delta))

    def step(hidden: bool, j: jax.Array, d_q: tuple) -> tuple:
        at = j * s.keys
        rows = pl.ds(at, s.keys)
        order = tiles.vector(given["order"].at[rows], at, s.keys, s.length_k, -1) if hidden else None
        bias = (
            tiles.vector(given["key_bias"].at[rows], at, s.keys, s.length_k, 0.0)[None] if "key_bias" in given else None
        )
        k = tiles.read(given["k"], (rows,), s.size, s.length_k, s.width, at, s.keys)
        v = tiles.read(given["v"], (rows,), s.size_v, s.length_k, s.width_v, at, s.keys)
        scores, slope = tiles.score(s, tiles.product(q, k), bias)
        p = jnp.exp2(scores * s.unit - lse)
        if hidden:
            p = jnp.where(tiles.seen(order[None], lo, hi), p, 0.0)
        d_s = p * (tiles.product(d_out, v) - delta)
        return tiles.add_product(d_q, d_s if slope is None else d_s * slope, k)

    zeros = tuple(jnp.zeros((s.queries, n), jnp.float32) for _, n in s.size)
    d_q = tiles.loop(bounds, step, zeros)
    tiles.write(d_q_ref, s.size, tuple(d * s.scale for d in d_q), s.length, s.width, at_q)


def _by_key(s: Shape, given: dict, d_k_ref: Any, d_v_ref: Any, d_bias_ref: Any = None) -> None:
    """Scores the other way round, [keys, queries]: no product needs a transposed left side."""
    at_k = pl.program_id(0) * s.keys
    k = tiles.read(given["k"], (slice(None),), s.size, s.length_k, s.width, at_k, s.keys)
    v = tiles.read(given["v"], (slice(None),), s.size_v, s.length_k, s.width_v, at_k, s.keys)
    order = tiles.vector(given["order"].at[:], at_k, s.keys, s.length_k, -1)
    bounds = tiles.reach(tiles.vectors(given, tiles.QUERIES, s.query_blocks), tiles.of_keys(order))
    order = order[:, None]
    bias = (
        tiles.vector(given["key_bias"].at[:], at_k, s.keys, s.length_k, 0.0)[:, None] if "key_bias" in given else None
    )

    def step(head: tuple, hidden: bool, i: jax.Array, carry: tuple) -> tuple:
        d_k, d_v, d_bias = carry
        at = i * s.queries
        rows = pl.ds(at, s.queries)
        q = tiles.read(given["q"], (rows, *head), s.size, s.length, s.width, at, s.queries)
        d_out = tiles.read(given["d_out"], (rows, *head), s.size_v, s.length, s.width_v, at, s.queries)

        def of(name: str, where: tuple, fill: Any) -> jax.Array:
            return tiles.vector(given[name].at[where], at, s.queries, s.length, fill)[None]

        lo, hi = (of("lo", (rows,), 0), of("hi", (rows,), -1)) if hidden else (None, None)
        lse, delta = of("lse", (*head, rows), 0.0), of("delta", (*head, rows), 0.0)
        scores, slope = tiles.score(s, tiles.product(k, q), bias)
        p = jnp.exp2(scores * s.unit - lse)
        if hidden:
            p = jnp.where(tiles.seen(order, lo, hi), p, 0.0)
        d_v = tiles.add_product(d_v, p, d_out)
        d_s = p * (tiles.product(v, d_out) - delta)
        if d_bias is not None:
            d_bias = d_bias + d_s.sum(1)
        d_k = tiles.add_product(d_k, d_s if slope is None else d_s * slope, q)
        return d_k, d_v, d_bias

    def of_head(*head_carry: Any) -> tuple:
        *head, carry = head_carry
        return tiles.loop(bounds, lambda *args: step(tuple(head), *args), carry)

    zeros = lambda parts: tuple(jnp.zeros((s.keys, n), jnp.float32) for _, n in parts)  # noqa: E731
    carry = zeros(s.size), zeros(s.size_v), None if d_bias_ref is None else jnp.zeros((s.keys,), jnp.float32)
    d_k, d_v, d_bias = of_head(carry) if s.group == 1 else jax.lax.fori_loop(0, s.group, of_head, carry)
    tiles.write(d_k_ref, s.size, tuple(d * s.scale for d in d_k), s.length_k, s.width, at_k)
    tiles.write(d_v_ref, s.size_v, d_v, s.length_k, s.width_v, at_k)
    if d_bias_ref is not None:
        tiles.save(d_bias_ref, d_bias, at_k, s.length_k)


def backward(
    static: Static,
    x: Inputs,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    d_lse: jax.Array,
    *,
    plan: Plan | None = None,
    interpret: bool = False,
) -> Inputs:
    """Cotangents of the inputs, in their dtypes or wide (None for labels); see nn.kernels.xla."""
    primal = x
    results = out, lse, d_out, d_lse
    delta, lse = cotangents.delta(*results), jnp.where(jnp.isfinite(lse), lse, 0.0) * LOG2E
    d_sinks = None if x.sinks is None else cotangents.of_sinks(x.sinks, *results)
    d_out = d_out.astype(x.v.dtype)
    if tiles.folds(x):
        x = tiles.fold(x)
        d_out, lse, delta = (a.reshape(*a.shape[:2], 1, -1, *a.shape[4:]) for a in (d_out, lse, delta))
    plan = plan or Plan.of(x)
    rest = {"d_out": d_out, "lse": lse, "delta": delta}
    d_q = _d_queries(static, x, rest, plan.by_query, interpret).reshape(primal.q.shape)
    d_k, d_v, d_key_bias = _d_keys(static, x, rest, plan.by_key, interpret)
    found = Inputs(d_q, d_k, d_v, None, None, None, d_key_bias, d_sinks, None, None, None)
    return cotangents.settled(static, found, primal)


def _given(x: Inputs, s: Shape, rest: dict, by_key: bool) -> dict[str, jax.Array]:
    d_out = rest["d_out"].transpose(0, 3, 1, 2, 4)
    return tiles.arrays(x) | tiles.of_blocks(x, s, by_key) | rest | {"d_out": d_out}


def _d_queries(static: Static, x: Inputs, rest: dict, blocks: Blocks, interpret: bool) -> jax.Array:
    s = Shape.of(static, x, blocks)
    given = _given(x, s, rest, by_key=False)
    specs = tiles.by_query(s)
    b, kv = x.k.shape[:2]
    grid = (s.query_blocks, kv * s.group, b)
    out = [(given["q"].shape, jnp.float32 if static.wide else x.q.dtype, specs["q"])]
    return tiles.call(_by_query, s, grid, blocks, given, specs, out, interpret)[0].transpose(0, 2, 3, 1, 4)


def _d_keys(
    static: Static, x: Inputs, rest: dict, blocks: Blocks, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    b, kv, group = x.q.shape[:3]
    s = Shape.of(static, x, blocks)
    # Few keys' heads and short rows would leave most of a GPU idle: their queries' heads are then taken apart.
    parts = next(
        n for n in range(1, group + 1) if group % n == 0 and (n == group or n * b * kv * s.key_blocks >= PROGRAMS)
    )
    given = _given(x, s, rest, by_key=True)
    heads = (kv * parts, group // parts)
    given |= {name: a.reshape(*a.shape[:2], *heads, a.shape[-1]) for name in ("q", "d_out") for a in (given[name],)}
    given |= {name: a.reshape(b, *heads, a.shape[-1]) for name in ("lse", "delta") for a in (given[name],)}
    s = replace(s, group=group // parts)
    specs = _key_specs(s, parts)
    kind = jnp.float32 if static.wide or parts > 1 else x.k.dtype
    out = [
        ((b, s.length_k, kv * parts, width), kind, _of_key(s, padded(size)))
        for width, size in ((s.width, s.size), (s.width_v, s.size_v))
    ]
    if x.key_bias is not None:
        spec = pl.BlockSpec((None, None, s.keys), lambda j, h, b: (b, h, j))
        out.append(((b, kv * parts, s.length_k), jnp.float32, spec))
    grid = (s.key_blocks, kv * parts, b)
    d_k, d_v, *d_bias = tiles.call(_by_key, s, grid, blocks, given, specs, out, interpret)
    if parts > 1:
        d_k, d_v = (d.reshape(*d.shape[:2], kv, parts, -1).sum(3) for d in (d_k, d_v))
    return d_k.swapaxes(1, 2), d_v.swapaxes(1, 2), d_bias[0].sum(1) if d_bias else None


def _of_key(s: Shape, width: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, s.keys, None, width), lambda j, h, b: (b, j, h, 0))


def _key_specs(s: Shape, parts: int) -> dict[str, pl.BlockSpec]:
    """What a program of a block of keys reads, on a grid (blocks, heads of keys × parts, rows)."""
    rows = s.query_blocks * s.queries
    of_key = lambda n: pl.BlockSpec(  # noqa: E731
        (None, s.keys, None, n), lambda j, h, b: (b, j, jax.lax.div(h, parts), 0)
    )
    group = None if s.group == 1 else s.group
    of_query = lambda n: pl.BlockSpec((None, rows, None, group, n), lambda j, h, b: (b, 0, h, 0, 0))  # noqa: E731
    per_head = pl.BlockSpec((None, None, group, rows), lambda j, h, b: (b, h, 0, 0))
    per_query = pl.BlockSpec((None, rows), lambda j, h, b: (b, 0))
    per_key = pl.BlockSpec((None, s.keys), lambda j, h, b: (b, j))
    return {
        "q": of_query(padded(s.size)),
        "d_out": of_query(padded(s.size_v)),
        "k": of_key(padded(s.size)),
        "v": of_key(padded(s.size_v)),
        "order": per_key,
        "key_bias": per_key,
        "lo": per_query,
        "hi": per_query,
        **dict.fromkeys(tiles.QUERIES, pl.BlockSpec((None, tiles.blocks_read(s.query_blocks)), lambda j, h, b: (b, 0))),
        "lse": per_head,
        "delta": per_head,
    }
