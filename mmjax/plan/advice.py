"""What to change where a step does not fit, found by compiling: no advice is given that was not seen to fit."""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, fields, replace

from mmjax.core import tree
from mmjax.core.errors import InputError
from mmjax.core.meshes import MESH_AXES
from mmjax.nn import transformer
from mmjax.plan.program import Program, TooLarge, learnt, with_flag
from mmjax.sequence.buckets import MULTIPLE
from mmjax.train.config import Config
from mmjax.train.stages import Part

PARTS = ("vision", "connector", "decoder")  # of a model, in the order in which they run
LEAST = 256  # tokens of a row, below which rows are not cut
TEXT = 64  # tokens that a row has room for besides the largest picture
# Pictures by which the largest is found: up to eight times as long as they are wide.
SHAPES = tuple((4096 // a, 4096 // b) for n in range(1, 9) for a, b in ((1, n), (n, 1)))


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
    reached: Collection[str] = PARTS,
) -> Advice | None:
    """Changes one thing after the other until the step fits; None where nothing is left to change.

    Args:
      cfg: what does not fit.
      sizes: of the mesh's axes.
      state: bytes of the state on each chip.
      memory: bytes of a chip.
      attempt: compiles the largest bucket of a config.
      say: is told of every try.
      reached: the parts of the model that the backward pass goes through.
    """
    changes: list[Change] = []
    for change, new, held in ladder(cfg, sizes, state, memory, reached):
        changes.append(change)
        if held > memory:
            continue  # parameters and optimizer alone would be too large
        say(f"trying {' '.join(str(c) for c in changes[-1:])}")
        made = attempt(new)
        if isinstance(made, Program):
            return Advice(tuple(changes), new, made)
    return None


def reached(part: Part) -> tuple[str, ...]:
    """The parts of the model that a stage's backward pass goes through: from the first on that has any to train."""
    moving = tree.choose(part.spec, part.cfg.update.frozen)[1]
    return PARTS[min((PARTS.index(name) for name in moving if name in PARTS), default=len(PARTS) - 1) :]


def remats(cfg: Config, reached: Collection[str] = PARTS) -> tuple[str, ...]:
    """The fields that say what the backward pass keeps of each stack of blocks, whichever the model has."""
    return tuple(
        f"model.{part}.{f.name}.remat"
        for part in reversed(PARTS)
        if part in reached
        if (of := getattr(cfg.model, part)) is not None
        for f in fields(of)
        if isinstance(getattr(of, f.name), transformer.Config)
    )


def ladder(
    cfg: Config, sizes: dict[str, int], state: float, memory: float, reached: Collection[str] = PARTS
) -> Iterator[tuple[Change, Config, float]]:
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
        flags = {n.replace(".", "__"): policy for n in remats(cfg, reached) if _get(cfg, n) in weaker}
        if flags:
            yield changed(f"backwards, computes {why}", **flags), cfg, state
    while (parts := 2 * cfg.update.accumulate) <= _rows(cfg, sizes) and _rows(cfg, sizes) % parts == 0:
        yield changed("rows through the model in parts", update__accumulate=parts), cfg, state
    while (chunk := max(256, _chunk(cfg) // 4)) < _chunk(cfg):
        yield changed("fewer logits at a time", objective__chunk=chunk), cfg, state
    while sizes["data"] % 2 == 0:
        yield shard(), cfg, state
    most = largest(cfg)
    while cfg.packing.tokens // 2 >= max(LEAST, most.tokens + TEXT):
        flags = {"packing__tokens": cfg.packing.tokens // 2}
        if cfg.model.sees:
            flags["packing__shapes"] = _halved(cfg, most)
            if flags["packing__shapes"] == cfg.packing.shapes:
                break
        if cfg.sequence.answer:
            flags["sequence__answer"] = max(cfg.sequence.answer // 2, 1)
        yield changed("shorter rows", **flags), cfg, state


@dataclass(frozen=True)
class Largest:
    """What the largest picture takes: tokens of the sequence, patches, views."""

    tokens: int
    patches: int
    views: int


def largest(cfg: Config) -> Largest:
    """The most of everything that any of SHAPES takes, as the run's policy shows them; without what is written beside
    them.
    """
    found = [Largest(0, 1, 1)]
    for height, width in SHAPES if cfg.model.sees else ():
        try:
            views, slots = (cfg.resolution.grid(height, width),), None
            if hasattr(cfg.resolution, "picture"):
                shown = cfg.resolution.picture(height, width)
                views, slots = shown.views, shown.slots
            tokens = sum(cfg.model.connector.tokens((1, *view)) for view in views) if slots is None else len(slots)
        except InputError:
            continue  # a shape that the policy refuses does not come
        tokens = tokens if cfg.model.decoder.cross is None else 0
        found.append(Largest(tokens, sum(map(math.prod, views)), len(views)))
    return Largest(*(max(getattr(one, f.name) for one in found) for f in fields(Largest)))


def _halved(cfg: Config, most: Largest) -> tuple[tuple[int, int], ...]:
    """Shapes of half as many pictures, each with as many patches as before, and room for the largest picture."""
    square = math.lcm(MULTIPLE, cfg.model.connector.square**2)
    out = {}
    for patches, images in cfg.packing.shapes:
        half = min(max(images // 2, most.views), images)
        whole = max(-(-patches * half // images), most.patches)
        out[min(-(-whole // square) * square, patches), half] = None
    return tuple(out)


def _chunk(cfg: Config) -> int:
    """Tokens of a row whose logits exist at a time."""
    return min(cfg.objective.chunk, learnt(cfg))


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
