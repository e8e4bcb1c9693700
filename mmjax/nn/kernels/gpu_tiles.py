"""What the GPU kernels of interval attention share: blocks, ranges, masked reads, products and scores.

A program has a block of queries or of keys, and a range of blocks of the other side that is data. A head size that is
no power of two is cut into two that are (80 = 64 + 16), in registers only.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mmjax.core import sharding
from mmjax.nn.kernels.inputs import Inputs, Static

LOG2E = math.log2(math.e)
NOBODY = jnp.iinfo(jnp.int32).max


@dataclass(frozen=True)
class Blocks:
    """The tile of a kernel, and how Triton compiles it."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Plan:
    """The blocks of the three kernels."""

    forward: Blocks
    by_query: Blocks  # the cotangent of q
    by_key: Blocks  # the cotangents of k and v

    @classmethod
    def of(cls, x: Inputs) -> "Plan":
        size = max(x.q.shape[-1], x.v.shape[-1])
        if x.q.dtype.itemsize > 2:
            # Products of float32 run outside of tensor cores where the precision is "highest": small tiles compile.
            small = Blocks(32, 32, 4, 2)
            return cls(small, small, small)
        # The best of those tried on an H200, in bfloat16 (tests.benchmarks.attention_gpu --parts sweep).
        if size <= 64:
            return cls(Blocks(64, 128, 4, 3), Blocks(64, 64, 4, 3), Blocks(128, 64, 4, 2))
        if size <= 128:
            return cls(Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 3), Blocks(64, 64, 4, 2))
        return cls(Blocks(64, 64, 8, 2), Blocks(64, 32, 8, 2), Blocks(32, 64, 8, 2))


