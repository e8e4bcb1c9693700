"""Interval attention on this CPU against dense JAX and torch, in one run, two threads each.

    pip install ".[parity]" && python -m tests.benchmarks.attention

Medians of five or more, float32, one row, 8 heads of 64. Masks: one causal document; 16 packed causal documents;
causal with bidirectional pictures. Peers: (a) jax.nn.dot_product_attention with a dense mask; (b) torch SDPA with a
dense mask; (c) for packed documents torch SDPA in a loop over the documents, which is the floor. The last line is one
JSON object.
"""

import functools
import json
import os
import statistics
import time

# Before JAX starts: the CPU alone, also where an accelerator is present.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import torch

from mmjax.nn.attention import attend
from mmjax.sequence import intervals

HEADS, SIZE, DOCUMENTS, REPEATS, SECONDS = 8, 64, 16, 5, 1.0
LENGTHS = (512, 2048, 8192)


def masks(length: int) -> dict[str, intervals.Intervals]:
    quarter = length // 4
    pictures = [(i * quarter + quarter // 4, i * quarter + quarter // 2) for i in range(4)]
    return {
        "causal": intervals.causal(length),
        "packed": intervals.packed([length // DOCUMENTS] * DOCUMENTS),
        "images": intervals.bidirectional_images(length, pictures),
    }


def median(f, wait) -> float:
    """Milliseconds; of many more than five where one takes a few."""
    wait(f())
    out = []
    while len(out) < REPEATS or sum(out) < 1e3 * SECONDS:
        start = time.perf_counter()
        wait(f())
        out.append(1e3 * (time.perf_counter() - start))
    return statistics.median(out)


def jax_programs(attention, arrays) -> tuple:
    """(forward, forward and backward), compiled, and the temporaries of the second in bytes."""
    forward = jax.jit(attention).lower(*arrays).compile()
    both = jax.jit(jax.grad(lambda *x: (attention(*x) ** 2).sum(), (0, 1, 2))).lower(*arrays).compile()
    return forward, both, both.memory_analysis().temp_size_in_bytes


def measure_jax(attention, arrays) -> dict[str, float]:
    forward, both, memory = jax_programs(attention, arrays)
    wait = jax.block_until_ready
    return {
        "forward": median(lambda: forward(*arrays), wait),
        "both": median(lambda: both(*arrays), wait),
        "temporaries": memory,
    }


def measure_torch(attention, arrays) -> dict[str, float]:
    q, k, v = (torch.tensor(np.asarray(x)).transpose(1, 2).contiguous() for x in arrays)

    def forward():
        with torch.no_grad():
            return attention(q, k, v)

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]

    def both():
        return torch.autograd.grad((attention(*leaves) ** 2).sum(), leaves)

    return {"forward": median(forward, lambda _: None), "both": median(both, lambda _: None)}


def ours(q, k, v, see):
    return attend(q, k, v, *see)[0]


def by_document(q, k, v):
    parts = (x.chunk(DOCUMENTS, dim=2) for x in (q, k, v))
    sdpa = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)
    return torch.cat([sdpa(*part) for part in zip(*parts, strict=True)], dim=2)


def main() -> None:
    torch.set_num_threads(2)
    rng = np.random.default_rng(0)
    figures = {}
    for length in LENGTHS:
        arrays = [jnp.asarray(rng.normal(size=(1, length, HEADS, SIZE)), jnp.float32) for _ in range(3)]
        order = jnp.arange(length)[None]
        for name, (lo, hi) in masks(length).items():
            seen = (lo[:, None] <= np.arange(length)) & (np.arange(length) <= hi[:, None])
            dense = jnp.asarray(seen)[None, None]
            as_tensor = torch.tensor(seen)[None, None]
            see = order, jnp.asarray(lo)[None], jnp.asarray(hi)[None]
            of = {
                "ours": measure_jax(functools.partial(ours, see=see), arrays),
                "dense jax": measure_jax(
                    lambda q, k, v, dense=dense: jax.nn.dot_product_attention(q, k, v, mask=dense), arrays
                ),
                "torch, mask": measure_torch(
                    lambda q, k, v, mask=as_tensor: torch.nn.functional.scaled_dot_product_attention(
                        q, k, v, attn_mask=mask
                    ),
                    arrays,
                ),
            }
            if name == "causal":
                of["torch, causal"] = measure_torch(
                    functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True), arrays
                )
            if name == "packed":
                of["torch, loop"] = measure_torch(by_document, arrays)
            figures[f"{length} {name}"] = of
            times = "  ".join(f"{peer} {t['forward']:.1f}/{t['both']:.1f}" for peer, t in of.items())
            print(f"{length:>5} {name:<7} ms, forward / forward + backward:  {times}", flush=True)

    def over(case: str, peer: str, way: str = "both") -> float:
        return round(figures[case]["ours"][way] / figures[case][peer][way], 3)

    def memory(length: int) -> int:
        return figures[f"{length} causal"]["ours"]["temporaries"]

    aims = [
        {"name": f"512 causal, {w}: ours / dense jax", "measured": over("512 causal", "dense jax", w), "at_most": 1.1}
        for w in ("forward", "both")
    ]
    aims += [
        {"name": "512 causal, both: ours / torch", "measured": over("512 causal", "torch, causal"), "at_most": 1.5},
        {"name": "512 packed, both: ours / torch", "measured": over("512 packed", "torch, mask"), "at_most": 1.0},
    ]
    aims += [
        {
            "name": f"8192 packed, {w}: {p} / ours",
            "measured": round(1 / over("8192 packed", p, w), 2),
            "at_least": least,
        }
        for p, least in (("torch, mask", 6), ("dense jax", 20))
        for w in ("forward", "both")
    ]
    aims += [
        {
            "name": f"8192 causal, {w}: ours / torch",
            "measured": over("8192 causal", "torch, causal", w),
            "at_most": 2.5,
        }
        for w in ("forward", "both")
    ]
    aims.append(
        {
            "name": "temporaries at 8192 / at 2048 (4 is linear)",
            "measured": round(memory(8192) / memory(2048), 2),
            "at_most": 4.4,
        }
    )
    print(json.dumps({"figures": figures, "versions": [jax.__version__, torch.__version__], "aims": aims}))


if __name__ == "__main__":
    main()
