"""The numerics part of attention_gpu: kernels against float64 on the same GPU."""

import functools
import itertools
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import torch

from mmjax.sequence import intervals
from tests.benchmarks.gpu_shared import DEVICE, compile_all, ours, say


def reference(q, k, v, see, key_bias, sinks, softcap, d_out, d_lse) -> dict:
    """Dense attention in float64, and its gradients by autograd."""
    of = lambda a: torch.tensor(np.asarray(a, np.float64), device=DEVICE)  # noqa: E731
    given = {n: of(a).requires_grad_() for n, a in (("q", q), ("k", k), ("v", v), ("sinks", sinks)) if a is not None}
    order, lo, hi = (torch.tensor(np.asarray(a), device=DEVICE) for a in see)
    seen = (lo[:, :, None] <= order[:, None]) & (order[:, None] <= hi[:, :, None])
    group = q.shape[2] // k.shape[2]
    kk, vv = (given[n].repeat_interleave(group, 2) for n in "kv")
    score = torch.einsum("blhe,bshe->bhls", given["q"], kk) * q.shape[-1] ** -0.5
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    if key_bias is not None:
        bias = of(key_bias)
        seen = seen & torch.isfinite(bias)[:, None]
        given["key_bias"] = torch.where(torch.isfinite(bias), bias, 0.0).requires_grad_()
        score = score + given["key_bias"][:, None, None]
    score = torch.where(seen[:, None], score, -torch.inf)
    if sinks is not None:
        score = torch.cat([score, given["sinks"][None, :, None, None].expand(*score.shape[:3], 1)], -1)
    dead = ~torch.isfinite(score).any(-1)
    score = torch.where(dead[..., None], 0.0, score)
    p, lse = torch.softmax(score, -1), torch.logsumexp(score, -1)
    p = torch.where(dead[..., None], 0.0, p)[..., : k.shape[1]]
    out = torch.einsum("bhls,bshe->blhe", p, vv)
    total = (out * of(d_out)).sum() + torch.where(dead, 0.0, lse * of(d_lse).transpose(1, 2)).sum()
    grads = torch.autograd.grad(total, list(given.values()))
    lse = torch.where(dead, -torch.inf, lse).transpose(1, 2)
    found = {"out": out, "lse": lse, **dict(zip((f"d_{n}" for n in given), grads, strict=True))}
    return {n: a.detach().cpu().numpy() for n, a in found.items()}


