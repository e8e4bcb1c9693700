"""python -m mmjax.bench [CONFIG] [--steps N] [--stage N] [--json] [--field value …]

What a config's train step does on the hardware that is here: its time, useful tokens per second, MFU, memory, and what
compiling takes. The step, the plan and the reading of data are those of `mmjax.train`, and so is the order of things: a
step runs while the one before is read and the next one's data come. Nothing is written.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.core import config, processes, tree
from mmjax.core import spec as specs
from mmjax.core.errors import InputError
from mmjax.core.meshes import Rules, make_mesh
from mmjax.models import flops
from mmjax.plan.chips import CHIPS

WHAT = """Measures the train step on the hardware that is here; nothing is written.

CONFIG may be left out; it is quickstart then. The benchmark's own options:
  --steps N       steps that are timed (20); after them it ends
  --stage N       of the run's N-th stage, where it has stages (1)
  --json          one JSON object, as the last line"""
KINDS = {  # what JAX calls the chips of plan.chips; others of the same family have other peaks
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA A100-SXM4-40GB": "a100",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}
WARM = 3  # steps that are not timed, nor is the first of each bucket


def options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The benchmark's own options, and what is left: the config and its fields.

    Raises:
      InputError: fewer than two steps.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--stage", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    try:
        mine, rest = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise InputError(f"{error}; see python -m mmjax.bench --help.") from None
    if mine.steps < 2:
        raise InputError(f"--steps is {mine.steps}; time at least 2.")
    if not rest or (rest[0].startswith("-") and rest[0] not in ("-h", "--help")):
        rest = ["quickstart", *rest]
    return mine, rest


def run(arguments: Sequence[str]) -> int:
    mine, rest = options(arguments)
    cfg = config.from_command_line("mmjax.bench", rest, WHAT)
    from mmjax.train import cluster  # not for those who only ask for --help

    with cluster.joined(cfg.cluster):
        found = measure(cfg, mine.steps, mine.stage)
        if processes.index() == 0:
            print(said(found))
            if mine.json:
                print(json.dumps(found, allow_nan=False))
    return 0


def measure(cfg: Any, steps: int, stage: int = 1) -> dict[str, Any]:
    """Times that many steps of a run's stage (train.config.Config) and returns everything that was found, for JSON.

    Parameters start at random, those of a base too: a step takes as long with them.

    Raises:
      InputError: the run cannot be: as `mmjax.train` says.
    """
    from mmjax.train import cluster, loop, stages, state
    from mmjax.train.prepare import prepare_data

    part = stages.numbered(cfg, stage)
    part = dataclasses.replace(part, cfg=_short(part.cfg, WARM + steps))
    cfg, mesh = part.cfg, make_mesh(cfg.mesh)
    source = prepare_data(cfg, *cluster.parts(mesh, Rules())).training
    shape = stages.abstract(part, mesh)
    began = time.monotonic()
    programs = loop.compile_steps(cfg, source, shape, mesh)
    compiling = time.monotonic() - began
    tx, key = stages.optimizer(cfg), jax.random.key(cfg.seed)
    start = state.create_sharded(part.spec, tx, shape, key, cfg.update.frozen)
    timed = _timed(cfg, source, programs, start)
    if len(timed) < 2:
        raise InputError(
            f"Only {len(timed)} of {steps} steps were not the first of one of {len(programs.steps)} buckets, which are "
            f"not timed; give more --steps."
        )
    seconds, tokens = (sum(getattr(s, name) for s in timed) for name in ("seconds", "tokens"))
    work = sum(s.flops for s in timed)
    peak, told = _peak(cfg.update.compute)
    memory, counted = _memory(programs.steps)
    plan = source.plan
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "jax": jax.__version__,
        "mesh": {name: size for name, size in mesh.shape.items() if size > 1},
        "parameters": specs.count(part.spec),
        "trained": tree.count(state.trained(shape.params, cfg.update.frozen)),
        "compute": cfg.update.compute,
        "steps": len(timed),
        "step_seconds": _spread([s.seconds for s in timed]),
        "buckets": [
            dataclasses.asdict(b) | {"step_seconds": _spread([s.seconds for s in timed if s.bucket == n])}
            for n, b in enumerate(plan.buckets)
        ],
        "waiting": sum(s.waiting for s in timed) / seconds,
        "tokens_per_step": tokens / len(timed),
        "tokens_per_second": tokens / seconds,
        "fill": plan.fill,
        "fill_tokens": plan.fill_tokens,
        "fill_patches": plan.fill_patches,
        "flops_per_step": work / len(timed),
        "peak_flops": peak,
        "peak_is": told,
        "mfu": work / seconds / peak,
        "memory_bytes": memory,
        "memory_is": counted,
        "compile_seconds": compiling,
        "compiles": programs.compiles,
    }


def said(found: dict[str, Any]) -> str:
    """The same in words."""
    spread, several = found["step_seconds"], len(found["buckets"]) > 1
    mesh = "".join(f", {name} {size}" for name, size in found["mesh"].items())
    shapes = ", ".join(
        f"{b['rows']} × ({b['tokens']} tokens, {b['patches']} patches)"
        + (f" {1e3 * b['step_seconds']['median']:.4g} ms" if b["step_seconds"] and several else "")
        for b in found["buckets"]
    )
    lines = {
        "hardware": f"{found['devices']} × {found['device']}, {found['processes']} process"
        f"{'es' * (found['processes'] > 1)}{mesh}; jax {found['jax']}",
        "model": f"{found['parameters']:,} parameters, of them trained {found['trained']:,}, {found['compute']}; "
        f"rows {shapes}",
        "step": f"{1e3 * spread['median']:.4g} ms, the median of {found['steps']}; half of them between "
        f"{1e3 * spread['quarter']:.4g} and {1e3 * spread['three_quarters']:.4g} ms, all between "
        f"{1e3 * spread['least']:.4g} and {1e3 * spread['most']:.4g}; the host waited for data {found['waiting']:.1%}",
        "useful tokens": f"{found['tokens_per_second']:,.0f} per second, {found['tokens_per_step']:,.0f} a step; fill "
        f"{found['fill']:.1%} (tokens {found['fill_tokens']:.1%}, patches {found['fill_patches']:.1%})",
        "MFU": f"{found['mfu']:.3f}: {found['flops_per_step'] / 1e9:,.4g} GFLOP of the model a step, of "
        f"{found['peak_flops'] / 1e12:,.4g} TFLOP/s ({found['peak_is']})",
        "memory": f"{found['memory_bytes'] / 2**20:,.0f} MiB a device at most ({found['memory_is']})",
        "compiling": f"{found['compile_seconds']:.1f} s, {len(found['buckets'])} bucket{'s' * several}",
    }
    return "\n".join(f"{name:<15}{text}" for name, text in lines.items())


@dataclasses.dataclass(frozen=True)
class Step:
    """A step that was timed. tokens: that are no padding. flops: of the model.

    waiting: of its seconds, what the host waited for the next step's data; the device works on this one meanwhile.
    """

    bucket: int
    seconds: float
    waiting: float
    tokens: int
    flops: float


def _short(cfg: Any, steps: int) -> Any:
    """A run of so many steps; of a dataset that is read a number of times, the beginning.

    No features of pictures are kept, so that every step does the work that is counted.
    """
    if getattr(cfg.data, "epochs", 0):
        cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, epochs=0))
    return dataclasses.replace(cfg, steps=steps, features=type(cfg.features)())


def _timed(cfg: Any, source: Any, programs: Any, now: Any) -> list[Step]:
    """Runs all steps of the plan, as the training loop does; a step ends when what it says has been read."""
    from mmjax.data.source import read
    from mmjax.train import cluster

    asking = cluster.whole(np.zeros(programs.asking.mesh.size, np.int32), programs.asking)
    fed, ended, seen, unread, out = read(source, 0, threads=cfg.threads), 0.0, set(), None, []

    def finish(number: int, held: Any, told: dict[str, jax.Array], waiting: float) -> None:
        nonlocal ended
        told, began, ended = jax.device_get(told), ended, time.monotonic()
        if told["violations"].any():
            raise InputError(f"Step {number + 1} breaks invariants of the batch; python -m mmjax.train says which.")
        bucket = source.plan.steps[number].bucket
        if number >= WARM and bucket in seen:
            out.append((held, bucket, ended - began, waiting, int(told["tokens"])))
        seen.add(bucket)

    for number in range(len(source.plan.steps)):
        asked = time.monotonic()
        batch = next(fed)
        waiting = time.monotonic() - asked
        bucket = source.plan.steps[number].bucket
        now, told = programs.run(bucket, now, batch, asking, cfg.update.accumulate)
        if unread:
            finish(*unread, waiting)
        unread = number, batch.replace(patches=None, frames=None), told
    finish(*unread, 0.0)
    work = _work(cfg)
    return [Step(*measured, work(held, measured[-1])) for held, *measured in out]


def _work(cfg: Any) -> Callable[[Any, int], float]:
    """A function of a batch and its tokens: the model's FLOPs (models.flops) for what is in it.

    Of its rows a process has its own; all together have so many tokens, and as many FLOPs for each.
    """

    @functools.cache
    def of_row(row: flops.Row) -> float:
        return flops.of_row(cfg.model, row, cfg.sequence.see, cfg.update.frozen, cfg.lora).total

    def of_batch(batch: Any, tokens: int) -> float:
        rows = flops.rows_of(batch, cfg.model, cfg.sequence)
        return sum(map(of_row, rows)) * tokens / max(sum(row.tokens for row in rows), 1)

    return of_batch


def _spread(seconds: list[float]) -> dict[str, float] | None:
    """None of no steps."""
    if not seconds:
        return None
    quarters = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    named = ("least", "quarter", "median", "three_quarters", "most")
    return dict(zip(named, (min(seconds), *quarters, max(seconds)), strict=True))


def _peak(compute: str) -> tuple[float, str]:
    """FLOPs per second of all devices at best, and where that number is from."""
    device = jax.devices()[0]
    if device.device_kind in KINDS:
        made = CHIPS[KINDS[device.device_kind]]
        return made.flops * jax.device_count(), f"dense bfloat16 of {made.name}, by its maker"
    best = _product(2048 if device.platform == "cpu" else 8192, compute)
    # The devices of a CPU are the same cores.
    count = jax.process_count() if device.platform == "cpu" else jax.device_count()
    return best * count, f"a product of {compute} matrices, measured in this run"


def _product(size: int, compute: str) -> float:
    """FLOPs per second of a product of two square matrices, the best of several, on one device."""
    a = jnp.ones((size, size), compute)
    product = jax.jit(lambda a, b: a @ b)
    jax.block_until_ready(product(a, a))
    best = float("inf")
    for _ in range(7):
        began = time.monotonic()
        jax.block_until_ready(product(a, a))
        best = min(best, time.monotonic() - began)
    return 2 * size**3 / best


def _memory(steps: list[Any]) -> tuple[int, str]:
    """Bytes of the device that has most in use, and who counts them."""
    from mmjax.plan.program import memory_of

    stats = [d.memory_stats() or {} for d in jax.local_devices()]
    if all("peak_bytes_in_use" in s for s in stats):
        return max(s["peak_bytes_in_use"] for s in stats), "in use at the peak, by the devices' own count"
    return max(memory_of(step).total for step in steps), "of the train step, as the compiler states it"


if __name__ == "__main__":
    config.main(run)
