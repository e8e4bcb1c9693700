"""A run's stages, one after the other: each is a run of its own that begins with the parameters of the one before."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import optax

from mmjax.core import tree
from mmjax.core.errors import InputError
from mmjax.core.meshes import Rules
from mmjax.core.spec import Spec
from mmjax.train import parameters, state
from mmjax.train.config import Config, Features
from mmjax.train.state import TrainState


@dataclass(frozen=True)
class Part:
    """The steps after `first`, up to `last`.

    cfg: the run as if it were these steps alone. spec: of all parameters. borrowed: those that are the base's all the
    time; checkpoints do not hold them.
    """

    name: str
    first: int
    last: int
    cfg: Config
    spec: Spec
    borrowed: tuple[str, ...] = ()


def parts(cfg: Config) -> tuple[Part, ...]:
    """The stages of a run; one where it has none.

    Raises:
      InputError: their steps do not add up to those of the run, a pattern names no parameter, or nothing is left to
        train.
    """
    if cfg.features.on and not cfg.model.sees:
        raise InputError("features are kept of pictures, and this model reads text alone; keep none.")
    if cfg.lora is not None and not cfg.stages:
        raise InputError("The config has adapters (lora) and no stages, which say when they are trained; give one.")
    if not cfg.stages:
        spec = parameters.spec(cfg)
        return (Part("", 0, cfg.steps, cfg, spec, parameters.borrowed(spec, cfg)),)
    if sum(stage.steps for stage in cfg.stages) != cfg.steps:
        told = " + ".join(str(stage.steps) for stage in cfg.stages)
        raise InputError(f"The stages have {told} steps, but steps is {cfg.steps}; set it to their sum.")
    out, first, spec = [], 0, parameters.spec(cfg)
    borrowed = parameters.borrowed(spec, cfg)
    for stage in cfg.stages:
        frozen = tree.cover(spec, tree.flatten(spec).keys() - parameters.moving(spec, cfg, stage))
        rate = stage.learning_rate or cfg.optimizer.learning_rate
        alone = dataclasses.replace(
            cfg,
            stages=(),
            steps=stage.steps,
            optimizer=dataclasses.replace(cfg.optimizer, learning_rate=rate),
            update=dataclasses.replace(cfg.update, frozen=frozen),
            features=cfg.features if "vision" in frozen else Features(),
        )
        out.append(Part(stage.name, first, first + stage.steps, alone, spec, borrowed))
        first += stage.steps
    if cfg.features.on and not any(part.cfg.features.on for part in out):
        raise InputError(
            "features.folder and features.memory keep what a frozen vision tower makes, but every stage trains it; "
            "keep no features."
        )
    return tuple(out)


def numbered(cfg: Config, number: int = 1) -> Part:
    """A stage by its number, from 1 on: what is planned (mmjax.plan) or timed (mmjax.bench). A run without has one.

    Raises:
      InputError: there are not so many; or as of `parts`.
    """
    found = parts(cfg)
    if not 1 <= number <= len(found):
        raise InputError(f"--stage is {number}, and the run has {len(found)}; give one of 1 to {len(found)}.")
    return found[number - 1]


def at(parts: Sequence[Part], step: int) -> int:
    """Which stage has made a step's state."""
    return next(n for n, part in enumerate(parts) if step <= part.last)


def abstract(part: Part, mesh: jax.sharding.Mesh) -> TrainState:
    """The state of a stage, without making it."""
    return state.abstract(part.spec, optimizer(part.cfg), mesh, Rules(), part.cfg.update.frozen)


def own(part: Part, now: TrainState) -> TrainState:
    """What a checkpoint holds of a state, abstract or not."""
    return now.replace(params=tree.choose(now.params, part.borrowed)[1])


def optimizer(cfg: Config) -> optax.GradientTransformation:
    """A stage's."""
    return state.optimizer(cfg.optimizer, cfg.steps)


def drops(cfg: Config) -> dict[str, Any]:
    """What train.step.compile_step is told of the dropout of adapters."""
    return {"dropout": cfg.lora.dropout, "seed": cfg.seed} if cfg.lora else {}


def begun(part: Part, shape: TrainState, now: TrainState) -> TrainState:
    """The state before a stage's first step, from that after the last of the stage before; any other as it is."""
    if int(now.step) != part.first or part.first == 0:
        return now
    new = state.of_params(now.params, optimizer(part.cfg), shape, part.cfg.update.frozen)
    return new.replace(step=now.step, guard=new.guard.replace(skipped=now.guard.skipped))