def masks(length: int, rng) -> tuple[jax.Array, ...]:
    """Rows with every kind of mask: (order, lo, hi)."""
    at = np.arange(length)
    cuts = np.sort(rng.choice(np.arange(1, length), min(5, length - 1), replace=False)) if length > 1 else []
    edges = [0, *cuts, length]
    both = intervals.bidirectional_images(length, list(itertools.pairwise(edges))[1::2])
    kept = np.flatnonzero(rng.random(length) < 0.6)
    lo = rng.integers(0, length, length)
    rows = [
        (at, *intervals.causal(length)),
        (at, *intervals.packed(np.diff(edges).tolist())),
        (at, *both),
        (at, *intervals.sliding_window(*both, max(1, length // 5))),
        (at, *intervals.blocks(np.diff(edges).tolist())),
        (rng.permutation(length), *intervals.causal(length)),
        (np.pad(kept, (0, length - len(kept)), constant_values=-1), *intervals.causal(length)),
        (at, lo, lo + rng.integers(-3, length // 2 + 1, length)),
        (at, np.zeros(length), np.full(length, length - 1)),
    ]
    return tuple(jnp.asarray(np.stack([row[i] for row in rows]), jnp.int32) for i in range(3))


@dataclass(frozen=True)
class Case:
    length: int
    size: int
    size_v: int
    dtype: str
    precision: str = "highest"
    options: bool = False  # key_bias, soft cap and sinks

    def __str__(self) -> str:
        more = " key_bias, softcap, sinks" if self.options else ""
        return f"L {self.length} heads of {self.size}/{self.size_v} {self.dtype} {self.precision}{more}"

    @property
    def near(self) -> float:
        """Relative to the largest value."""
        if self.dtype == "float32":
            return 2e-5 if self.precision == "highest" else 1e-2
        return {"bfloat16": 3e-2, "float16": 1e-2}[self.dtype]


CASES = [
    *(Case(700, n, n, dtype) for n in (64, 80, 96, 128, 256) for dtype in ("bfloat16", "float32")),
    Case(700, 64, 128, "bfloat16", "default", True),
    Case(700, 72, 24, "float32", "highest", True),
    Case(700, 128, 128, "float32", "default"),
    Case(700, 64, 64, "float16", "default", True),
    Case(1, 128, 128, "bfloat16", "default", True),
    Case(7, 80, 80, "float32", "highest", True),
]


def draw(case: Case, rng) -> tuple[tuple, dict]:
    """Arguments of `everything`, and what it should give. Four heads on two key heads."""
    see = masks(case.length, rng)
    if case.length == 1:  # decoding: one query, many keys
        see = (jnp.tile(jnp.arange(300, dtype=jnp.int32), (see[1].shape[0], 1)), see[1], see[2] + 250)
    b, s = see[0].shape

    def of(*shape, dtype=case.dtype):
        return jnp.asarray(rng.normal(size=shape), dtype)

    qkv = of(b, case.length, 4, case.size), of(b, s, 2, case.size), of(b, s, 2, case.size_v)
    cotangents = of(b, case.length, 4, case.size_v), of(b, case.length, 4, dtype="float32")
    key_bias = of(b, s, dtype="float32").at[:, s // 2].set(-jnp.inf) if case.options else None
    sinks = of(4, dtype="float32") if case.options else None
    softcap = 2.0 if case.options else None
    wanted = reference(*qkv, see, key_bias, sinks, softcap, *cotangents)
    return (qkv, see, key_bias, sinks, cotangents), wanted


def everything(case: Case, qkv, see, key_bias, sinks, cotangents) -> dict:
    def f(qkv, key_bias, sinks):
        return ours(*qkv, see, key_bias, sinks, 2.0 if case.options else None)

    with jax.default_matmul_precision(case.precision):
        (out, lse), back = jax.vjp(f, qkv, key_bias, sinks)
        (d_q, d_k, d_v), d_bias, d_sinks = back(cotangents)
    found = {"out": out, "lse": lse, "d_q": d_q, "d_k": d_k, "d_v": d_v, "d_key_bias": d_bias, "d_sinks": d_sinks}
    return {name: a for name, a in found.items() if a is not None}


def numerics(deadline: float) -> dict:
    """The largest error of every result of every case, relative to the largest value."""
    rng, start = np.random.default_rng(0), time.perf_counter()
    drawn = {case: draw(case, rng) for case in CASES}
    say(f"references in float64: {time.perf_counter() - start:.1f} s")
    programs = compile_all({case: (functools.partial(everything, case), args) for case, (args, _) in drawn.items()})
    say(f"{len(programs)} of {len(drawn)} programs compiled: {time.perf_counter() - start:.1f} s")
    worst = {}
    for case, program in programs.items():
        if time.perf_counter() > deadline:
            say("numerics: out of time")
            break
        args, wanted = drawn[case]
        got, again = ({n: np.asarray(a) for n, a in program(*args).items()} for _ in range(2))
        errors, wrong = {}, []
        for name, want in wanted.items():
            one, finite = got[name].astype(np.float64), np.isfinite(want)
            if not np.array_equal(np.isfinite(one), finite):
                wrong.append(f"{name} is not finite alike")
            with np.errstate(invalid="ignore"):
                near = np.abs(one - want)[finite].max(initial=0)
            errors[name] = float(near / max(1.0, np.abs(want[finite]).max(initial=0)))
            if got[name].tobytes() != again[name].tobytes():
                wrong.append(f"{name} differs between two runs")
        if not max(errors.values()) <= case.near:
            wrong.append(f"not within {case.near}")
        worst[str(case)] = errors
        say("WRONG" if wrong else "right", f"{case}:", *(f"{n} {e:.1e}" for n, e in errors.items()), *wrong)
    return worst
