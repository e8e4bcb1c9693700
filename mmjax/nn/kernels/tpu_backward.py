"""The backward pass of the TPU kernels: one kernel for queries, one for keys and values."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mmjax.core import sharding
from mmjax.nn.kernels import cotangents
from mmjax.nn.kernels.inputs import Inputs, Static
from mmjax.nn.kernels.tpu_blocks import Grid, grouped, layout, of_groups, ranges, span, turn, turned, ungrouped
from mmjax.nn.kernels.tpu_tiles import (
    LOG2E,
    arrays_of,
    bias_of,
    bias_params,
    call,
    heads,
    over_keys,
    over_queries,
    positions,
    products,
    put,
    row,
    scores,
    tiles,
)


def _gradients(static: Static, g: Grid, q: jax.Array, d_out: jax.Array, at: Any, part: dict, x: dict, masked) -> tuple:
    """Of a tile: the weights, and the derivatives of the scores before and after the soft cap and the scale."""
    s, slope = scores(static, g, q, at, part, x, masked)
    p = jnp.exp2(s - row(x["lse"], at, g))
    d_s = p * (products(part["v"], d_out, g) - row(x["delta"], at, g))
    return p, d_s, (d_s if slope is None else d_s * slope) * static.scale


def _query_kernel(static: Static, g: Grid, scalars: dict, x: dict, out: dict, acc: Any) -> None:
    b, i, j, last = pl.program_id(0), pl.program_id(2), pl.program_id(3), pl.num_programs(3) - 1
    at = b * g.query_blocks + i
    block = scalars["begin"][at] + j

    @pl.when(j == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)

    def compute(p, queries, keys, part, masked):
        q, d_out = heads(x["q"], queries, g), heads(x["d_out"], queries, g)
        acc[p] += over_keys(part["k"], _gradients(static, g, q, d_out, queries, part, x, masked)[2], g)

    @pl.when(block < scalars["end"][at])
    def _():
        tiles(scalars, x, g, b, i, block, compute)

    @pl.when(j == last)
    def _():
        for p in range(g.query_parts):
            put(out["d_q"], p, acc[p], g)


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
        q, d_out, place = heads(x["q"], queries, g), heads(x["d_out"], queries, g), positions(keys, g)
        p, d_score, d_s = _gradients(static, g, q, d_out, queries, part, x, masked)
        d_v[place] += over_queries(p, d_out, g)
        d_k[place] += over_queries(d_s, q, g)
        if "key_bias" in x:
            # A sum over the queries that comes out along the lanes: a product with ones.
            ones = jnp.ones((8, d_score.shape[1]), jnp.float32)
            d_bias[:, keys] += jax.lax.dot_general(
                ones, d_score, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST
            )

        if jax.tree.leaves(x["bias_params"]):
            bias, back = jax.vjp(bias_of(static, x, queries, part), bias_params(x, g))
            n = g.blocks.query_part
            each = [d_score[:, h * n : (h + 1) * n].T for h in range(g.group)]
            d_bias_tile = sum(each)[None, None] if bias.shape[1] == 1 else jnp.stack(each)[None]
            for ref, d in zip(jax.tree.leaves(out["d_bias_params"]), jax.tree.leaves(back(d_bias_tile)), strict=True):
                ref[...] += d.reshape(ref.shape)

    @pl.when(block < scalars["end"][at])
    def _():
        tiles(scalars, x, g, b, block, i, compute)

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
    """Cotangents of the inputs, in their dtypes or wide (None for labels and what the bias reads)."""
    primal = x
    x, out, lse, d_out, d_lse = sharding.vary((x, out, lse, d_out, d_lse))
    length, keys = x.q.shape[3], x.k.shape[2]
    results = out, lse, d_out, d_lse
    delta, lse = cotangents.delta(*results), jnp.where(jnp.isfinite(lse), lse, 0.0)
    d_sinks = None if x.sinks is None else cotangents.of_sinks(x.sinks, *results)
    x, g = layout(x)
    of, touch = ranges(x, g)
    more = x.q.shape[3] - length
    pad = lambda a: jnp.pad(a, [(0, 0)] * 3 + [(0, more)] + [(0, 0)] * (a.ndim - 4)) if more else a  # noqa: E731
    arrays = arrays_of(x, g) | {
        "d_out": turned(grouped(pad(d_out), g), g),
        "lse": grouped(pad(lse) * LOG2E, g),
        "delta": grouped(pad(delta), g),
    }
    m, kind = g.blocks.keys, jnp.dtype("float32") if static.wide else None
    size, v_size = x.k.shape[3], x.v.shape[3]
    d_q = call(
        functools.partial(_query_kernel, static),
        arrays,
        {"d_q": sharding.shaped(turn(x.q.shape, g), kind or x.q.dtype, x.q)},
        [pltpu.VMEM((g.query_parts, size, g.lanes), jnp.float32)],
        of | span(touch),
        g,
        "queries",
        interpret,
    )["d_q"]
    # Where several groups share keys, their sums are added here, in float32.
    kind, of_keys = jnp.dtype("float32") if static.wide or g.share > 1 else None, (("d_k", x.k), ("d_v", x.v))
    wanted = {
        name: sharding.shaped(turn((g.rows, g.groups, *a.shape[2:]), g), kind or a.dtype, x.q) for name, a in of_keys
    }
    wanted["d_bias_params"] = jax.tree.map(
        lambda a: sharding.shaped((g.rows, *of_groups(a, g).shape), jnp.float32, x.q), x.bias_params
    )
    if x.key_bias is not None:
        wanted["d_key_bias"] = sharding.shaped((g.rows, g.groups, 8, x.k.shape[2]), jnp.float32, x.q)
    shapes = (turn((m, size), g), turn((m, v_size), g), (8, m))
    sums = [pltpu.VMEM(shape, jnp.float32) for shape in shapes]
    got = call(
        functools.partial(_key_kernel, static),
        arrays,
        wanted,
        sums,
        of | span(touch.swapaxes(1, 2)),
        g,
        "keys",
        interpret,
    )
    d_key_bias = got["d_key_bias"][:, :, 0, :keys].sum(1) if x.key_bias is not None else None
    found = Inputs(
        ungrouped(turned(d_q, g)[:, :, :, :length], g),
        *(
            turned(got[name], g)[:, :, :keys].reshape(g.rows, -1, g.share, keys, a.shape[3]).sum(2)
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
    return cotangents.settled(static, found, primal)
