"""Block sizes of the GPU kernels, and what a kernel knows when it is compiled."""

import math
from dataclasses import dataclass

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
        size = max(x.q.shape[-1], x.v.shape[-1])
        if x.q.dtype.itemsize > 2:
            # Products in full precision run outside of tensor cores, where large tiles do not fit registers.
            small, exact = Blocks(32, 32, 4, 2), jax.config.jax_default_matmul_precision in ("highest", "float32")
            if exact or size > 128:
                return cls(small, small, small)
            if size > 64:
                return cls(Blocks(64, 64, 8, 2), small, small)
            return cls(Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2), Blocks(64, 32, 4, 2))
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
