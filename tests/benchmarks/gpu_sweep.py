"""The sweep part of attention_gpu: the best tiles of every kernel."""

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.nn.kernels import gpu, gpu_backward
from mmjax.nn.kernels.gpu import Blocks, Plan
from mmjax.nn.kernels.inputs import Static
from mmjax.sequence import intervals
from tests.benchmarks.gpu_shared import compile_all, inputs_of, say

LENGTH, HEADS, TURNS, SHOWN = 8192, 16, 20, 5
CASES = ((256, "bfloat16"), (80, "bfloat16"), (128, "float32"), (64, "float32"), (96, "bfloat16"), (128, "bfloat16"))
# What came first, or close to it, for one of the heads of 64 and 128 in a sweep over all tiles, and smaller ones for
# heads of 256 and for float32 (in tf32, which is what it is multiplied in unless told otherwise).
TILES = [
    *[(128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 4, 2), (64, 128, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3)],
    *[(128, 32, 8, 2), (128, 32, 8, 3), (64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 8, 2), (64, 32, 8, 2)],
    *[(32, 64, 4, 2), (32, 64, 4, 3), (32, 64, 8, 2), (32, 32, 4, 2), (32, 128, 8, 2), (64, 128, 8, 3)],
]


def kernels(static: Static) -> dict[str, Callable]:
    return {
        "forward": lambda blocks, x, rest: gpu.forward(static, x, plan=Plan(blocks, blocks, blocks)),
        "by_query": lambda blocks, x, rest: gpu_backward._d_queries(static, x, rest, blocks, False),
        "by_key": lambda blocks, x, rest: gpu_backward._d_keys(static, x, rest, blocks, False)[:2],
    }


def sweep(deadline: float) -> dict:
    """Each kernel's best tiles, milliseconds: causal, 8192 tokens, 16 heads."""
    best = {}
    for size, dtype in CASES:
        if time.perf_counter() < deadline:
            best |= of_size(size, dtype, deadline)
    return best


def of_size(size: int, dtype: str, deadline: float) -> dict:
    rng = np.random.default_rng(0)
    q, k, v, d_out = (jnp.asarray(rng.normal(size=(1, LENGTH, HEADS, size)), dtype) for _ in range(4))
    see = tuple(jnp.asarray(a, jnp.int32)[None] for a in (np.arange(LENGTH), *intervals.causal(LENGTH)))
    x = inputs_of(q, k, v, see)
    lse = jnp.full(x.q.shape[:-1], 10.0)
    args = x, {"d_out": inputs_of(d_out, k, v, see).q, "lse": lse, "delta": lse}
    of = kernels(Static(size**-0.5, None, None))
    jobs = {
        (name, blocks): (functools.partial(kernel, blocks), args)
        for name, kernel in of.items()
        for blocks in (Blocks(*b) for b in TILES)
        if plausible(name, blocks, size, x.q.dtype.itemsize)
    }
    start = time.perf_counter()
    programs = compile_all(jobs)
    say(f"size {size} {dtype}: {len(programs)} programs compiled in {time.perf_counter() - start:.0f} s")
    times = {}
    for (name, blocks), program in programs.items():
        if time.perf_counter() > deadline:
            say("sweep: out of time")
            break
        try:
            jax.block_until_ready(program(*args))
            start = time.perf_counter()
            jax.block_until_ready([program(*args) for _ in range(TURNS)][-1])
            times[name, blocks] = 1e3 * (time.perf_counter() - start) / TURNS
        except Exception as error:
            say(f"  {name} {blocks}: {str(error)[:200]}")
    best = {}
    for name in of:
        ranked = sorted((round(t, 4), str(blocks)) for (n, blocks), t in times.items() if n == name)
        best[f"{size} {dtype} {name}"] = ranked
        for t, blocks in ranked[:SHOWN]:
            say(f"size {size} {dtype} {name:<8} {t:.3f} ms {blocks}")
    return best


def plausible(kernel: str, blocks: Blocks, size: int, itemsize: int) -> bool:
    """Fits shared memory, and its sums and scores fit registers."""
    wide = 2 ** (size - 1).bit_length()
    mine, theirs = (blocks.keys, blocks.queries) if kernel == "by_key" else (blocks.queries, blocks.keys)
    memory = itemsize * wide * ((1 if kernel == "forward" else 2) * mine + 2 * blocks.stages * theirs)
    sums = mine * wide * (2 if kernel == "by_key" else 1)
    scores = mine * theirs * (1 if kernel == "forward" else 2)
    registers = (sums + scores) / (32 * blocks.warps)
    return memory <= 220_000 and registers <= 220 and mine >= 16 * blocks.warps // 2
