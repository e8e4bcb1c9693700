"""The training loop: plan, compile, train, checkpoint, evaluate, report."""

import dataclasses
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from mmjax.checkpoint import Checkpoints
from mmjax.core import config as configs
from mmjax.core import spec as specs
from mmjax.core.errors import InputError
from mmjax.core.files import lock_directory, require_space
from mmjax.core.sharding import Rules, make_mesh
from mmjax.core.tree import nbytes
from mmjax.data.source import read
from mmjax.models import vlm
from mmjax.sequence import batch as batches
from mmjax.sequence import invariants
from mmjax.train import report, state
from mmjax.train.config import Config
from mmjax.train.prepare import Data, prepare_data
from mmjax.train.state import TrainState
from mmjax.train.step import batch_shardings, compile_step
from mmjax.train.watch import Compiles, StopRequest

CONFIG, RESULT, CURVE = "config.json", "result.json", "loss.png"
# Fields that resuming may change; where documents and tokenizer lie may, for what they are is compared by fingerprint.
MAY_CHANGE = re.compile(
    r"out|mesh\..*|threads|keep|save_every|packing\.memory|data\.tokenizer|data\.sources\.\d+\.(path|root|errors)"
)


@dataclasses.dataclass(frozen=True)
class Programs:
    """Everything compiled, ahead of time."""

    steps: list[jax.stages.Compiled]  # by bucket
    placed: list[batches.Batch]  # shardings of each bucket's batches
    compiles: int  # of train steps
    seconds: float  # of all


def run(cfg: Config) -> int:
    """Trains what a config says and returns the exit status; see configs/quickstart.py for what it leaves in cfg.out.

    Given the same config again, it goes on from the last checkpoint: the losses are bit-identical to those of a run
    that was never stopped, on the same number of devices.

    Raises:
      InputError: for everything the user can mend, as early as it can be known.
    """
    began = time.monotonic()
    mesh = make_mesh(cfg.mesh)
    data = prepare_data(cfg, rows_multiple=mesh.shape["data"] * mesh.shape["fsdp"])
    cfg.out.mkdir(parents=True, exist_ok=True)
    with lock_directory(cfg.out), StopRequest() as stop:
        spec, tx = vlm.spec(cfg.model), state.optimizer(cfg.optimizer, cfg.steps)
        shape = state.abstract(spec, tx, mesh, Rules())
        require_space(cfg.out, (cfg.keep + 1) * nbytes(shape), f"keep {cfg.keep + 1} checkpoints")
        with Checkpoints(cfg.out / "checkpoints", keep=cfg.keep) as checkpoints:
            before = _refuse_another_run(cfg, data, checkpoints)
            report.write_json(cfg.out / CONFIG, configs.flatten(cfg))
            print(data.training.plan.table())
            report.print_budget(data.training.layout)
            programs = compile_all(cfg, data, shape, mesh)
            if checkpoints.steps():
                now, _ = checkpoints.restore(shape)
            else:
                now = state.create_sharded(spec, tx, shape, jax.random.key(cfg.seed))
            loop = Loop(cfg, data, programs, checkpoints, began - before.get("seconds", 0.0), before)
            now = loop.train(now, stop)
            if stop.status is not None:
                return stop.status
            loop.finish(now)
    return 0


def compile_all(cfg: Config, data: Data, shape: TrainState, mesh: jax.sharding.Mesh) -> Programs:
    """The train step of every bucket and the evaluation, compiled."""
    counter, rules = Compiles(), Rules()
    tx = state.optimizer(cfg.optimizer, cfg.steps)
    source, steps, placed = data.training, [], []
    for bucket in source.plan.buckets:
        batch = batches.abstract(bucket, source.values, source.vocab, source.cfg)
        steps.append(compile_step(shape, batch, cfg.model, tx, mesh, rules, cfg.objective))
        placed.append(batch_shardings(batch, mesh, rules))
    compiles = counter.count
    data.evaluation.compile(cfg, shape.params, mesh, rules)
    return Programs(steps, placed, compiles, counter.seconds)


def _refuse_another_run(cfg: Config, data: Data, checkpoints: Checkpoints) -> dict[str, Any]:
    """The last checkpoint's metadata, {} where there is none.

    Raises:
      InputError: it belongs to a run with other settings; the message names them.
    """
    steps = checkpoints.steps()
    if not steps:
        return {}
    before = checkpoints.metadata(steps[-1])
    now = configs.flatten(cfg)
    then = before["config"]
    changed = [k for k in sorted(now.keys() | then.keys()) if now.get(k) != then.get(k) and not MAY_CHANGE.fullmatch(k)]
    what = [f"{k} ({then.get(k)} → {now.get(k)})" for k in changed]
    told, found = before.get("datasets", {}), data.fingerprints
    what += [f"the documents of {name!r}" for name in sorted(told | found) if told.get(name) != found.get(name)]
    what += [] if before["tokenizer"] == data.tokenizer.fingerprint else ["the tokenizer"]
    if what:
        raise InputError(
            f"{cfg.out} holds a run with other settings: {', '.join(what)}; set them back to resume it, or give "
            f"another --out."
        )
    return before


