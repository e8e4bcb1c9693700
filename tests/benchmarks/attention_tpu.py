"""The TPU kernels of interval attention as the real TPU compiler sees them, with no TPU.

    pip install ".[tpu]" && python -m tests.benchmarks.attention_tpu

Forward and backward, bfloat16, 8 query heads on 2 key heads, compiled for one chip of each kind: temporaries and
seconds, by length and head size. The layouts of what comes in and goes out are the compiler's choice, as they are
inside a model, where the products before and after write and read them; with rows of [length, heads, size] as they lie
in a checkpoint (last column) it copies them first.

Then how much of what is computed lies inside the intervals: tiles that the kernels compute, counted by the scalars that
tell them, over the pairs inside; FLOPs are so many times either. 16 documents in 32,768 tokens: of equal lengths, cut
at random, and of 1,000 to 3,000 tokens. The last line is one JSON object.
"""

import json
import os
import time

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

from mmjax.nn.attention import attend
from mmjax.nn.kernels.inputs import Inputs
from mmjax.nn.kernels.tpu_blocks import layout, ranges
from mmjax.sequence import intervals

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
LENGTHS, SIZES, HEADS, KV = (4096, 32_768, 131_072), (64, 128), 8, 2


def both(q, k, v, order, lo, hi, d_out):
    """out and the gradients, none of which is a temporary."""
    out, back = jax.vjp(lambda *x: attend(*x, order, lo, hi)[0], q, k, v)
    return out, back(d_out)


def compiled(chip: str, length: int, size: int, *, free: bool) -> dict:
    """Temporaries and seconds."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices[0]
    here = SingleDeviceSharding(device)

    def of(shape, dtype):
        # With layouts left to the compiler, jit alone says where arrays are.
        return jax.ShapeDtypeStruct(shape, dtype, sharding=None if free else here)

    q, k = (of((1, length, heads, size), jnp.bfloat16) for heads in (HEADS, KV))
    label = of((1, length), jnp.int32)
    any_layout = {name: Format(Layout.AUTO, here) for name in ("in_shardings", "out_shardings")} if free else {}
    start = time.perf_counter()
    program = jax.jit(both, **any_layout).lower(q, k, k, label, label, label, q).compile()
    assert program.as_text().count("tpu_custom_call") == 3, "not the kernels"
    return {
        "temporaries": program.memory_analysis().temp_size_in_bytes,
        "seconds": round(time.perf_counter() - start, 1),
    }


def lengths(rng: np.random.Generator) -> dict[str, list[list[int]]]:
    """Of 16 documents in a row, by how they are drawn."""
    total, n = 32_768, 16
    cuts = [np.sort(rng.choice(np.arange(1, total), n - 1, replace=False)) for _ in range(5)]
    drawn = [rng.integers(1000, 3000, n) for _ in range(5)]
    drawn = [(x * total // x.sum()).tolist() for x in drawn]
    return {
        "equal": [[total // n] * n],
        "cut at random": [np.diff([0, *c, total]).tolist() for c in cuts],
        "1,000 to 3,000": [[*x[:-1], total - sum(x[:-1])] for x in drawn],
    }


def executed(documents: list[int]) -> float:
    """Pairs that the kernels compute over those inside the intervals: every product costs the same of each."""
    length = sum(documents)
    lo, hi = intervals.packed(documents)
    see = (jnp.asarray(x, jnp.int32)[None] for x in (np.arange(length), lo, hi))
    q, k = (np.zeros((1, KV, *s, length, 128), jnp.bfloat16) for s in ((HEADS // KV,), ()))
    x, grid = layout(Inputs(q, k, k, *see, *[None] * 5))
    of, _ = ranges(x, grid)
    touch = (of["first"][:, :, None] <= of["high"][:, None]) & (of["low"][:, None] <= of["last"][:, :, None])
    tile = grid.blocks.key_part * grid.blocks.query_part
    return float(touch.sum()) * tile / float((hi - lo + 1).sum())


def main() -> None:
    table, figures = [], {}
    for chip in CHIPS:
        for length in LENGTHS:
            for size in SIZES:
                free, fixed = (compiled(chip, length, size, free=way) for way in (True, False))
                figures[f"{chip} {length} {size}"] = free | {"as in a checkpoint": fixed["temporaries"]}
                per = free["temporaries"] / length
                table.append(
                    f"| {chip} | {length:,} | {size} | {free['temporaries'] / 2**20:.2f} MiB | {per:.0f} B | "
                    f"{free['seconds']} s | {fixed['temporaries'] / 2**20:.0f} MiB |"
                )
                print(table[-1], flush=True)
    work = {name: [executed(d) for d in of] for name, of in lengths(np.random.default_rng(0)).items()}
    for name, of in work.items():
        print(f"tiles computed / inside the intervals, 16 documents {name}: {min(of):.3f} to {max(of):.3f}")
    longest = max(LENGTHS)
    at = lambda size: max(figures[f"{chip} {longest} {size}"]["temporaries"] for chip in CHIPS)  # noqa: E731
    aims = [
        {"name": f"temporaries at {longest}, head size 128, MiB", "measured": at(128) / 2**20, "at_most": 16},
        {
            "name": f"temporaries at {longest}, head size 64, bytes a token",
            "measured": at(64) / longest,
            "at_most": 8192,
        },
        {
            "name": "tiles computed (so FLOPs) / inside the intervals, worst of all",
            "measured": round(max(max(of) for of in work.values()), 3),
            "at_most": 1.3,
        },
    ]
    print(json.dumps({"figures": figures, "work": work, "aims": aims}))


if __name__ == "__main__":
    main()
