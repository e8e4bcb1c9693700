"""Block sizes of the GPU kernels, and what a kernel knows when it is compiled."""

import math
from dataclasses import dataclass, replace

import jax
from jax.experimental import pallas as pl

from mmjax.nn.kernels.inputs import Inputs, Static

LOG2E = math.log2(math.e)


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
        """The best tiles of those that were tried, cut down to what the GPU at hand has room for."""
        plan, room = _best(x), shared_memory()
        wide, wide_v = (padded(_parts(a.shape[-1])) * a.dtype.itemsize for a in (x.k, x.v))
        return cls(
            _fitting(plan.forward, room, own=wide, other=wide + wide_v),
            _fitting(plan.by_query, room, own=wide + wide_v, other=wide + wide_v),
            _fitting(plan.by_key, room, own=wide + wide_v, other=wide + wide_v, by_key=True),
        )


def _best(x: Inputs) -> Plan:
    size = max(x.q.shape[-1], x.v.shape[-1])
    if x.q.dtype.itemsize > 2:
        # Products in full precision run outside of tensor cores, where large tiles do not fit registers.
        exact = jax.config.jax_default_matmul_precision in ("highest", "float32")
        if size > (64 if exact else 128):
            return Plan(Blocks(32, 16), Blocks(32, 16), Blocks(16, 32))
        if exact or size > 64:
            return Plan(Blocks(32, 32) if exact else Blocks(64, 64, 8), Blocks(32, 32), Blocks(32, 32))
        return Plan(Blocks(64, 64), Blocks(64, 64), Blocks(64, 32))
    # Heads of 64 and 128: the best of those tried on an H200 (tests.benchmarks.attention_gpu --parts sweep).
    if size <= 64:
        return Plan(Blocks(64, 128, 4, 3), Blocks(64, 64, 4, 3), Blocks(128, 64, 4, 2))
    if size <= 128:
        return Plan(Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 3), Blocks(64, 64, 4, 2))
    return Plan(Blocks(64, 64, 8, 2), Blocks(64, 32, 8, 2), Blocks(32, 64, 8, 2))


def capability() -> float | None:
    """The CUDA compute capability of the GPU at hand; None where there is none: programs are for another machine."""
    if jax.default_backend() != "gpu":
        return None
    try:
        return float(jax.local_devices()[0].compute_capability)
    except ValueError:
        return None


def shared_memory() -> int:
    """Bytes that a program may have (CUDA C++ Programming Guide, table of technical specifications)."""
    of = capability() or 9.0
    return 1024 * (227 if 9.0 <= of < 12.0 else 163 if of in (8.0, 8.7) else 99)


def _fitting(blocks: Blocks, room: int, own: int, other: int, by_key: bool = False) -> Blocks:
    """Fewer stages, then smaller tiles, until a program's own block and the stages of the other side fit `room`.

    Args:
      own, other: bytes that one query or key takes in them.
    """

    def taken(b: Blocks) -> int:
        mine, theirs = (b.keys, b.queries) if by_key else (b.queries, b.keys)
        return own * mine + b.stages * other * theirs + 2048  # labels and the like

    mine, theirs = ("keys", "queries") if by_key else ("queries", "keys")
    while taken(blocks) > room and max(blocks.queries, blocks.keys) > 16:
        if blocks.stages > 2:
            blocks = replace(blocks, stages=blocks.stages - 1)
        else:
            side = theirs if getattr(blocks, theirs) >= getattr(blocks, mine) else mine
            blocks = replace(blocks, **{side: getattr(blocks, side) // 2})
    return blocks


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
