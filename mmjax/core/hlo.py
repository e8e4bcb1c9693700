"""What a compiled program does, counted from its text: `count(parse(compiled.as_text()))`.

XLA's own `cost_analysis()` counts the body of a loop once and knows nothing of hand-written kernels, and for GPUs there
is none. Here loops count by their turns, every product by its shapes, also inside of fusions, and memory by what is
read and written between the fusions. All of it is of one device.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from mmjax.core import hlo_cost, hlo_groups
from mmjax.core.hlo_text import Computation, Module, Op, parse

__all__ = ["Collective", "Count", "Hints", "Kernel", "Unknown", "Work", "count", "parse"]

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
# What moves or computes nothing by itself.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("opt-barrier", "domain"),
}
GOES_ON = ("-done", "-update")  # counted where it starts
KERNELS = ("tpu_custom_call", "triton_kernel_call", "__gpu$xla.gpu.triton", "__cudnn$")  # whose work calls do not say
FREE_CALLS = {"AllocateBuffer", "ConcatBitcast", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"}


@dataclass(frozen=True)
class Collective:
    """A collective operation: its kind, the devices of the first of its groups, the bytes that a device sends.

    Each device sends as much as it gets: of n devices and B bytes, B being the larger of what goes in and what comes
    out, (n − 1) / n · B for a gather, a reduce-scatter or an all-to-all, and twice that for an all-reduce, as rings do
    it. `overlaps`: the compiler lets it run beside what is computed.
    """

    kind: str
    devices: tuple[int, ...]
    bytes: float
    overlaps: bool


@dataclass(frozen=True)
class Kernel:
    """What a hand-written kernel costs: floating-point operations of its products, bytes of memory."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Work:
    """One operation: of products, between memory and chip, among devices, and where in the program (`op_name`).

    cycles: what the TPU compiler itself estimates, 0 where it says nothing. loop: all turns of what is inside together.
    """

    name: str
    scope: str
    flops: float = 0.0
    bytes: float = 0.0
    cycles: float = 0.0
    collective: Collective | None = None
    loop: "Count | None" = None
    turns: float = 1.0


@dataclass(frozen=True)
class Unknown:
    """A loop whose turns, or a kernel whose cost, the text does not say."""

    name: str
    scope: str
    what: str


@dataclass
class Count:
    """All that a computation does, in order; `loop`s hold what is inside of them, of one turn."""

    work: list[Work] = field(default_factory=list)
    unknown: list[Unknown] = field(default_factory=list)

    def total(self, of: Callable[[Work], float]) -> float:
        """The sum of `of` over all operations, times the turns of the loops that they are in."""
        return sum(w.turns * w.loop.total(of) if w.loop else of(w) for w in self.work)

    @property
    def flops(self) -> float:
        return self.total(lambda w: w.flops)

    @property
    def bytes(self) -> float:
        return self.total(lambda w: w.bytes)

    @property
    def cycles(self) -> float:
        return self.total(lambda w: w.cycles)

    def every(self, turns: float = 1.0) -> Iterator[tuple[Work, float]]:
        """Every operation that is no loop, and how often it runs."""
        for w in self.work:
            if w.loop:
                yield from w.loop.every(turns * w.turns)
            else:
                yield w, turns

    def collectives(self) -> dict[str, dict[str, float]]:
        """By kind: how often, and how many bytes each device sends."""
        out: dict[str, dict[str, float]] = {}
        for w, turns in self.every():
            if w.collective:
                found = out.setdefault(w.collective.kind, {"count": 0.0, "bytes": 0.0})
                found["count"] += turns
                found["bytes"] += turns * w.collective.bytes
        return dict(sorted(out.items()))


@dataclass(frozen=True)
class Hints:
    """What the text does not say.

    turns: of a loop whose bounds are data; None if it is not known either.
    kernel: the cost of a kernel, from its operation, the cost that it states if it does, and the bytes of what it is
      given and gives; None if it is not known either.
    """

    turns: Callable[[Op], float | None] = lambda op: None
    kernel: Callable[[Op, Kernel | None, float], Kernel | None] = lambda op, stated, moved: stated


NO_HINTS = Hints()


def count(module: Module, hints: Hints = NO_HINTS) -> Count:
    """Counts a program; of branches, the one with the most work."""
    return _computation(module, module.entry, hints)


def _computation(module: Module, name: str, hints: Hints) -> Count:
    out, comp = Count(), module.computations[name]
    for op in comp.ops.values():
        out.work += _operation(module, comp, op, hints, out.unknown)
    return out


