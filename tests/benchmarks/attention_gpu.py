"""Interval attention on this GPU: right against float64, and against cuDNN and torch.

    python -m tests.benchmarks.attention_gpu [--parts numerics table sweep] [--out FILE] [--seconds 100]

Needs jax with CUDA, flax, jaxtyping, numpy and torch with CUDA. Parts:

numerics: all masks × head sizes × types, results and gradients, against float64 (torch's autograd on the same GPU).
table: bfloat16, one row, 16 heads of 128 (and 8 query heads on 2 key heads), forward and forward + backward; masks: one
  causal document, 16 packed documents, causal with bidirectional pictures. Peers: cuDNN through
  jax.nn.dot_product_attention; torch SDPA, causal or with a dense mask; for packed documents both also on the
  documents as rows of a batch, which is the floor. Medians of five; a program makes several calls (torch: a CUDA graph
  of one), so that starting it is not what is measured. TFLOP/s count the work inside the intervals: 4 · pairs · heads ·
  size forwards and 3.5 times that both ways.
sweep: tiles, warps and stages for every kernel and head size.

The last line is one JSON object.
"""

import argparse
import functools
import json
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import torch

from mmjax.sequence import intervals
from tests.benchmarks.gpu_numerics import numerics
from tests.benchmarks.gpu_shared import (
    DEVICE,
    compile_all,
    cudnn,
    jax_jobs,
    measure_jax,
    measure_torch,
    ours,
    say,
)
from tests.benchmarks.gpu_sweep import sweep

DOCUMENTS = 16


def masks(length: int) -> dict[str, intervals.Intervals]:
    quarter = length // 4
    pictures = [(i * quarter + quarter // 4, i * quarter + quarter // 2) for i in range(4)]
    return {
        "causal": intervals.causal(length),
        "packed": intervals.packed([length // DOCUMENTS] * DOCUMENTS),
        "images": intervals.bidirectional_images(length, pictures),
    }


def by_document(f):
    def run(qkv):
        return f([a.reshape(DOCUMENTS, -1, *a.shape[2:]) for a in qkv]).reshape(qkv[0].shape)

    return run


def table(deadline: float) -> dict:
    figures = {}
    kinds = ("causal", "packed", "images")
    rows = [(n, (16, 16), m) for n in (32768, 8192, 2048) for m in kinds]
    rows += [(8192, (8, 2), m) for m in kinds[:2]]
    for length, (heads, kv), mask in rows:
        if time.perf_counter() > deadline:
            say("table: out of time")
            break
        try:
            figures[f"{length} {mask} {heads}/{kv}"] = row(length, heads, kv, mask)
        except Exception:
            traceback.print_exc()
        torch.cuda.empty_cache()
    return figures


def row(length: int, heads: int, kv: int, mask: str) -> dict:
    rng = np.random.default_rng(0)
    arrays = tuple(jnp.asarray(rng.normal(size=(1, length, n, 128)), jnp.bfloat16) for n in (heads, kv, kv))
    lo, hi = masks(length)[mask]
    work = 4 * 128 * heads * float((hi.astype(np.int64) - lo + 1).sum())
    see = tuple(jnp.asarray(a, jnp.int32)[None] for a in (np.arange(length), lo, hi))
    copies = max(2, min(8, 32768 // length))
    jobs = jax_jobs("ours", lambda qkv, *see: ours(*qkv, see)[0], (arrays, *see), copies)
    causal = functools.partial(cudnn, is_causal=True)
    if mask == "causal":
        jobs |= jax_jobs("cudnn", causal, (arrays,), copies)
    if mask == "packed":
        jobs |= jax_jobs("cudnn by document", by_document(causal), (arrays,), copies)
    if mask == "images" and length <= 8192:
        seen = jnp.asarray((lo[:, None] <= np.arange(length)) & (np.arange(length) <= hi[:, None]))[None, None]
        jobs |= jax_jobs("cudnn, mask", lambda qkv, seen: cudnn(qkv, mask=seen), (arrays, seen), copies)
    found, programs = {}, compile_all(jobs)
    for (name, way), program in programs.items():
        found.setdefault(name, {})[way] = measure_jax(program, jobs[name, way][1], copies)
    del programs, jobs
    sdpa = functools.partial(torch.nn.functional.scaled_dot_product_attention, enable_gqa=heads != kv)
    tensors = [torch.randn(1, n, length, 128, device=DEVICE, dtype=torch.bfloat16) for n in (heads, kv, kv)]
    peers = {}
    if mask == "causal":
        peers["torch"] = (functools.partial(sdpa, is_causal=True), tensors)
    if mask == "packed":
        parts = [a[0].unflatten(1, (DOCUMENTS, -1)).transpose(0, 1).contiguous() for a in tensors]
        peers["torch by document"] = (functools.partial(sdpa, is_causal=True), parts)
    if mask != "causal" and heads == kv:
        reach = torch.arange(length, device=DEVICE)
        low, high = (torch.tensor(a, device=DEVICE)[:, None] for a in (lo, hi))
        seen = ((low <= reach) & (reach <= high))[None, None]
        peers["torch, mask"] = (functools.partial(sdpa, attn_mask=seen), tensors)
    for name, (f, args) in peers.items():
        for way in ("forward", "both"):
            try:
                found.setdefault(name, {})[way] = measure_torch(f, args, way == "both")
            except Exception as error:
                say(f"  {name} {way}: {str(error)[:200]}")
    for name, times in found.items():
        for way, factor in (("forward", 1.0), ("both", 3.5)):
            if way in times:
                times[f"{way} TFLOP/s"] = round(1e-9 * factor * work / times[way], 1)
                times[way] = round(times[way], 4)
        say(f"{length:>6} {mask:<7} {heads}/{kv} {name:<18}", times)
    return found


def aims(figures: dict) -> list[dict]:
    def ratio(case: str, a: str, b: str, way: str) -> float | None:
        times = figures.get(case, {})
        return round(times[a][way] / times[b][way], 3) if way in times.get(a, {}) and way in times.get(b, {}) else None

    wanted = [
        ("32768 causal 16/16", "ours", "cudnn", "forward", "at_most", 1.8),
        ("32768 causal 16/16", "ours", "cudnn", "both", "at_most", 2.2),
        ("32768 causal 16/16", "ours", "torch", "both", "at_most", 2.0),
        ("32768 packed 16/16", "torch, mask", "ours", "both", "at_least", 8.0),
        ("8192 images 16/16", "torch, mask", "ours", "both", "at_least", 1.5),
    ]
    return [
        {"name": f"{case}, {way}: {a} / {b}", "measured": ratio(case, a, b, way), bound: value}
        for case, a, b, way, bound, value in wanted
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", nargs="+", default=["numerics", "table"], choices=["numerics", "table", "sweep"])
    parser.add_argument("--out")
    parser.add_argument("--seconds", type=float, default=100.0, help="of each part")
    args = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    found = {"device": device, "versions": [jax.__version__, torch.__version__]}
    say(device, *found["versions"])
    for part in args.parts:
        start = time.perf_counter()
        try:
            found[part] = {"numerics": numerics, "table": table, "sweep": sweep}[part](start + args.seconds)
        except Exception:
            traceback.print_exc()
        say(f"{part}: {time.perf_counter() - start:.0f} s")
        if args.out:
            with open(args.out, "w") as file:
                json.dump(found, file)
    found["figures"] = found.pop("table", {})
    found["aims"] = aims(found["figures"])
    if args.out:
        with open(args.out, "w") as file:
            json.dump(found, file)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
