"""Which kernel computes attention: that of the platform a program is compiled for, or the one that was asked for."""

import contextlib
import contextvars
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Literal, get_args

import jax

from mmjax.core.errors import InputError
from mmjax.nn.kernels import xla
from mmjax.nn.kernels.inputs import Inputs, Static

Backend = Literal["auto", "xla", "tpu", "gpu"]
PLATFORMS = {"tpu": ("tpu",), "gpu": ("cuda",)}  # where each kernel runs; elsewhere it is interpreted

_backend: contextvars.ContextVar[Backend] = contextvars.ContextVar("mmjax_attention", default="auto")


@contextlib.contextmanager
def use(backend: str) -> Iterator[None]:
    """Traces what is inside with one kernel of attention. It is read while tracing: a compiled function keeps its own.

    "auto" takes the platform's own, also where a program is compiled ahead of time for another than this machine's;
    what a kernel cannot do (`refusal`), and every other platform, is "xla". A kernel that is asked for by name is
    interpreted on other platforms: the same numbers, slowly, and not on a mesh.

    Args:
      backend: one of Backend.
    """
    if backend not in get_args(Backend):
        raise InputError(f"There is no kernel of attention {backend!r}; choose one of {', '.join(get_args(Backend))}.")
    token = _backend.set(backend)
    try:
        yield
    finally:
        _backend.reset(token)


def forward(static: Static, x: Inputs) -> tuple[jax.Array, jax.Array]:
    """(out [B, K, G, L, Ev] in v's dtype, log-sum-exp f32[B, K, G, L])."""
    return _run("forward", static, x)


def backward(static: Static, x: Inputs, out: jax.Array, lse: jax.Array, d_out: jax.Array, d_lse: jax.Array) -> Inputs:
    """Cotangents of the inputs (None for labels and what a bias reads)."""
    return _run("backward", static, x, out, lse, d_out, d_lse)


def _run(name: str, static: Static, x: Inputs, *rest: jax.Array):
    asked = _backend.get()
    if asked == "xla":
        return getattr(xla, name)(static, x, *rest)
    # Imported where they are first traced: they bring Pallas along.
    modules = {key: importlib.import_module(f"mmjax.nn.kernels.{key}") for key in PLATFORMS if asked in ("auto", key)}
    able = {key: module for key, module in modules.items() if module.refusal(static, x) is None}
    on: dict[str, Callable] = {
        platform: functools.partial(getattr(module, name), static)
        for key, module in able.items()
        for platform in PLATFORMS[key]
    }
    if asked == "auto" or asked not in able:
        default = functools.partial(getattr(xla, name), static)
    else:
        default = functools.partial(getattr(able[asked], name), static, interpret=True)
    return jax.lax.platform_dependent(x, *rest, default=default, **on) if on else default(x, *rest)