def _operation(module: Module, inside: Computation, op: Op, hints: Hints, unknown: list[Unknown]) -> Iterator[Work]:
    kind = op.kind
    if kind in FREE or kind.endswith(GOES_ON):
        return
    if kind == "while":
        yield _loop(module, inside, op, hints, unknown)
    elif kind == "conditional":
        branches = [_computation(module, name, hints) for name in op.called]
        most = max(branches, key=lambda c: (c.flops, c.bytes))
        unknown += most.unknown
        yield from most.work
    elif kind in ("call", "async-start"):
        for name in op.called:
            found = _computation(module, name, hints)
            unknown += found.unknown
            yield from (_beside(w) for w in found.work) if kind == "async-start" else found.work
    elif kind in ("fusion-start", "call-start", "custom-call-start"):
        started = dataclasses.replace(op, kind=kind.removesuffix("-start"), shape=op.shape.last)
        yield from map(_beside, _operation(module, inside, started, hints, unknown))
    elif base := _collective_kind(kind):
        # XLA's GPU compiler splits every collective in two, and says of which it waits for at once.
        starts = kind.endswith("-start") and '"is_sync":true' not in op.rest
        yield _collective(module, inside, op, base, starts or "async_collective_name" in op.rest)
    elif kind == "custom-call":
        yield from _custom(module, inside, op, hints, unknown)
    elif kind == "fusion":
        yield from _fusion(module, inside, op)
    else:
        flops = hlo_cost.flops(inside, op)
        yield Work(op.name, op.scope, flops, hlo_cost.moved(module, inside, op), hlo_cost.cycles(op))


def _beside(w: Work) -> Work:
    if w.collective is None:
        return w
    return dataclasses.replace(w, collective=dataclasses.replace(w.collective, overlaps=True))


def _loop(module: Module, inside: Computation, op: Op, hints: Hints, unknown: list[Unknown]) -> Work:
    body = _computation(module, op.attribute("body"), hints)
    turns = hlo_cost.turns(module, inside, op)
    if turns is None and (turns := hints.turns(op)) is None:
        turns = 1.0
        unknown.append(Unknown(op.name, op.scope, "a loop whose bounds are data, counted once"))
    unknown += body.unknown
    return Work(op.name, op.scope, loop=body, turns=float(turns))


def _collective_kind(kind: str) -> str | None:
    base = kind.removesuffix("-start")
    return base if base in COLLECTIVES else None


def _collective(module: Module, inside: Computation, op: Op, kind: str, overlaps: bool) -> Work:
    given = sum(inside.shape(name).bytes for name in op.operands)
    made = op.shape.bytes if not op.kind.endswith("-start") else op.shape.last.bytes
    devices = hlo_groups.first(op.rest, module.devices)
    n = len(devices)
    if kind == "all-reduce":
        sent = 2 * given * (n - 1) / n
    elif kind == "collective-permute":
        sent, n = given, 2
    else:
        sent = max(given, made) * (n - 1) / n
    # What it moves through memory is counted with the collective, which is slower.
    return Work(op.name, op.scope, collective=Collective(kind, devices, sent if n > 1 else 0.0, overlaps))


def _fusion(module: Module, inside: Computation, op: Op) -> Iterator[Work]:
    """Products anywhere inside; memory at its edges; collectives that the TPU compiler runs in it.

    One that runs beside several fusions stands in each of them, from `async-collective-start` to `-done`.
    """
    flops, found = 0.0, []
    for comp in module.within(op.called):
        for each in comp.ops.values():
            flops += hlo_cost.flops(comp, each)
            base = _collective_kind(each.kind)
            goes_on = op.name.startswith("async-collective-done") or comp.name.startswith("async_collective_fusion")
            if base and not goes_on:
                w = _collective(module, comp, each, base, op.name.startswith("async-collective-start"))
                if base == "all-reduce" and "all-reduce-scatter" in op.name + comp.name:
                    # The TPU compiler's name for a sum of which every device keeps its slice.
                    half = dataclasses.replace(w.collective, kind="reduce-scatter", bytes=w.collective.bytes / 2)
                    w = dataclasses.replace(w, collective=half)
                found.append(w)
    yield from found
    if op.name.startswith(("async-collective-start", "async-collective-done")):
        return  # what goes in and comes out is moved by the collective
    yield Work(op.name, op.scope, flops, hlo_cost.moved(module, inside, op), hlo_cost.cycles(op))


def _custom(module: Module, inside: Computation, op: Op, hints: Hints, unknown: list[Unknown]) -> Iterator[Work]:
    target = op.attribute("custom_call_target").strip('"')
    if target in FREE_CALLS:
        return
    moved, flops = hlo_cost.moved(module, inside, op), hlo_cost.library(inside, op, target)
    if flops is not None and op.shape.parts:
        moved -= sum(part.bytes for part in op.shape.parts if part.dtype == "s8")  # room to work in
    own = hints.kernel(op, stated(op), moved)
    if own is not None:
        flops, moved = own.flops, own.bytes
    elif flops is None and target.startswith(KERNELS):
        unknown.append(Unknown(op.name, op.scope, f"a kernel ({target}) without a cost, counted by its memory alone"))
    yield Work(op.name, op.scope, flops or 0.0, moved, hlo_cost.cycles(op))


def stated(op: Op) -> Kernel | None:
    """The cost that Pallas writes down, where a kernel was given one."""
    if '"cost_estimate"' not in op.rest:
        return None
    of = dict(re.findall(r'"(flops|bytes_accessed)":"?(\d+)', op.rest[op.rest.index('"cost_estimate"') :]))
    return Kernel(float(of.get("flops", 0)), float(of.get("bytes_accessed", 0)))
