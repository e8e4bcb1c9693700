"""The training loop: plan, compile, train, checkpoint, evaluate, report."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from mmjax.checkpoint import Checkpoints
from mmjax.core import config as configs
from mmjax.core import processes
from mmjax.core import spec as specs
from mmjax.core.checksum import checksums
from mmjax.core.errors import InputError
from mmjax.core.files import lock_directory, require_space
from mmjax.core.meshes import Rules, make_mesh
from mmjax.core.tree import nbytes
from mmjax.data.source import Source, read
from mmjax.sequence import batch as batches
from mmjax.sequence import invariants
from mmjax.train import cluster, parameters, report, stages, start, state
from mmjax.train.config import Config
from mmjax.train.features import Towers, compile_towers, without_patches
from mmjax.train.prepare import Data, prepare_data
from mmjax.train.resume import refuse_another_run
from mmjax.train.state import TrainState
from mmjax.train.step import batch_shardings, by_rows, compile_step, cut, known_shardings, of_devices
from mmjax.train.watch import Compiles, StopRequest

CONFIG, START, RESULT, CURVE = "config.json", "start.json", "result.json", "loss.png"

log = logging.getLogger("mmjax")


@dataclasses.dataclass(frozen=True)
class Programs:
    """Everything compiled, ahead of time."""

    steps: list[jax.stages.Compiled]  # by bucket
    shapes: list[tuple[Any, ...]]  # of a batch, all rows, cut into parts, and of what is known of it (train.features)
    placed: list[tuple[Any, ...]]  # their shardings
    asking: jax.sharding.NamedSharding  # of what every process is asked to do
    compiles: int  # of train steps
    seconds: float  # of all
    towers: Towers | None = None  # where what a frozen tower makes is kept

    def run(
        self, bucket: int, now: TrainState, fed: Any, asking: jax.Array, parts: int
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """A step on this process' rows of a batch (`fed`: what the source gives), cut into so many parts."""
        fed = self.towers(bucket, now.params, *fed) if self.towers else (fed,)
        batch, *known = cluster.place(cut(fed, parts), self.placed[bucket], self.shapes[bucket])
        return self.steps[bucket](now, batch, asking, *known)

    def feed(self, source: Source, params: dict) -> Any:
        """What `run` is to be fed with, by step, once the parameters are there."""
        return self.towers.start(params, source) if self.towers else source


def run(cfg: Config) -> int:
    """Trains what a config says and returns the exit status; see configs/quickstart.py for what it leaves in cfg.out.

    Given the same config again, it goes on from the last checkpoint: the losses are bit-identical to those of a run
    that was never stopped, on the same number of devices. Where several processes run it (see train.cluster), each
    loads its share of every batch, all see the same cfg.out, and the first alone writes there, but for the checkpoints.

    Raises:
      InputError: for everything the user can mend, as early as it can be known.
    """
    began = time.monotonic()
    with cluster.joined(cfg.cluster):
        mesh = make_mesh(cfg.mesh)
        parts = stages.parts(cfg)
        data = prepare_data(cfg, *cluster.parts(mesh, Rules()))
        shapes = [stages.abstract(part, mesh) for part in parts]
        held = [stages.own(part, shape) for part, shape in zip(parts, shapes, strict=True)]  # by checkpoints
        folder = cfg.out / "checkpoints"
        with (
            _owned(cfg, (cfg.keep + 1) * max(map(nbytes, held))),
            StopRequest() as stop,
            Checkpoints(folder, keep=cfg.keep, every=cfg.keep_every) as checkpoints,
        ):
            before = refuse_another_run(cfg, data, checkpoints)
            if processes.index() == 0:
                report.write_json(cfg.out / CONFIG, configs.flatten(cfg))
                print(data.training.plan.table())
                report.print_budget(data.training.layout)
            now = None
            if before:
                like = lambda step: held[stages.at(parts, step)]  # noqa: E731 (of the step that is whole)
                now, before = checkpoints.restore(like, fallback=cfg.fallback)
                now = start.completed(parts[0], shapes[0], now)
                if start.borrowed(parts[0], now.params) != before.get("borrowed", ""):
                    raise InputError(f"The model in {cfg.base} is not the one that {cfg.out} began with; put it back.")
            programs = compile_all(cfg, data, parts, shapes, mesh, done=0 if now is None else int(now.step))
            loop = Loop(cfg, data, parts, programs, checkpoints, began - before.get("seconds", 0.0), before)
            if now is None:
                now = start.start(parts[0], shapes[0])
                loop.judge_start(now)
            loop.borrowed = start.borrowed(parts[0], now.params)
            for n in programs:
                now = stages.begun(parts[n], shapes[n], now)
                now = loop.train(now, stop, n)
                if loop.asked:
                    return loop.asked
            loop.finish(now)
    return 0


