"""What the GPU kernels of interval attention share: blocks, ranges, masked reads, products and scores.

A program has a block of queries or of keys, and a range of blocks of the other side that is data. A head size that is
no power of two is cut into two that are (80 = 64 + 16), in registers only.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from mmjax.core import sharding
from mmjax.nn.kernels.gpu_blocks import Blocks, Shape, padded
from mmjax.nn.kernels.inputs import Inputs

try:
    from jax.experimental.pallas import triton as plgpu
except ImportError:  # JAX means to leave it out one day: gpu.refusal then says so
    plgpu = None

NOBODY = 2**31 - 1  # a label that no key has
KEYS, QUERIES = ("least", "most", "low"), ("first", "last", "highest", "lowest")  # of a block; see of_keys, of_queries


def fold(x: Inputs) -> Inputs:
    """Short queries of all heads that share keys as the queries of one head, so that one program serves them all."""
    b, kv, group, length, size = x.q.shape
    tile = lambda a: jnp.tile(a, (1, group))  # noqa: E731
    return x.replace(q=x.q.reshape(b, kv, 1, group * length, size), lo=tile(x.lo), hi=tile(x.hi))


def folds(x: Inputs) -> bool:
    return x.q.shape[2] > 1 and x.q.shape[3] <= 32


def of_keys(order: jax.Array) -> tuple[jax.Array, ...]:
    """Over the last axis: the least and the greatest label, and the least with those of empty slots (-1)."""
    return jnp.where(order >= 0, order, NOBODY).min(-1), order.max(-1), order.min(-1)


def of_queries(lo: jax.Array, hi: jax.Array) -> tuple[jax.Array, ...]:
    """Over the last axis: the least lo and the greatest hi of those that see anything, and the greatest lo and least hi
    of all: no label is between those where one sees nothing."""
    some = lo <= hi
    above, below = jnp.where(some, lo, NOBODY), jnp.where(some, hi, -1)
    return above.min(-1), below.max(-1), above.max(-1), below.min(-1)


def of_blocks(x: Inputs, s: Shape, by_key: bool = False) -> dict[str, jax.Array]:
    """`of_keys` of every block of keys, i32[B, blocks] each; or `of_queries` of the queries'."""
    if not by_key:
        found = of_keys(_cut(x.order, s.keys, -1))
        return dict(zip(KEYS, found, strict=True))
    found = of_queries(_cut(x.lo, s.queries, 0), _cut(x.hi, s.queries, -1))
    return dict(zip(QUERIES, found, strict=True))


def _cut(a: jax.Array, size: int, fill: int) -> jax.Array:
    more = -a.shape[1] % size
    return jnp.pad(a, ((0, 0), (0, more)), constant_values=fill).reshape(a.shape[0], -1, size)


def reach(queries: tuple, keys: tuple) -> tuple[jax.Array, ...]:
    """Of one block and all blocks of the other side: the first that it touches, one past the last, and the same of the
    first run of full blocks (empty at the last where there is none).

    Args:
      queries, keys: `of_queries` and `of_keys`; numbers of the one side, arrays [blocks] of the other.
    """
    first, last, highest, lowest = queries
    least, most, low = keys
    touch = (first <= most) & (least <= last)
    full = (highest <= low) & (most <= lowest)
    at = jax.lax.iota(jnp.int32, touch.shape[0])
    start, stop = jnp.where(touch, at, touch.shape[0]).min(), jnp.where(touch, at + 1, 0).max()
    run = jnp.where(full, at, stop).min()
    end = jnp.where(~full & (at > run), at, stop).min()
    return start, stop, run, end


def vectors(given: dict, names: tuple[str, ...], count: int) -> tuple[jax.Array, ...]:
    """What `of_blocks` found; the others of a power of two touch nothing."""
    size = blocks_read(count)
    fills = {"least": NOBODY, "most": -1, "low": -1, "first": NOBODY, "last": -1, "highest": NOBODY, "lowest": -1}
    return tuple(vector(given[name].at[:], 0, size, count, fills[name]) for name in names)


def blocks_read(count: int) -> int:
    return max(16, pl.next_power_of_2(count))


def vector(ref: Any, at: Any, size: int, count: int, other: Any) -> jax.Array:
    """`size` numbers, of which the first is number `at` of `count`; `other` past the end."""
    if count % size == 0:
        return ref[...]
    return plgpu.load(ref, mask=at + jnp.arange(size) < count, other=other)


def read(ref: Any, rows: tuple, parts: tuple, count: int, width: int, at: Any, size: int) -> tuple[jax.Array, ...]:
    """The parts of `size` rows from ref[*rows], zeros past row `count` (the first is row `at`) and column `width`."""
    inside = None if count % size == 0 else (at + jnp.arange(size) < count)[:, None]
    out = []
    for start, n in parts:
        mask = inside
        if start + n > width:
            columns = (start + jnp.arange(n) < width)[None]
            mask = columns if mask is None else mask & columns
        where = ref.at[(*rows, pl.ds(start, n))]
        if mask is None:
            out.append(where[...])
        else:
            out.append(plgpu.load(where, mask=jnp.broadcast_to(mask, (size, n)), other=0.0))
    return tuple(out)


def save(ref: Any, value: jax.Array, at: Any, count: int) -> None:
    """The way back of `vector`."""
    plgpu.store(ref.at[:], value, mask=at + jnp.arange(value.shape[0]) < count)


