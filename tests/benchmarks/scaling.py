"""Scaling on paper: LLaVA-7B on more and more chips of v5p, a row of 4,096 tokens on each.

`python -m tests.benchmarks.scaling [CHIPS …]` compiles the train step of configs/llava_7b.py for each number of chips
with the real TPU compiler (`.[tpu]`; no TPU is needed, 1 to 2 minutes each) and counts what each chip holds and sends.
The last line is JSON. With jax 0.10.2, parameters split over 32 chips:

    chips           16     64    128    256    512
    memory, GiB  11.08   7.66   7.67   7.67   7.66
    sent, GB     43.82  45.92  46.14  46.25  46.31
"""

import dataclasses
import json
import sys

from mmjax.plan import set_environment

TOPOLOGIES = {16: "2x2x4", 64: "4x4x4", 128: "4x4x8", 256: "8x8x4", 512: "8x8x8"}
FLAT = 64  # from so many chips on


def measured(chips: int) -> dict:
    """Of each chip, in bytes: all that the step takes, and what it sends by kind of collective."""
    from mmjax.core import config  # after the environment is set
    from mmjax.core.meshes import MeshConfig
    from mmjax.plan import planner

    cfg = config.load("llava_7b")
    packing = dataclasses.replace(cfg.packing, rows=chips)
    mesh = MeshConfig(data=-1, fsdp=min(chips, cfg.mesh.fsdp))
    cfg = dataclasses.replace(cfg, packing=packing, mesh=mesh)
    result, text = planner.plan(cfg, f"v5p:{TOPOLOGIES[chips]}")
    print(text, flush=True)
    of = result["buckets"][0]
    sent = {kind: c["bytes"] for kind, c in of["collectives"].items()}
    kept = {"memory": of["memory"]["total"], "sent": sum(sent.values()), "mfu": of["mfu"]}
    return kept | {"mesh": result["mesh"], "sent_by_kind": sent, "compile_seconds": of["compile_seconds"]}


def main(numbers: list[int]) -> None:
    set_environment()
    figures = {chips: measured(chips) for chips in numbers or TOPOLOGIES}
    print(f"\n{'chips':>5}{'fsdp':>6}{'data':>6}{'memory, GiB':>13}{'sent, GB':>10}{'MFU':>7}")
    for chips, f in figures.items():
        sizes = f"{f['mesh']['fsdp']:>6}{f['mesh']['data']:>6}"
        print(f"{chips:>5}{sizes}{f['memory'] / 2**30:>13.2f}{f['sent'] / 1e9:>10.2f}{f['mfu']:>7.3f}")
    flat = [f for chips, f in figures.items() if chips >= FLAT]
    aims = [
        {"name": f"{what} on each chip, largest over smallest, from {FLAT} chips", "measured": spread, "at_most": 1.1}
        for what in ("memory", "sent")
        if flat and (spread := max(f[what] for f in flat) / min(f[what] for f in flat))
    ]
    print(json.dumps({"figures": figures, "aims": aims}))


if __name__ == "__main__":
    main([int(n) for n in sys.argv[1:]])
