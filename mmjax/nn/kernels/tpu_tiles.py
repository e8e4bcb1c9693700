"""What the TPU kernels of interval attention share: how a kernel is called, and the arithmetic of a tile."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mmjax.nn.kernels.inputs import Inputs, Static
from mmjax.nn.kernels.tpu_blocks import Grid, of_groups, turn, turned

LOG2E = math.log2(math.e)


def arrays_of(x: Inputs, g: Grid) -> dict:
    """What every kernel reads; what there is one of per position lies along the lanes."""
    arrays = {name: turned(a, g) for name, a in (("q", x.q), ("k", x.k), ("v", x.v))}
    arrays |= {"lo": x.lo[:, None], "hi": x.hi[:, None], "order": x.order[:, None]}
    if x.key_bias is not None:
        arrays["key_bias"] = x.key_bias.astype(jnp.float32)[:, None] * LOG2E
    for name, tree in (("bias_query", x.bias_query), ("bias_key", x.bias_key)):
        arrays[name] = jax.tree.map(lambda a: a[:, None] if a.ndim == 2 else a, tree)
    arrays["bias_params"] = jax.tree.map(lambda a: of_groups(a, g), x.bias_params)
    return arrays


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


def call(
    body: Callable, arrays: dict, out: dict, scratch: list, scalars: dict, g: Grid, over: str, interpret: bool
) -> dict:
    """A kernel over (rows, groups of heads, blocks of queries or keys, what such a block reaches of the others).

    Args:
      body: (grid, scalars, arrays, out, *scratch), refs of one step's blocks.
      arrays, out: by the names of `_specs`; what is read, and what comes out.
      scalars: of `ranges` and `span`.
      over: "queries" or "keys", whose blocks the third axis of the grid is over.
    """
    steps = jnp.maximum((scalars["end"] - scalars["begin"]).max(), 1)
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
                "arbitrary" if jax.tree.leaves(out.get("d_bias_params")) else "parallel",
                "arbitrary",
            )
        ),
        cost_estimate=_cost(arrays, out, g),
        interpret=interpret,
    )(flat, arrays)


def _cost(arrays: dict, out: dict, g: Grid) -> pl.CostEstimate:
    """What the compiler is told a kernel costs, for its schedule: as if every row were one causal document."""
    size, v_size = (max(turn(arrays[name].shape, g)[-1], 1) for name in ("k", "v"))
    pairs = g.rows * g.groups * g.group * (g.query_blocks * g.blocks.queries) * (g.key_blocks * g.blocks.keys) // 2
    products = {"out": size + v_size, "d_q": 2 * size + v_size, "d_k": 2 * size + 2 * v_size}
    moved = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves((arrays, out)))
    read_again = sum(arrays[name].size * arrays[name].dtype.itemsize for name in ("k", "v")) * g.query_blocks // 2
    return pl.CostEstimate(
        flops=2 * pairs * next(products[name] for name in products if name in out),
        transcendentals=pairs,
        bytes_accessed=moved + read_again,
    )


def row(ref: Any, at: Any, g: Grid) -> jax.Array:
    """[1, heads × queries] of a block [1, 1, queries] (alike for all heads) or [1, 1, heads, queries]."""
    if len(ref.shape) == 3:
        return jnp.concatenate([ref[0, :, at]] * g.group, axis=1)
    return jnp.concatenate([ref[0, 0, h : h + 1, at] for h in range(g.group)], axis=1)


def _column(row: jax.Array) -> jax.Array:
    """[1, n] -> [n, 1]."""
    return jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1]


def heads(ref: Any, at: Any, g: Grid) -> jax.Array:
    """[heads × queries, head size] or [head size, heads × queries] of a block [1, 1, heads, ...]."""
    if g.blocks.size_last:
        return ref[0, 0, :, at, :].reshape(-1, ref.shape[-1])
    return jnp.concatenate([ref[0, 0, h, :, at] for h in range(g.group)], axis=1)


def put(ref: Any, p: int, x: jax.Array, g: Grid) -> None:
    """The way back of `heads`, from [head size, heads × queries] of part p of the queries."""
    n = g.blocks.query_part
    for h in range(g.group):
        one, at = x[:, h * n : (h + 1) * n], slice(p * n, (p + 1) * n)
        if g.blocks.size_last:
            ref[0, 0, h, at, :] = one.T.astype(ref.dtype)
        else:
            ref[0, 0, h, :, at] = one.astype(ref.dtype)


def positions(at: Any, g: Grid) -> Any:
    """An index of these positions in [positions, head size] or the other way round."""
    return (at, slice(None)) if g.blocks.size_last else (slice(None), at)


def products(a: jax.Array, b: jax.Array, g: Grid) -> jax.Array:
    """[positions of a, positions of b]: sums over the head size."""
    return _dot(a, b, (1, 1) if g.blocks.size_last else (0, 0))


def over_keys(a: jax.Array, weights: jax.Array, g: Grid) -> jax.Array:
    """[head size, queries]: sums over keys, of a and weights [keys, queries]."""
    return _dot(a, weights.astype(a.dtype), (0 if g.blocks.size_last else 1, 0))


def over_queries(weights: jax.Array, a: jax.Array, g: Grid) -> jax.Array:
    """[keys, head size], or the other way round: sums over queries, of weights [keys, queries] and a."""
    weights = weights.astype(a.dtype)
    return _dot(weights, a, (1, 0)) if g.blocks.size_last else _dot(a, weights, (1, 1))


def bias_params(x: dict, g: Grid) -> Any:
    """What the bias's function has of this group of heads."""
    leaves, tree = jax.tree.flatten(x["bias_params"])
    return tree.unflatten([ref[0, 0] if flat else ref[0] for ref, flat in zip(leaves, g.flat, strict=True)])