def write(ref: Any, parts: tuple, values: tuple, count: int, width: int, at: Any) -> None:
    """The way back of `read`."""
    for (start, n), value in zip(parts, values, strict=True):
        size = value.shape[0]
        inside = (at + jnp.arange(size) < count)[:, None] & (start + jnp.arange(n) < width)[None]
        where = ref.at[:, pl.ds(start, n)]
        plgpu.store(where, value.astype(ref.dtype), mask=inside)


def product(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> jax.Array:
    """a bᵀ in float32, over the parts of a head."""
    dims = (((1,), (1,)), ((), ()))
    return sum(jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32) for x, y in zip(a, b, strict=True))


def add_product(sums: tuple[jax.Array, ...], a: jax.Array, b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """sums + a b, part by part; a is rounded to b's type."""
    a = a.astype(b[0].dtype)
    dims = (((1,), (0,)), ((), ()))
    return tuple(
        o + jax.lax.dot_general(a, y, dims, preferred_element_type=jnp.float32) for o, y in zip(sums, b, strict=True)
    )


def score(s: Shape, raw: jax.Array, key_bias: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """Scores of which `s.unit` times is a logarithm of base 2, and the derivative of the soft cap."""
    if s.raw:
        return raw, None
    raw, slope = raw * s.scale, None
    if s.softcap is not None:
        tanh = jnp.tanh(raw / s.softcap)
        raw, slope = s.softcap * tanh, 1.0 - tanh * tanh
    return (raw if key_bias is None else raw + key_bias), slope


def loop(bounds: tuple, step: Callable, carry: Any) -> Any:
    """step(masked, block, carry) over a range: its full run, then what is before and after that."""
    start, stop, run, end = bounds
    carry = jax.lax.fori_loop(run, end, functools.partial(step, False), carry)
    before = run - start

    def masked(t: jax.Array, carry: Any) -> Any:
        return step(True, jnp.where(t < before, start + t, end + t - before), carry)

    return jax.lax.fori_loop(0, jnp.maximum(before, 0) + stop - end, masked, carry)


def seen(order: jax.Array, lo: jax.Array, hi: jax.Array) -> jax.Array:
    """lo <= order <= hi, with one comparison: order - lo as an unsigned number is at most hi - lo."""
    some = lo <= hi
    lo, far = jnp.where(some, lo, NOBODY), jnp.where(some, hi - lo, 0)
    return (order - lo).astype(jnp.uint32) <= far.astype(jnp.uint32)


def call(
    kernel: Callable, s: Shape, grid: tuple, blocks: Blocks, given: dict, specs: dict, out: list, interpret: bool
) -> tuple[jax.Array, ...]:
    """The kernel over a grid; `out` is a list of (shape, dtype, spec)."""
    given = sharding.vary(given)
    shapes = [sharding.shaped(shape, dtype, given) for shape, dtype, _ in out]
    return pl.pallas_call(
        functools.partial(kernel, s),
        grid=grid,
        in_specs=[{name: specs[name] for name in given}],
        out_specs=[spec for *_, spec in out],
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name=kernel.__name__.strip("_"),
    )(given)


def by_query(s: Shape) -> dict[str, pl.BlockSpec]:
    """What a program of a block of queries reads, on a grid (blocks, heads, rows). The last blocks, which causal masks
    make the longest, come first."""
    last = s.query_blocks - 1
    heads = lambda h: (jax.lax.div(h, s.group), jax.lax.rem(h, s.group))  # noqa: E731
    rows = s.key_blocks * s.keys
    per_query = pl.BlockSpec((None, s.queries), lambda i, h, b: (b, last - i))
    per_key = pl.BlockSpec((None, rows), lambda i, h, b: (b, 0))
    per_head = pl.BlockSpec((None, None, None, s.queries), lambda i, h, b: (b, *heads(h), last - i))
    of_query = lambda n: pl.BlockSpec(  # noqa: E731
        (None, s.queries, None, None, n), lambda i, h, b: (b, last - i, *heads(h), 0)
    )
    of_key = lambda n: pl.BlockSpec((None, rows, None, n), lambda i, h, b: (b, 0, jax.lax.div(h, s.group), 0))  # noqa: E731
    return {
        "q": of_query(padded(s.size)),
        "d_out": of_query(padded(s.size_v)),
        "k": of_key(padded(s.size)),
        "v": of_key(padded(s.size_v)),
        "order": per_key,
        "key_bias": per_key,
        "lo": per_query,
        "hi": per_query,
        **dict.fromkeys(KEYS, pl.BlockSpec((None, blocks_read(s.key_blocks)), lambda i, h, b: (b, 0))),
        "lse": per_head,
        "delta": per_head,
        "sinks": pl.BlockSpec((None, None, s.queries), lambda i, h, b: (*heads(h), last - i)),
    }


def arrays(x: Inputs) -> dict[str, jax.Array]:
    """What every kernel reads: q [B, L, K, G, E], k and v [B, S, K, E], as nn.attention had them before it put heads
    first, so that XLA takes both transpositions away, and the kernels, to whom strides are free, read the model's own
    arrays.
    """
    found = {"q": x.q.transpose(0, 3, 1, 2, 4), "k": x.k.swapaxes(1, 2), "v": x.v.swapaxes(1, 2)}
    found |= {"order": x.order, "lo": x.lo, "hi": x.hi}
    return found if x.key_bias is None else {**found, "key_bias": x.key_bias.astype(jnp.float32)}
