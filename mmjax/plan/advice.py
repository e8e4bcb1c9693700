"""What to change where a step does not fit, found by compiling: no advice is given that was not seen to fit."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from mmjax.core.meshes import MESH_AXES
from mmjax.plan.program import Program, TooLarge, with_flag
from mmjax.train.config import Config

REMATS = ("model.decoder.blocks.remat", "model.vision.blocks.remat")
LEAST = 256  # tokens of a row, below which rows are not cut


@dataclass(frozen=True)
class Change:
    """One thing to change: flags as on the command line, and why."""

    flags: tuple[tuple[str, str], ...]
    why: str

    def __str__(self) -> str:
        return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in self.flags) + f"   ({self.why})"


@dataclass(frozen=True)
class Advice:
    """What to change, all together, and the step that then fits."""

    changes: tuple[Change, ...]
    cfg: Config
    program: Program

    @property
    def _last(self) -> dict[str, str]:
        """The last value of every flag."""
        return {name: value for change in self.changes for name, value in change.flags}

    @property
    def flags(self) -> str:
        """All of it, as on the command line."""
        return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in self._last.items())

    @property
    def standing(self) -> tuple[Change, ...]:
        """The changes that no later one replaces."""
        return tuple(c for c in self.changes if any(self._last[name] == value for name, value in c.flags))


def find(
    cfg: Config,
    sizes: dict[str, int],
    state: float,
    memory: float,
    attempt: Callable[[Config], Program | TooLarge],
    say: Callable[[str], None] = lambda line: None,
) -> Advice | None:
    """Changes one thing after the other until the step fits; None where nothing is left to change.

    Args:
      cfg: what does not fit.
      sizes: of the mesh's axes.
      state: bytes of the state on each chip.
      memory: bytes of a chip.
      attempt: compiles the largest bucket of a config.
      say: is told of every try.
    """
    changes: list[Change] = []
    for change, new, held in ladder(cfg, sizes, state, memory):
        changes.append(change)
        if held > memory:
            continue  # parameters and optimizer alone would be too large
        say(f"trying {' '.join(str(c) for c in changes[-1:])}")
        made = attempt(new)
        if isinstance(made, Program):
            return Advice(tuple(changes), new, made)
    return None


def ladder(cfg: Config, sizes: dict[str, int], state: float, memory: float) -> Iterator[tuple[Change, Config, float]]:
    """Changes, each on top of those before: first what costs least time. With each the state's bytes on a chip."""
    sizes = dict(sizes)
    cfg = replace(cfg, mesh=replace(cfg.mesh, **sizes))

    def changed(why: str, **flags) -> Change:
        nonlocal cfg
        for name, value in flags.items():
            cfg = with_flag(cfg, name.replace("__", "."), value)
        return Change(tuple((name.replace("__", "."), _written(value)) for name, value in flags.items()), why)

    def shard() -> Change:
        nonlocal state
        sizes["data"], sizes["fsdp"], state = sizes["data"] // 2, sizes["fsdp"] * 2, state / 2
        return changed("parameters and optimizer over more chips", mesh__data=sizes["data"], mesh__fsdp=sizes["fsdp"])

    while state > memory / 2 and sizes["data"] % 2 == 0:
        yield shard(), cfg, state
    for policy, why in (("attention", "activations again, but attention"), ("full", "all activations again")):
        weaker = {"attention": ("none", "dots", "dots_attention"), "full": ("attention",)}[policy]
        flags = {n.replace(".", "__"): policy for n in REMATS if _get(cfg, n) in weaker}
        if flags:
            yield changed(f"backwards, computes {why}", **flags), cfg, state
    while (parts := 2 * cfg.update.accumulate) <= _rows(cfg, sizes) and _rows(cfg, sizes) % parts == 0:
        yield changed("rows through the model in parts", update__accumulate=parts), cfg, state
    while (chunk := max(256, _chunk(cfg) // 4)) < _chunk(cfg):
        yield changed("fewer logits at a time", objective__chunk=chunk), cfg, state
    while sizes["data"] % 2 == 0:
        yield shard(), cfg, state
    while any(n > 1 for _, n in cfg.packing.shapes) and cfg.packing.tokens >= 2 * LEAST:
        yield changed("shorter rows", packing__tokens=cfg.packing.tokens // 2, packing__shapes=_halved(cfg)), cfg, state


def _halved(cfg: Config) -> tuple[tuple[int, int], ...]:
    """Shapes of half as many pictures, at least one, each with as many patches as before: no picture is cut."""
    left = ((p, n, max(n // 2, 1)) for p, n in cfg.packing.shapes)
    return tuple(dict.fromkeys((-(-p * half // (8 * n)) * 8, half) for p, n, half in left))


def _chunk(cfg: Config) -> int:
    """Tokens of a row whose logits exist at a time."""
    return min(cfg.objective.chunk, cfg.packing.tokens)


def _rows(cfg: Config, sizes: dict[str, int]) -> int:
    """Rows of a step on each chip."""
    return cfg.packing.rows // (sizes["data"] * sizes["fsdp"])


def _get(cfg: Config, name: str) -> object:
    for part in name.split("."):
        cfg = getattr(cfg, part)
    return cfg


def _written(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(str(n) for pair in value for n in pair)
    return str(value)


def axes(mesh) -> dict[str, int]:
    """The sizes of a mesh's axes."""
    return {name: int(mesh.shape[name]) for name in MESH_AXES}
