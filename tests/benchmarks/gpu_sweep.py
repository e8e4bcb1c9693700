"""The sweep part of attention_gpu: the best tiles of every kernel."""

import functools
import itertools
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

LENGTH, HEADS, TURNS, SHOWN = 8192, 16, 20, 6
SIZES = (128, 64, 80, 256)


def kernels(static: Static) -> dict[str, Callable]:
    return {
        "forward": lambda blocks, x, rest: gpu.forward(static, x, plan=Plan(blocks, blocks, blocks)),
        "by_query": lambda blocks, x, rest: gpu_backward._d_queries(static, x, rest, blocks, False),
        "by_key": lambda blocks, x, rest: gpu_backward._d_keys(static, x, rest, blocks, False)[:2],
    }


def sweep(deadline: float) -> dict:
    """Each kernel's best tiles, milliseconds: causal, 8192 tokens, 16 heads, bfloat16."""
    best = {}
    for size in SIZES:
        if time.perf_counter() < deadline:
            best |= of_size(size, deadline)
    return best


def of_size(size: int, deadline: float) -> dict:
    rng = np.random.default_rng(0)
    q, k, v, d_out = (jnp.asarray(rng.normal(size=(1, LENGTH, HEADS, size)), jnp.bfloat16) for _ in range(4))
    see = tuple(jnp.asarray(a, jnp.int32)[None] for a in (np.arange(LENGTH), *intervals.causal(LENGTH)))
    x = inputs_of(q, k, v, see)
    lse = jnp.full(x.q.shape[:-1], 10.0)
    args = x, {"d_out": inputs_of(d_out, k, v, see).q, "lse": lse, "delta": lse}
    of = kernels(Static(size**-0.5, None, None))
    tried = [Blocks(*b) for b in itertools.product((64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4))]
    tried += [Blocks(32, k, w, s) for k, w, s in itertools.product((64, 128), (4, 8), (2, 3, 4))]
    jobs = {
        (name, blocks): (functools.partial(kernel, blocks), args)
        for name, kernel in of.items()
        for blocks in tried
        if plausible(name, blocks, size)
    }
    start = time.perf_counter()
    programs = compile_all(jobs)
    say(f"size {size}: {len(programs)} programs compiled in {time.perf_counter() - start:.0f} s")
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
        best[f"{size} {name}"] = ranked
        for t, blocks in ranked[:SHOWN]:
            say(f"size {size} {name:<8} {t:.3f} ms {blocks}")
    return best


def plausible(kernel: str, blocks: Blocks, size: int) -> bool:
    """Fits shared memory, and its sums and scores fit registers."""
    wide = 2 ** (size - 1).bit_length()
    mine, theirs = (blocks.keys, blocks.queries) if kernel == "by_key" else (blocks.queries, blocks.keys)
    memory = 2 * wide * ((1 if kernel == "forward" else 2) * mine + 2 * blocks.stages * theirs)
    sums = mine * wide * (2 if kernel == "by_key" else 1)
    scores = mine * theirs * (1 if kernel == "forward" else 2)
    registers = (sums + scores) / (32 * blocks.warps)
    return memory <= 220_000 and 40 <= registers <= 220 and mine >= 16 * blocks.warps // 2
