"""Which parameters a run has, and which of them each stage trains: from the config alone."""

import dataclasses
import re

from mmjax.core import tree
from mmjax.core.errors import InputError
from mmjax.core.spec import ParamSpec, Spec
from mmjax.models import vlm
from mmjax.nn import lora
from mmjax.train.config import Config, Stage

FIXED = "/kernel/scale"  # of adapters (nn.lora): part of their config
OWN = r".*/kernel/(a|b|scale)"  # of adapters: no base has them


def spec(cfg: Config) -> Spec:
    """The parameters of a run, with its adapters.

    All are float32, but those of a base that no stage trains lie in the format they are computed in: half the memory,
    and the same numbers.

    Raises:
      InputError: what `moving` refuses.
    """
    of = vlm.spec(cfg.model)
    of = of if cfg.lora is None else lora.spec(of, cfg.lora)
    if cfg.base is None or cfg.update.compute == "float32":
        return of
    moved = trained(of, cfg)

    def lies(name: str, p: ParamSpec) -> ParamSpec:
        return p if name in moved or wide(name) else dataclasses.replace(p, dtype=cfg.update.compute)

    return tree.unflatten({name: lies(name, p) for name, p in tree.flatten(of).items()})


def wide(name: str) -> bool:
    """Whether a parameter is computed in float32 in any case (train.step.cast)."""
    return name.split("/")[-1] == "scale"


def trained(of: Spec, cfg: Config) -> set[str]:
    """The names of the parameters that any stage trains."""
    if not cfg.stages:
        return set(tree.flatten(tree.choose(of, cfg.update.frozen)[1]))
    return {name for stage in cfg.stages for name in moving(of, cfg, stage)}


def borrowed(of: Spec, cfg: Config) -> tuple[str, ...]:
    """The parameters that are the base's all the time, which checkpoints do not hold; patterns for core.tree.choose."""
    if cfg.base is None:
        return ()
    names = {name for name in tree.flatten(of) if not re.fullmatch(OWN, name)}
    return tree.cover(of, names - trained(of, cfg))


def moving(of: Spec, cfg: Config, stage: Stage) -> list[str]:
    """The names of the parameters that a stage trains.

    Raises:
      InputError: a pattern names none, or nothing is left to train.
    """
    try:
        chosen = tree.choose(tree.choose(of, cfg.update.frozen)[1], stage.trains)[0]
    except InputError as error:
        raise InputError(f"The stage {stage.name!r} cannot train {', '.join(stage.trains)}: {error}") from error
    names = [name for name in tree.flatten(chosen) if not name.endswith(FIXED)]
    if not names:
        raise InputError(f"The stage {stage.name!r} trains nothing; give patterns of other parameters.")
    return names
