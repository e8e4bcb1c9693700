"""Interval attention on GPUs: Pallas kernels through Triton, a block of queries or of keys to a program.

Dao 2023 (FlashAttention-2, algorithms 1 and 2) with ranges that are data: for every block of queries, the blocks of
keys between the first and the last that one of its intervals touches, and the same for every block of keys. Inside of
a range, the first run of blocks that every query of the block sees whole is computed without a mask:

    key block       0 1 2 3 4 5 6 7
    query block 5       m f f m            m masked, f full; the others are neither read nor computed

The backward pass is two kernels, one by queries and one by keys (gpu_backward), without atomic sums: results are the
same bit for bit from run to run. A head size that is no power of two is cut into two that are (80 = 64 + 16), in
registers only.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from mmjax.nn.kernels import gpu_tiles as tiles
from mmjax.nn.kernels import xla
from mmjax.nn.kernels.gpu_backward import backward
from mmjax.nn.kernels.gpu_blocks import LOG2E, Blocks, Plan, Shape, capability
from mmjax.nn.kernels.inputs import Inputs, Static

__all__ = ["Blocks", "Plan", "backward", "forward", "refusal"]

FLOOR = -1e30  # a finite start of the running maximum: a query that sees nothing gets exp2(-inf) = 0 and no NaN


def refusal(static: Static, x: Inputs) -> str | None:
    """Why these kernels cannot compute it, or are not worth it; None where they are."""
    if tiles.plgpu is None:
        return "This version of JAX compiles no Pallas kernels through Triton."
    if (capability() or 9.0) < 8.0:
        return "XLA compiles Triton for GPUs of compute capability 8.0 and above."
    if one_tile(x):
        return "It is one tile, which XLA computes as well."
    if static.bias is not None:
        return "A bias is an arbitrary function of JAX, which Triton cannot compile."
    if len({a.dtype for a in (x.q, x.k, x.v)}) > 1 or x.q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return "Queries, keys and values must be of one type: float32, bfloat16 or float16."
    if max(x.q.shape[-1], x.v.shape[-1]) > 256:
        return "Heads of more than 256 numbers do not fit into registers."
    return None


def one_tile(x: Inputs) -> bool:
    """Whether plain XLA computes everything at once, without a loop."""
    if 0 in x.q.shape or 0 in x.v.shape:
        return True
    t = xla.Tiling.of(x)
    return t.rows == x.q.shape[0] and t.query_blocks == t.key_blocks == 1


def _forward_kernel(s: Shape, given: dict, out_ref: Any, lse_ref: Any) -> None:
    at_q = (s.query_blocks - 1 - pl.program_id(0)) * s.queries
    q = tiles.read(given["q"], (slice(None),), s.size, s.length, s.width, at_q, s.queries)
    lo = tiles.vector(given["lo"].at[:], at_q, s.queries, s.length, 0)
    hi = tiles.vector(given["hi"].at[:], at_q, s.queries, s.length, -1)
    bounds = tiles.reach(tiles.of_queries(lo, hi), tiles.vectors(given, tiles.KEYS, s.key_blocks))
    lo, hi = lo[:, None], hi[:, None]

    def step(hidden: bool, j: jax.Array, carry: tuple) -> tuple:
        out, total, top = carry
        at = j * s.keys
        rows = pl.ds(at, s.keys)
        order = tiles.vector(given["order"].at[rows], at, s.keys, s.length_k, -1) if hidden else None
        bias = (
            tiles.vector(given["key_bias"].at[rows], at, s.keys, s.length_k, 0.0)[None] if "key_bias" in given else None
        )
        k = tiles.read(given["k"], (rows,), s.size, s.length_k, s.width, at, s.keys)
        scores, _ = tiles.score(s, tiles.product(q, k), bias)
        if hidden:
            scores = jnp.where(tiles.seen(order[None], lo, hi), scores, -jnp.inf)
        new = jnp.maximum(top, scores.max(1))
        shrink = jnp.exp2((top - new) * s.unit)
        p = jnp.exp2(scores * s.unit - (new * s.unit)[:, None])
        v = tiles.read(given["v"], (rows,), s.size_v, s.length_k, s.width_v, at, s.keys)
        out = tiles.add_product(tuple(o * shrink[:, None] for o in out), p, v)
        return out, total * shrink + p.sum(1), new

    top = jnp.full((s.queries,), FLOOR, jnp.float32)
    total = jnp.zeros((s.queries,), jnp.float32)
    if "sinks" in given:
        sinks = tiles.vector(given["sinks"].at[:], at_q, s.queries, s.length, 0.0)
        top = jnp.maximum(top, sinks * (LOG2E / s.unit))
        total = jnp.exp2(sinks * LOG2E - top * s.unit)
    out = tuple(jnp.zeros((s.queries, n), jnp.float32) for _, n in s.size_v)
    out, total, top = tiles.loop(bounds, step, (out, total, top))
    some = total > 0
    safe = jnp.where(some, total, 1.0)
    tiles.write(out_ref, s.size_v, tuple(o / safe[:, None] for o in out), s.length, s.width_v, at_q)
    lse = jnp.where(some, top * (s.unit / LOG2E) + jnp.log(safe), -jnp.inf)
    tiles.save(lse_ref, lse, at_q, s.length)


def forward(
    static: Static, x: Inputs, *, plan: Plan | None = None, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """(out [B, K, G, L, Ev] in v's dtype, or wide; log-sum-exp f32[B, K, G, L]); see nn.kernels.xla.

    Args:
      static, x: for which `refusal` gives None.
      plan: blocks other than Plan.of gives.
      interpret: computed by JAX instead of Triton, on any device, for tests.
    """
    b, kv, group, length, _ = x.q.shape
    sinks = x.sinks
    if sinks is not None:
        sinks = jnp.broadcast_to(sinks.astype(jnp.float32)[:, :, None], (kv, group, length))
    if tiles.folds(x):
        x = tiles.fold(x)
        sinks = None if sinks is None else sinks.reshape(kv, 1, -1)
    blocks = (plan or Plan.of(x)).forward
    s = Shape.of(static, x, blocks)
    given = tiles.arrays(x) | tiles.of_blocks(x, s)
    if sinks is not None:
        given["sinks"] = sinks
    specs = tiles.by_query(s)
    last = given["q"].shape[:-1]
    kind = jnp.float32 if static.wide else x.v.dtype
    out = [((*last, s.width_v), kind, specs["d_out"]), (x.q.shape[:-1], jnp.float32, specs["lse"])]
    grid = (s.query_blocks, kv * s.group, b)
    out, lse = tiles.call(_forward_kernel, s, grid, blocks, given, specs, out, interpret)
    return out.transpose(0, 2, 3, 1, 4).reshape(b, kv, group, length, s.width_v), lse.reshape(b, kv, group, length)