@contextlib.contextmanager
def _owned(cfg: Config, needed: int) -> Iterator[None]:
    """cfg.out, held by the first process for all; it must have room for `needed` bytes."""
    with contextlib.ExitStack() as stack:

        def hold() -> None:
            cfg.out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock_directory(cfg.out))
            require_space(cfg.out, needed, f"keep {cfg.keep + 1} checkpoints")

        processes.from_first(hold)
        yield


def compile_all(
    cfg: Config,
    data: Data,
    parts: Sequence[stages.Part],
    shapes: Sequence[TrainState],
    mesh: jax.sharding.Mesh,
    done: int = 0,
) -> dict[int, Programs]:
    """The train step of every bucket in every stage that has steps after `done` (at least the last), compiled, and the
    evaluation.
    """
    counter = Compiles()
    left = [n for n, part in enumerate(parts) if part.last > done or n == len(parts) - 1]
    programs = {n: compile_steps(parts[n].cfg, data.training, shapes[n], mesh) for n in left}
    data.evaluation.compile(cfg, shapes[-1].params, mesh, Rules())
    rest = counter.seconds - sum(of.seconds for of in programs.values())  # towers and the evaluation
    last = programs[left[-1]]
    return programs | {left[-1]: dataclasses.replace(last, seconds=last.seconds + rest)}


def compile_steps(cfg: Config, source: Source, shape: TrainState, mesh: jax.sharding.Mesh) -> Programs:
    """The train step of every bucket, compiled."""
    towers, rules, parts = compile_towers(cfg, source, shape.params, mesh), Rules(), cfg.update.accumulate
    counter, tx = Compiles(), state.optimizer(cfg.optimizer, cfg.steps)
    drops = stages.drops(cfg)
    steps, shapes, placed = [], [], []
    for number, bucket in enumerate(source.plan.buckets):
        batch, kept = batches.abstract(bucket, source.values, source.vocab, source.cfg), {}
        if towers:
            batch = without_patches(batch)
            kept = {"known": by_rows(towers.shapes[number]), "after": towers.after}
        steps.append(compile_step(shape, batch, cfg.model, tx, mesh, rules, cfg.objective, cfg.update, **drops, **kept))
        shapes.append(cut((batch, kept["known"]) if kept else (batch,), parts))
        lay = (batch_shardings, known_shardings)[: len(shapes[-1])]
        placed.append(tuple(of(x, mesh, rules, parts) for of, x in zip(lay, shapes[-1], strict=True)))
    return Programs(steps, shapes, placed, of_devices(mesh), counter.count, counter.seconds, towers)


