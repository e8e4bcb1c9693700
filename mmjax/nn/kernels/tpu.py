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

import concurrent.futures
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mmjax.core import sharding
from mmjax.nn.kernels.inputs import Inputs, Static
from mmjax.nn.kernels.tpu_backward import backward as backward
from mmjax.nn.kernels.tpu_blocks import LANES, Grid, group_of, layout, ranges, span, turn, turned, ungrouped
from mmjax.nn.kernels.tpu_tiles import LOG2E, arrays_of, call, heads, over_keys, put, scores, tiles


def refusal(static: Static, x: Inputs) -> str | None:
    """Why these kernels cannot compute it, or are not worth it; None where they are.

    A bias's function must be what Pallas can lower for a TPU: arithmetic, comparisons and choices of what it is given,
    not a table that it looks things up in (a sum over `where(bin == n, table[:, n], 0)` does as well).
    """
    if x.q.shape[3] < LANES or x.k.shape[2] < 2 * LANES:
        return "Rows of fewer than 128 queries or 256 keys are left to XLA."
    if not {a.dtype for a in (x.q, x.k, x.v)} <= {jnp.dtype("float32"), jnp.dtype("bfloat16")}:
        return "Queries, keys and values must be float32 or bfloat16."
    if max(x.k.shape[3], x.v.shape[3]) > 2 * LANES:
        return "Heads of more than 256 numbers do not fit into on-chip memory."
    if static.bias is not None and not _lowers(static, x):
        return (
            "Pallas cannot lower the bias's function for a TPU, or it is not one of each head from its own parameters."
        )
    return None


def _lowers(static: Static, x: Inputs) -> bool:
    """Whether the bias and its gradient can be part of a kernel: asked by lowering one that has nothing else."""
    if any(a.dtype.itemsize != 4 for a in jax.tree.leaves((x.bias_query, x.bias_key))):
        return False  # what is narrower lowers, and then Mosaic cannot turn it
    group = group_of(x)
    params, query, key = (
        jax.tree.map(lambda a: jax.ShapeDtypeStruct((*first, *a.shape[len(first) :]), a.dtype), tree)  # noqa: B023
        for tree, first in ((x.bias_params, (group,)), (x.bias_query, (1, LANES)), (x.bias_key, (1, LANES)))
    )
    # Each head's from its own parameters, as many as there are of them; or, without any, one for all heads.
    twice = jax.tree.map(lambda a: jax.ShapeDtypeStruct((2 * group, *a.shape[1:]), a.dtype), params)
    heads = 2 * group if jax.tree.leaves(params) else 1

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

    def trial() -> bool:
        kernel = jax.jit(lambda *given: pl.pallas_call(body, out_shape=out)(given))
        kernel.trace(params, query, key).lower(lowering_platforms=("tpu",))
        return jax.eval_shape(static.bias, twice, query, key).shape[1] == heads

    # In a thread of its own, where no mesh is in force and nothing else is being traced.
    with concurrent.futures.ThreadPoolExecutor(1) as apart:
        try:
            return apart.submit(trial).result()
        except Exception:  # whatever Pallas says of what it cannot do
            return False


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
        s, _ = scores(static, g, heads(x["q"], queries, g), queries, part, x, masked)
        new = jnp.maximum(top[p], s.max(0, keepdims=True))
        shrink, weights = jnp.exp2(top[p] - new), jnp.exp2(s - new)
        total[p] = shrink * total[p] + weights.sum(0, keepdims=True)
        acc[p] = shrink * acc[p] + over_keys(part["v"], weights, g)
        top[p] = new

    @pl.when(block < scalars["end"][at])
    def _():
        tiles(scalars, x, g, b, i, block, compute)

    @pl.when(j == last)
    def _():
        n = g.blocks.query_part
        for p in range(g.query_parts):
            some = total[p] > 0
            safe = jnp.where(some, total[p], 1.0)
            put(out["out"], p, acc[p] / safe, g)
            lse = jnp.where(some, (top[p] + jnp.log2(safe)) / LOG2E, -jnp.inf)
            for h in range(g.group):
                out["lse"][0, 0, h : h + 1, p * n : (p + 1) * n] = lse[:, h * n : (h + 1) * n]


def forward(static: Static, x: Inputs, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """(out [B, K, G, L, Ev] in v's dtype, or wide; log-sum-exp f32[B, K, G, L])."""
    x = sharding.vary(x)
    length = x.q.shape[3]
    x, g = layout(x)
    of, touch = ranges(x, g)
    of |= span(touch)
    arrays = arrays_of(x, g)
    if x.sinks is not None:
        arrays["sinks"] = jnp.repeat(x.sinks.astype(jnp.float32) * LOG2E, g.blocks.query_part, axis=1)[:, None]
    shape = (*x.q.shape[:4], x.v.shape[-1])
    kind = jnp.dtype("float32") if static.wide else x.v.dtype
    out = {
        "out": sharding.shaped(turn(shape, g), kind, x.q),
        "lse": sharding.shaped(shape[:4], jnp.dtype("float32"), x.q),
    }
    stat = pltpu.VMEM((g.query_parts, 1, g.lanes), jnp.float32)
    scratch = [pltpu.VMEM((g.query_parts, shape[-1], g.lanes), jnp.float32), stat, stat]
    got = call(functools.partial(_forward_kernel, static), arrays, out, scratch, of, g, "queries", interpret)
    out, lse = turned(got["out"], g)[:, :, :, :length], got["lse"][..., :length]
    return ungrouped(out, g), ungrouped(lse, g)
