"""The training loop: plan, compile, train, checkpoint, evaluate, report."""

import dataclasses
import functools
import time
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
from mmjax.data import drawings, index
from mmjax.data.memory import Memory
from mmjax.data.source import Holes, Source, read
from mmjax.models import vlm
from mmjax.sequence import batch as batches
from mmjax.sequence import invariants
from mmjax.sequence.budget import Budget, Limited
from mmjax.sequence.layout import layout
from mmjax.tokenizers import text
from mmjax.train import report, state
from mmjax.train.config import Config
from mmjax.train.evaluate import Evaluator
from mmjax.train.state import TrainState
from mmjax.train.step import batch_shardings, compile_step
from mmjax.train.watch import Compiles, StopRequest

CONFIG, RESULT, CURVE, SHEET = "config.json", "result.json", "loss.png", "answers.png"
MAY_CHANGE = ("out", "mesh.", "threads", "keep", "save_every", "packing.memory")  # fields that resuming may change


@dataclasses.dataclass(frozen=True)
class Data:
    """All that is known before anything is compiled or written."""

    tokenizer: text.Tokenizer
    training: Source
    questions: list[drawings.Question]
    evaluation: Source
    baseline: float


@dataclasses.dataclass(frozen=True)
class Programs:
    """Everything compiled, ahead of time."""

    steps: list[jax.stages.Compiled]  # by bucket
    placed: list[batches.Batch]  # shardings of each bucket's batches
    evaluator: Evaluator
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


def prepare_data(cfg: Config, rows_multiple: int = 1) -> Data:
    """Tokenizer, documents, plans: on the host, from lengths and headers alone.

    Raises:
      InputError: a setting that does not fit another (vocabulary, patch size, rows and devices).
    """
    tokenizer = text.load(drawings.tokenizer_model(), exact=True)
    if tokenizer.vocab.size != cfg.model.decoder.vocab:
        raise InputError(
            f"model.decoder.vocab is {cfg.model.decoder.vocab} but the tokenizer has {tokenizer.vocab.size} ids; "
            f"set it to {tokenizer.vocab.size}."
        )
    if cfg.resolution.patch != cfg.model.vision.embed.patch:
        raise InputError(
            f"resolution.patch is {cfg.resolution.patch} but model.vision.embed.patch is "
            f"{cfg.model.vision.embed.patch}; set both to the same number of pixels."
        )
    if cfg.packing.rows % rows_multiple:
        raise InputError(
            f"packing.rows is {cfg.packing.rows}, which {rows_multiple} devices of the data and fsdp axes cannot share "
            f"evenly; set it to a multiple of {rows_multiple}."
        )
    cfg.model.refuse(cfg.sequence)
    if cfg.model.placeholder not in (None, tokenizer.vocab.image):
        raise InputError(
            f"model.placeholder is {cfg.model.placeholder} but the tokenizer's image token is {tokenizer.vocab.image}; "
            f"set it to that."
        )
    fuse = "sequence" if cfg.model.decoder.cross is None else "cross"
    plain = lay = functools.partial(
        layout,
        tokenizer=tokenizer,
        resolution=cfg.resolution,
        media_tokens=cfg.model.connector.tokens,
        fuse=fuse,
    )
    if cfg.budget != Budget():
        lay = Limited(lay, cfg.budget, cfg.resolution, costs=vlm.costs(cfg.model))
    packing = cfg.packing
    # More documents than any packing could use: they cost nothing until they are read.
    documents = drawings.Training(cfg.data, cfg.steps * packing.rows * packing.tokens, cfg.seed)
    plan = index.training(
        documents,
        lay,
        steps=cfg.steps,
        k=packing.buckets,
        tokens=packing.tokens,
        rows=packing.rows,
        seed=cfg.seed,
        patches=packing.patches,
        long=packing.long,
    )
    patch = cfg.resolution.patch
    questions = drawings.held_out(cfg.data)
    ask = functools.partial(plain, answer=cfg.answer)
    asked = [q.document for q in questions]
    once = index.once(asked, ask, tokens=packing.tokens, rows=packing.rows)
    made = functools.partial(
        Source,
        vocab=tokenizer.vocab,
        patch=patch,
        cfg=cfg.sequence,
        latents=cfg.model.connector.per_picture,
        merge=cfg.sequence.merge,
        memory=Memory(packing.memory * 2**20),
        reduced=packing.reduced,
    )
    return Data(
        tokenizer,
        made(documents, lay, plan, holes=Holes(packing.holes)),
        questions,
        made(asked, ask, once),
        drawings.nearest_neighbour(cfg.data),
    )


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
    evaluator = Evaluator(data.evaluation, data.tokenizer, cfg.model, cfg.answer, shape.params, mesh, rules)
    return Programs(steps, placed, evaluator, compiles, counter.seconds)


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
    changed = [
        k for k in sorted(now.keys() | then.keys()) if now.get(k) != then.get(k) and not k.startswith(MAY_CHANGE)
    ]
    if changed or before["tokenizer"] != data.tokenizer.fingerprint:
        what = ", ".join(f"{k} ({then.get(k)} → {now.get(k)})" for k in changed) or "the tokenizer"
        raise InputError(
            f"{cfg.out} holds a run with other settings: {what}; set them back to resume it, or give another --out."
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

    def __post_init__(self):
        self.trained, self.tokens = self.before.get("trained", 0.0), self.before.get("tokens", 0)
        self.late = self.before.get("late", 0)

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
            for step, batch in enumerate(read(self.data.training, start, threads=cfg.threads), start + 1):
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

    def _save(self, step: int, now: TrainState) -> None:
        metadata = {
            "config": configs.flatten(self.cfg),
            "tokenizer": self.data.tokenizer.fingerprint,
            "seconds": time.monotonic() - self.began,
            "trained": self.trained,
            "tokens": self.tokens,
            "late": self.late,
        }
        self.checkpoints.save(step, now, metadata=metadata)

    def _refuse_violations(self, step: int, violations: np.ndarray) -> None:
        if violations.any():
            ids = [self.data.training.ids(step - 1, row) for row in range(len(violations))]
            raise InputError(f"Step {step}: {invariants.describe(violations, ids)}")

    def finish(self, now: TrainState) -> None:
        """Evaluates, and writes result.json and both pictures."""
        cfg, plan = self.cfg, self.data.training.plan
        answers = self.programs.evaluator.answers(state.averaged(now))
        right = [said == q.answer for said, q in zip(answers, self.data.questions, strict=True)]
        report.draw_curve(cfg.out, CURVE)
        report.draw_sheet(cfg.out, SHEET, self.data.questions, answers)
        result = {
            "exact_match": float(np.mean(right)),
            "baseline": self.data.baseline,
            "questions": len(right),
            "seconds": round(time.monotonic() - self.began, 1),
            "steps": cfg.steps,
            "parameters": specs.count(vlm.spec(cfg.model)),
            "documents": sum(len(row) for step in plan.steps for row in step.rows),
            "tokens_per_second": round(self.tokens / self.trained, 1),
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
            "answers": {q.answer: said for q, said in zip(self.data.questions, answers, strict=True)},
        }
        report.write_json(cfg.out / RESULT, result)
        print(
            f"named {result['exact_match']:.0%} of {len(right)} unseen drawings (pixel nearest neighbour: "
            f"{result['baseline']:.0%}) in {result['seconds']:.0f} s; see {cfg.out / SHEET} and {cfg.out / RESULT}"
        )