@dataclass(frozen=True)
class Shape:
    """What a kernel knows when it is compiled."""

    queries: int  # a block's
    keys: int
    length: int  # a row's
    length_k: int
    group: int
    size: tuple[tuple[int, int], ...]  # parts of the head size: (start, power of two)
    size_v: tuple[tuple[int, int], ...]
    width: int
    width_v: int
    scale: float
    softcap: float | None
    unit: float  # what takes scores to logarithms of base 2

    @classmethod
    def of(cls, static: Static, x: Inputs, blocks: Blocks) -> "Shape":
        group, length, width = x.q.shape[2:]
        s, width_v = x.v.shape[2:]
        # Where nothing is done to scores but masking, scaling them waits for the exponential, which it is free in.
        raw = static.softcap is None and x.key_bias is None and static.scale > 0
        return cls(
            _power(blocks.queries, length),
            _power(blocks.keys, s),
            length,
            s,
            group,
            _parts(width),
            _parts(width_v),
            width,
            width_v,
            static.scale,
            static.softcap,
            static.scale * LOG2E if raw else LOG2E,
        )

    @property
    def raw(self) -> bool:
        return self.unit != LOG2E

    @property
    def query_blocks(self) -> int:
        return -(-self.length // self.queries)

    @property
    def key_blocks(self) -> int:
        return -(-self.length_k // self.keys)


def _power(most: int, length: int) -> int:
    """A block of at most `most`, no larger than a short row needs; 16 is the least that tensor cores multiply."""
    return min(most, max(16, pl.next_power_of_2(length)))


def _parts(size: int) -> tuple[tuple[int, int], ...]:
    """A head size as one or two powers of two: 80 = 64 + 16, 72 = 64 + 16 (half of it nothing), 112 = 128."""
    whole = max(16, pl.next_power_of_2(size))
    if size <= 16 or size == whole:
        return ((0, whole),)
    half = whole // 2
    rest = max(16, pl.next_power_of_2(size - half))
    return ((0, whole),) if rest == half else ((0, half), (half, rest))


def padded(parts: tuple[tuple[int, int], ...]) -> int:
    return sum(n for _, n in parts)


def fold(x: Inputs) -> Inputs:
    """Short queries of all heads that share keys as the queries of one head, so that one program serves them all."""
    b, kv, group, length, size = x.q.shape
    tile = lambda a: jnp.tile(a, (1, group))  # noqa: E731
    return x.replace(q=x.q.reshape(b, kv, 1, group * length, size), lo=tile(x.lo), hi=tile(x.hi))


def folds(x: Inputs) -> bool:
    return x.q.shape[2] > 1 and x.q.shape[3] <= 32


def labels(x: Inputs, s: Shape) -> dict[str, jax.Array]:
    """Padded to whole blocks: the keys' order, the queries' lo, and how far their hi is from it.

    A query sees a key exactly where order - lo, as an unsigned number, is at most hi - lo. One that sees nothing gets a
    lo that no label reaches.
    """
    some = x.lo <= x.hi
    more_q, more_k = s.query_blocks * s.queries - s.length, s.key_blocks * s.keys - s.length_k
    return {
        "order": jnp.pad(x.order, ((0, 0), (0, more_k)), constant_values=-1),
        "lo": jnp.pad(jnp.where(some, x.lo, NOBODY), ((0, 0), (0, more_q)), constant_values=NOBODY),
        "far": jnp.pad(jnp.where(some, x.hi - x.lo, 0), ((0, 0), (0, more_q))),
    }


def ranges(see: dict[str, jax.Array], s: Shape, by_key: bool = False) -> jax.Array:
    """For every block of queries the blocks of keys it reaches (or of keys, the queries): i32[B, blocks, 4].

    The first, one past the last, and of the first run of full blocks the same.
    """
    b = see["order"].shape[0]
    order = see["order"].reshape(b, -1, s.keys)
    lo, far = (see[name].reshape(b, -1, s.queries) for name in ("lo", "far"))
    some = lo < NOBODY
    hi = lo + jnp.where(some, far, 0)
    least, most = jnp.where(order >= 0, order, NOBODY).min(-1), order.max(-1)
    first, last = lo.min(-1), jnp.where(some, hi, -1).max(-1)
    touch = (first[:, :, None] <= most[:, None]) & (least[:, None] <= last[:, :, None])
    full = (lo.max(-1)[:, :, None] <= order.min(-1)[:, None]) & (
        most[:, None] <= jnp.where(some, hi, -1).min(-1)[:, :, None]
    )
    full &= touch
    if by_key:
        touch, full = touch.swapaxes(1, 2), full.swapaxes(1, 2)
    count = touch.shape[-1]
    at = jnp.arange(count, dtype=jnp.int32)[None, None]
    start, stop = jnp.where(touch, at, count).min(-1), jnp.where(touch, at + 1, 0).max(-1)
    run = jnp.minimum(jnp.where(full, at, count).min(-1), stop)
    end = jnp.clip(jnp.where(~full & (at > run[..., None]), at, count).min(-1), run, stop)
    return jnp.stack([start, stop, run, end], -1)


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


def loop(bounds: Any, step: Callable, carry: Any) -> Any:
    """step(masked, block, carry) over a range: its full run, then what is before and after that."""
    start, stop, run, end = (bounds[i] for i in range(4))
    carry = jax.lax.fori_loop(run, end, functools.partial(step, False), carry)
    before = run - start

    def masked(t: jax.Array, carry: Any) -> Any:
        return step(True, jnp.where(t < before, start + t, end + t - before), carry)

    return jax.lax.fori_loop(0, jnp.maximum(before, 0) + stop - end, masked, carry)


def seen(order: jax.Array, lo: jax.Array, far: jax.Array) -> jax.Array:
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
        "order": pl.BlockSpec((None, rows), lambda i, h, b: (b, 0)),
        "key_bias": pl.BlockSpec((None, rows), lambda i, h, b: (b, 0)),
        "lo": per_query,
        "far": per_query,
        "range": pl.BlockSpec((None, None, 4), lambda i, h, b: (b, last - i, 0)),
        "lse": per_head,
        "delta": per_head,
        "sinks": pl.BlockSpec((None, None, s.queries), lambda i, h, b: (*heads(h), last - i)),
    }


def heads_last(x: Inputs) -> dict[str, jax.Array]:
    """q [B, L, K, G, E], k and v [B, S, K, E]: what nn.attention had before it put heads first, so that XLA takes both
    transpositions away, and the kernels, to whom strides are free, read the arrays of the model."""
    return {"q": x.q.transpose(0, 3, 1, 2, 4), "k": x.k.swapaxes(1, 2), "v": x.v.swapaxes(1, 2)}


def optional(x: Inputs, s: Shape) -> dict[str, jax.Array]:
    if x.key_bias is None:
        return {}
    more = s.key_blocks * s.keys - s.length_k
    return {"key_bias": jnp.pad(x.key_bias.astype(jnp.float32), ((0, 0), (0, more)))}
