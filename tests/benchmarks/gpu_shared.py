"""What the parts of attention_gpu share: our attention with heads last, many compilations at a time, timing."""

import concurrent.futures
import functools
import os
import statistics
import time
import warnings

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory as well

import jax
import jax.numpy as jnp
import numpy as np
import torch

from mmjax.nn.kernels import gpu
from mmjax.nn.kernels.gpu import Plan
from mmjax.nn.kernels.inputs import Inputs, Static

warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated")
ON_GPU = jax.default_backend() == "gpu"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REPEATS, SECONDS = 5, 0.08
say = functools.partial(print, flush=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def heads_first(static: Static, plan: Plan | None, x: Inputs) -> tuple[jax.Array, jax.Array]:
    return gpu.forward(static, x, plan=plan, interpret=not ON_GPU)


def _forward(static, plan, x):
    out, lse = heads_first(static, plan, x)
    return (out, lse), (x, out, lse)


def _backward(static, plan, saved, cotangents):
    return (gpu.backward(static, *saved, *cotangents, plan=plan, interpret=not ON_GPU),)


heads_first.defvjp(_forward, _backward)


def inputs_of(q, k, v, see, key_bias=None, sinks=None) -> Inputs:
    b, length, heads, size = q.shape
    kv = k.shape[2]
    q = q.reshape(b, length, kv, heads // kv, size).transpose(0, 2, 3, 1, 4)
    sinks = None if sinks is None else sinks.reshape(kv, heads // kv)
    return Inputs(q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), *see, key_bias, sinks, None, None, None)


def ours(q, k, v, see, key_bias=None, sinks=None, softcap=None, plan=None):
    static = Static(q.shape[-1] ** -0.5, softcap, None)
    out, lse = heads_first(static, plan, inputs_of(q, k, v, see, key_bias, sinks))
    last = lambda a: jnp.moveaxis(a, 3, 1).reshape(q.shape[0], q.shape[1], q.shape[2], *a.shape[4:])  # noqa: E731
    return last(out), last(lse)


def cudnn(qkv, **more):
    return jax.nn.dot_product_attention(*qkv, implementation="cudnn", **more)


# ---- compile many, measure one


def compile_all(jobs: dict) -> dict:
    """{name: (function, arguments)} compiled in threads; an exception in the place of what does not compile."""

    def build(lowered):
        try:
            return lowered.compile()
        except Exception as error:
            return error

    lowered = {}
    for name, (f, args) in jobs.items():
        try:
            lowered[name] = jax.jit(f).lower(*args)
        except Exception as error:
            lowered[name] = None
            say(f"  {name}: not lowered: {str(error)[:300]}")
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        done = dict(zip(lowered, pool.map(lambda x: x and build(x), lowered.values()), strict=True))
    for name, program in done.items():
        if isinstance(program, Exception):
            say(f"  {name}: not compiled: {str(program)[:300]}")
    return {name: p for name, p in done.items() if p is not None and not isinstance(p, Exception)}


def median(call, each: int = 1) -> float:
    """Milliseconds of one of the `each` things a call does; call(n) is n calls with one wait at the end."""
    call(1)
    start = time.perf_counter()
    call(2)
    once = (time.perf_counter() - start) / 2
    n = min(2000, max(2, int(SECONDS / max(once, 1e-5))))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call(n)
        times.append(1e3 * (time.perf_counter() - start) / n / each)
    return statistics.median(times)


def both_ways(f):
    def both(d_out, qkv, *see):
        out, back = jax.vjp(lambda qkv: f(qkv, *see), qkv)
        return out, back(d_out)

    return both


def jax_jobs(name: str, f, args: tuple, copies: int) -> dict:
    """f((q, k, v), *labels) and its gradients, as programs of several calls on arrays of their own: nothing is shared
    between them, and what the host needs to start a program is spread over them."""
    try:
        d_out = jax.eval_shape(f, *args)
    except Exception as error:
        say(f"  {name}: {str(error)[:300]}")
        return {}
    d_out = jnp.asarray(np.random.default_rng(1).normal(size=d_out.shape), d_out.dtype)
    each = [jax.tree.map(jnp.copy, args) for _ in range(copies)]
    more = [(jnp.copy(d_out), *one) for one in each]
    return {
        (name, "forward"): (lambda sets: [f(*one) for one in sets], (each,)),
        (name, "both"): (lambda sets: [both_ways(f)(*one) for one in sets], (more,)),
    }


def measure_jax(program, args, each: int = 1) -> float:
    def call(n):
        for _ in range(n):
            out = program(*args)
        jax.block_until_ready(out)

    return median(call, each)


def measure_torch(f, args, backward: bool) -> float:
    """One call as a CUDA graph, replayed."""
    args = [a.detach().requires_grad_(backward) for a in args]
    d_out = torch.randn_like(f(*args)) if backward else None

    def once():
        if not backward:
            with torch.no_grad():
                return f(*args)
        return torch.autograd.grad(f(*args), args, d_out)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            once()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()

    def call(n):
        for _ in range(n):
            graph.replay()
        torch.cuda.synchronize()

    return median(call)