def _at(ref: Any, at: Any) -> jax.Array:
    """[1, positions, ...] of a block [1, 1, positions] or [1, positions, ...]."""
    return ref[0, :, at] if ref.shape[1] == 1 else ref[:, at]


def bias_of(static: Static, x: dict, queries: Any, part: dict) -> Callable:
    """The bias [1, heads or 1, queries, keys] of a tile, as a function of its parameters."""
    query = jax.tree.map(lambda ref: _at(ref, queries), x["bias_query"])
    return lambda params: static.bias(params, query, part["bias_key"])


def scores(static: Static, g: Grid, q: jax.Array, queries: Any, part: dict, x: dict, masked: bool) -> tuple:
    """f32[keys, heads × queries], times log₂ e; and the slope of the soft cap."""
    s, slope = products(part["k"], q, g), None
    if static.softcap is None:
        s = s * (static.scale * LOG2E)
    else:
        tanh = jnp.tanh(s * (static.scale / static.softcap))
        s, slope = (static.softcap * LOG2E) * tanh, 1.0 - tanh * tanh
    if static.bias is not None:
        bias = bias_of(static, x, queries, part)(bias_params(x, g))
        s = s + LOG2E * jnp.concatenate(
            [bias[0, h].T for h in range(bias.shape[1])] * (g.group // bias.shape[1]), axis=1
        )
    if "key_bias" in part:
        s = s + _column(part["key_bias"])
    if masked:
        order, lo, hi = _column(part["order"]), row(x["lo"], queries, g), row(x["hi"], queries, g)
        s = jnp.where((lo <= order) & (order <= hi), s, -jnp.inf)
    return s, slope


def _dot(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    # A product of bfloat16 is exact in any case, and Mosaic refuses to be asked for more.
    precision = None if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dims = ((axes[:1], axes[1:]), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def tiles(scalars: dict, x: dict, g: Grid, b: Any, i: Any, j: Any, compute: Callable) -> None:
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
            part = {name: x[name][(0, 0, *positions(keys, g))] for name in ("k", "v")}
            part |= {name: x[name][0, :, keys] for name in ("order", "key_bias") if name in x}
            part["bias_key"] = jax.tree.map(lambda ref: _at(ref, keys), x["bias_key"])
            compute(p, queries, keys, part, masked)

        pl.when(touched & full)(lambda: run(False))
        pl.when(touched & jnp.logical_not(full))(lambda: run(True))

    def row(p, _):
        jax.lax.fori_loop(0, g.key_parts, lambda r, _: one(p, r), None)

    jax.lax.fori_loop(0, g.query_parts, row, None)