@dataclasses.dataclass
class Loop:
    """A run in motion."""

    cfg: Config
    data: Data
    programs: Programs
    checkpoints: Checkpoints
    began: float  # time.monotonic() when the run would have begun in one go
    before: dict[str, Any]  # the metadata it resumes from
    trained: float = 0.0  # seconds in the loop, over all sessions
    tokens: int = 0  # useful tokens trained on, over all sessions
    late: int = 0  # programs compiled after the loop began
    waiting: float = 0.0  # seconds in which the loop waited for data, over all sessions

    def __post_init__(self):
        self.trained, self.tokens = self.before.get("trained", 0.0), self.before.get("tokens", 0)
        self.late, self.waiting = self.before.get("late", 0), self.before.get("waiting", 0.0)

    def train(self, now: TrainState, stop: StopRequest) -> TrainState:
        """Steps until the last, or until asked to stop; either way the last step done is saved."""
        cfg, start = self.cfg, int(now.step)
        if not self.checkpoints.steps():
            self._save(0, now)  # and so nothing about saving is compiled in the loop
        fill = self.data.training.plan.fill
        counter = Compiles()
        loop_began, trained_before, saved = time.monotonic(), self.trained, start
        step = start
        with report.Metrics(cfg.out, start) as metrics, report.Progress(cfg.steps, start) as progress:
            fed = self._timed(read(self.data.training, start, threads=cfg.threads))
            for step, batch in enumerate(fed, start + 1):
                bucket = self.data.training.plan.steps[step - 1].bucket
                now, seen = self.programs.steps[bucket](now, jax.device_put(batch, self.programs.placed[bucket]))
                seen = jax.device_get(seen)
                self._refuse_violations(step, seen["violations"])
                self.tokens += int(seen["tokens"])
                self.trained = trained_before + time.monotonic() - loop_began
                loss = float(seen["loss"] / max(seen["weight"], 1.0))
                accuracy = float(seen["correct"] / max(seen["weight"], 1.0))
                rate = self.tokens / self.trained
                metrics.write(step, loss=loss, accuracy=accuracy, grad_norm=float(seen["grad_norm"]))
                progress.update(step, loss, rate, fill)
                last = step == cfg.steps or stop.status is not None
                self.late = self.before.get("late", 0) + counter.count
                if last or step % cfg.save_every == 0:
                    metrics.flush()
                    self._save(step, now)
                    saved = step
                if last:
                    break
        assert saved == step, "the last step was not saved"
        self.checkpoints.wait()
        return now

    def _timed(self, of: Iterator[batches.Batch]) -> Iterator[batches.Batch]:
        """The same, and how long it is waited for."""
        while True:
            asked = time.monotonic()
            batch = next(of, None)
            self.waiting += time.monotonic() - asked
            if batch is None:
                return
            yield batch

    def _save(self, step: int, now: TrainState) -> None:
        metadata = {
            "config": configs.flatten(self.cfg),
            "tokenizer": self.data.tokenizer.fingerprint,
            "datasets": self.data.fingerprints,
            "seconds": time.monotonic() - self.began,
            "trained": self.trained,
            "tokens": self.tokens,
            "late": self.late,
            "waiting": self.waiting,
        }
        self.checkpoints.save(step, now, metadata=metadata)

    def _refuse_violations(self, step: int, violations: np.ndarray) -> None:
        if violations.any():
            ids = [self.data.training.ids(step - 1, row) for row in range(len(violations))]
            raise InputError(f"Step {step}: {invariants.describe(violations, ids)}")

    def finish(self, now: TrainState) -> None:
        """Evaluates, and writes result.json and the pictures."""
        cfg, plan = self.cfg, self.data.training.plan
        report.draw_curve(cfg.out, CURVE)
        judged = self.data.evaluation.judge(state.averaged(now), cfg.out)
        shown = {k: judged.pop(k) for k in ("answers",) if k in judged}  # long: last
        result = judged | {
            "seconds": round(time.monotonic() - self.began, 1),
            "steps": cfg.steps,
            "parameters": specs.count(vlm.spec(cfg.model)),
            "documents": sum(len(row) for step in plan.steps for row in step.rows),
            "tokens_per_second": round(self.tokens / self.trained, 1),
            "waiting": self.waiting / self.trained,
            "fill": plan.fill,
            "fill_tokens": plan.fill_tokens,
            "fill_patches": plan.fill_patches,
            "buckets": [dataclasses.asdict(b) for b in plan.buckets],
            "compiles": self.programs.compiles,
            "compiles_in_loop": self.late,
            "compile_seconds": round(self.programs.seconds, 2),
            "holes": len(self.data.training.holes.reasons),
            "final_loss": report.losses(cfg.out)[-1][1],
            "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
            "jax": jax.__version__,
        }
        report.write_json(cfg.out / RESULT, result | shown)
        print(f"{self.data.evaluation.said(judged)} in {result['seconds']:.0f} s; see {cfg.out / RESULT}")
