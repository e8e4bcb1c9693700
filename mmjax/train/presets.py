"""Stages by name, as they are given on a command line."""

import difflib
import re
from collections.abc import Sequence

from mmjax.core.errors import InputError
from mmjax.train.config import Stage

# What trains, and the learning rate at its peak: those of LLaVA 1.5 (Liu et al. 2023, table 9).
PRESETS: dict[str, tuple[tuple[str, ...], float]] = {
    "connector": (("connector",), 1e-3),
    "decoder": (("decoder",), 2e-5),
    "vision": (("vision",), 2e-6),
    "lora": (("*/kernel/a", "*/kernel/b"), 2e-4),
    "everything": (("*",), 2e-5),
}


def stages(texts: Sequence[str]) -> tuple[Stage, ...]:
    """Stages from `NAME[+NAME…]:STEPS[:RATE]`; a NAME is a preset or a pattern, either with "!" for "but not".

    The rate is the first preset's that is trained.

    Raises:
      InputError: a text that is none of these.
    """
    return tuple(map(_stage, texts))


def _stage(text: str) -> Stage:
    found = re.fullmatch(r"([^:]+):(\d+)(?::([^:]+))?", text)
    if found is None:
        raise InputError(f"The stage {text!r} is not NAME:STEPS or NAME:STEPS:RATE, as connector:200 or lora:500:2e-4.")
    names, steps, rate = found[1].split("+"), int(found[2]), found[3]
    trains: dict[str, None] = {}
    for name in names:
        bare = name.removeprefix("!")
        given = PRESETS[bare][0] if bare in PRESETS else (_pattern(bare),)
        trains |= dict.fromkeys(name[: -len(bare)] + pattern for pattern in given)
    try:
        learning_rate = next((PRESETS[n][1] for n in names if n in PRESETS), 0.0) if rate is None else float(rate)
    except ValueError as error:
        raise InputError(f"The stage {text!r} has the learning rate {rate!r}; give a number, as 2e-4.") from error
    return Stage(found[1], steps, tuple(trains), learning_rate)


def _pattern(name: str) -> str:
    """A pattern; a word that is nearly a preset's is refused here, others where the parameters are known."""
    near = difflib.get_close_matches(name, PRESETS, 1, 0.7)
    if near and not set(name) & set("*/"):
        raise InputError(f"There is no stage {name!r}; did you mean {near[0]!r}?")
    return name