@dataclasses.dataclass
class Loop:
    """A run in motion."""

    cfg: Config
    data: Data
    parts: Sequence[stages.Part]
    programs: dict[int, Programs]  # by stage
    checkpoints: Checkpoints
    began: float  # time.monotonic() when the run would have begun in one go
    before: dict[str, Any]  # the metadata it resumes from
    trained: float = 0.0  # seconds in the loop, over all sessions
    tokens: int = 0  # useful tokens trained on, over all sessions
    late: int = 0  # programs compiled after the loop began
    waiting: float = 0.0  # seconds in which the loop waited for data, over all sessions
    borrowed: str = ""  # names what is the base's all the time (train.start.borrowed)
    asked: int = 0  # the exit status that any process was asked to end with

    def __post_init__(self):
        self.trained, self.tokens = self.before.get("trained", 0.0), self.before.get("tokens", 0)
        self.late, self.waiting = self.before.get("late", 0), self.before.get("waiting", 0.0)
        self.data.training.holes.reasons |= self.before.get("holes", {})

    def train(self, now: TrainState, stop: StopRequest, stage: int) -> TrainState:
        """Steps of a stage until its last, or until asked to stop; either way the last step done is saved.

        What a step says is read while the next one runs, so that no device waits for the host.
        """
        cfg, start, last = self.cfg, int(now.step), self.parts[stage].last
        programs = self.programs[stage]
        if not self.checkpoints.steps():
            self._save(0, now)  # and so nothing about saving is compiled in the loop
        elif start == self.parts[stage].first:
            checksums(stages.own(self.parts[0], now))  # nor in that of a later stage, whose state is another
        asking = {status: self._asking(programs, status) for status in (0, *stop.STATUSES)}
        source = programs.feed(self.data.training, now.params)
        self.counter, self.late_before = Compiles(), self.late
        self.loop_began, self.trained_before = time.monotonic(), self.trained
        self.metrics = report.Metrics(cfg.out, start) if processes.index() == 0 else report.Silence()
        self.progress = report.Progress(cfg.steps, start) if processes.index() == 0 else report.Silence()
        step = saved = start
        with self.metrics, self.progress:
            fed = self._timed(read(source, start, last, threads=cfg.threads))
            unread = None
            for step, batch in enumerate(fed, start + 1):
                now, seen = self._step(programs, step, now, batch, asking[stop.status or 0])
                if unread:
                    self._read(*unread)
                unread = step, seen
                # Alone, a process need not wait for the step to tell it what it was asked.
                self.asked = self.asked or (stop.status or 0) * (jax.process_count() == 1)
                over = step == last or self.asked > 0
                if over or step % cfg.save_every == 0:
                    self._read(*unread)
                    unread = None
                    self.metrics.flush()
                    self._save(step, now)
                    saved = step
                if over:
                    break
        assert saved == step, "the last step was not saved"
        self.checkpoints.wait()
        return now

    def _step(
        self, programs: Programs, step: int, now: TrainState, fed: Any, asking: jax.Array
    ) -> tuple[TrainState, dict]:
        bucket = self.data.training.plan.steps[step - 1].bucket
        return programs.run(bucket, now, fed, asking, self.cfg.update.accumulate)

    def _asking(self, programs: Programs, status: int) -> jax.Array:
        return cluster.whole(np.full(programs.asking.mesh.size, status, np.int32), programs.asking)

    def _read(self, step: int, seen: dict[str, jax.Array]) -> None:
        """Waits for what a step says, writes it down, and ends the run where it must not go on."""
        seen = jax.device_get(seen)
        self._refuse_violations(step, seen["violations"])
        self.asked = self.asked or int(seen["asked"])
        self.tokens += int(seen["tokens"])
        self.trained = self.trained_before + time.monotonic() - self.loop_began
        self.late = self.late_before + self.counter.count
        loss = float(seen["loss"] / max(seen["weight"], 1.0))
        told = {
            "loss": loss,
            "accuracy": float(seen["correct"] / max(seen["weight"], 1.0)),
            "grad_norm": float(seen["grad_norm"]),
        }
        self.metrics.write(step, **told)
        self.progress.update(step, loss, self.tokens / self.trained, self.data.training.plan.fill)
        if seen["skipped"]:
            self._skip(step, int(seen["in_a_row"]), told)

    def _skip(self, step: int, in_a_row: int, told: dict[str, float]) -> None:
        """Tells of an update that was left out.

        Raises:
          InputError: too many were, one after the other.
        """
        self.metrics.skipped(step, [id for row in self._documents(step) for id in row], **told)
        why = f"loss {told['loss']:.4g}, norm of the gradient {told['grad_norm']:.4g}"
        if processes.index() == 0:
            log.warning("the update of step %d was left out (%s); see %s", step, why, report.SKIPPED)
        if in_a_row >= self.cfg.update.patience:
            raise InputError(
                f"The updates of steps {step - in_a_row + 1} to {step} were left out one after the other (the last: "
                f"{why}); the parameters are those of step {step - in_a_row}. Look at the documents in "
                f"{self.cfg.out / report.SKIPPED}; raise update.patience to go on, or begin again, in another --out, "
                f"with a lower optimizer.learning_rate."
            )

    def _timed(self, of: Iterator[Any]) -> Iterator[Any]:
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
            "tokenizer": self.data.writing,
            "datasets": self.data.fingerprints,
            "seconds": time.monotonic() - self.began,
            "trained": self.trained,
            "tokens": self.tokens,
            "late": self.late,
            "waiting": self.waiting,
            "holes": dict(self.data.training.holes.reasons),
            "borrowed": self.borrowed,
        }
        self.checkpoints.save(step, stages.own(self.parts[0], now), metadata=metadata)

    def _refuse_violations(self, step: int, violations: np.ndarray) -> None:
        if violations.any():
            if violations.ndim == 3:  # of parts, which took the rows in turn
                violations = violations.swapaxes(0, 1).reshape(-1, violations.shape[-1])
            raise InputError(f"Step {step}: {invariants.describe(violations, self._documents(step))}")

    def _documents(self, step: int) -> list[list[str]]:
        """The ids of every row's documents."""
        source = self.data.training
        return [source.ids(step - 1, row) for row in range(len(source.plan.steps[step - 1].rows))]

    def judge_start(self, now: TrainState) -> None:
        """Evaluates the model that the run starts from, if it is one."""
        if self.cfg.base is None:
            return
        judged = self.data.evaluation.judge(now.params, self.cfg.out)
        if processes.index() == 0:
            report.write_json(self.cfg.out / START, judged)
            print(f"before training: {self.data.evaluation.said(judged)}")

    def finish(self, now: TrainState) -> None:
        """Evaluates, and writes result.json and the pictures."""
        cfg, plan = self.cfg, self.data.training.plan
        judged = self.data.evaluation.judge(state.averaged(now), cfg.out)
        if processes.index() != 0:
            return
        report.draw_curve(cfg.out, CURVE)
        shown = {k: judged.pop(k) for k in ("answers",) if k in judged}  # long: last
        result = judged | {
            "seconds": round(time.monotonic() - self.began, 1),
            "steps": cfg.steps,
            "parameters": specs.count(parameters.spec(cfg)),
            "documents": sum(len(row) for step in plan.steps for row in step.rows),
            "tokens_per_second": round(self.tokens / self.trained, 1),
            "waiting": self.waiting / self.trained,
            "fill": plan.fill,
            "fill_tokens": plan.fill_tokens,
            "fill_patches": plan.fill_patches,
            "buckets": [dataclasses.asdict(b) for b in plan.buckets],
            "compiles": sum(programs.compiles for programs in self.programs.values()),
            "compiles_in_loop": self.late,
            "compile_seconds": round(sum(programs.seconds for programs in self.programs.values()), 2),
            "holes": len(self.data.training.holes.reasons),
            "skipped": int(now.guard.skipped),
            "final_loss": report.losses(cfg.out)[-1][1],
            "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
            "processes": jax.process_count(),
            "jax": jax.__version__,
        }
        towers = [programs.towers for programs in self.programs.values() if programs.towers]
        if towers:
            result["tower_steps"] = sum(of.runs for of in towers)
        if cfg.base is not None:
            result["before"] = {k: v for k, v in report.read_json(cfg.out / START).items() if k != "answers"}
        if cfg.stages:
            result["stages"] = [{"name": s.name, "steps": s.steps, "trains": s.trains} for s in cfg.stages]
        report.write_json(cfg.out / RESULT, result | shown)
        print(f"{self.data.evaluation.said(judged)} in {result['seconds']:.0f} s; see {cfg.out / RESULT}")
