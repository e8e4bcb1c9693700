"""How long a step would take: by a chip's peak figures, and by the cycles that the TPU compiler itself estimates."""

from collections.abc import Callable
from dataclasses import dataclass

from mmjax.core.hlo import Count, Work
from mmjax.plan.attention import part_of
from mmjax.plan.chips import Topology

Coordinates = list[tuple[int, ...]]


@dataclass(frozen=True)
class Estimate:
    """Seconds.

    products: all FLOPs at the chip's peak. memory: all bytes at its bandwidth.
    operations: each at the slower of both, one after the other. parts: the same by part of the model.
    beside, alone: collectives that run beside other work, and that do not.
    step: operations and collectives, where those that may run beside others of their loop's turn do, and no
      shorter than all collectives, which share their links. serial: where none does.
    cycles: `step`, but of operations as long as the TPU compiler itself estimates (of kernels it says nothing); 0
      where it makes no estimates.
    """

    products: float
    memory: float
    operations: float
    beside: float
    alone: float
    step: float
    cycles: float
    parts: dict[str, float]

    @property
    def serial(self) -> float:
        return self.operations + self.beside + self.alone


def estimate(counted: Count, topology: Topology, coordinates: Coordinates) -> Estimate:
    """Of a counted program.

    Args:
      counted: what each chip does.
      topology: the chips.
      coordinates: of the program's devices, in their order.
    """
    chip = topology.chip

    def operation(w: Work) -> float:
        return max(w.flops / chip.flops, w.bytes / chip.bandwidth)

    def collective(w: Work) -> float:
        if w.collective is None or not w.collective.bytes:
            return 0.0
        return w.collective.bytes / topology.bandwidth([coordinates[d] for d in w.collective.devices])

    def compilers(w: Work) -> float:
        return w.cycles / chip.clock if w.cycles else operation(w)

    def turn(of: Count, operation: Callable[[Work], float] = operation) -> float:
        busy = beside = alone = 0.0
        for w in of.work:
            if w.loop:
                busy += w.turns * turn(w.loop, operation)
            elif w.collective:
                beside += collective(w) * w.collective.overlaps
                alone += collective(w) * (not w.collective.overlaps)
            else:
                busy += operation(w)
        return max(busy, beside) + alone

    parts: dict[str, float] = {}
    for w, times in counted.every():
        if w.collective:
            continue
        parts[part_of(w.scope)] = parts.get(part_of(w.scope), 0.0) + times * operation(w)
    beside = counted.total(lambda w: collective(w) if w.collective and w.collective.overlaps else 0.0)
    alone = counted.total(lambda w: collective(w) if w.collective and not w.collective.overlaps else 0.0)
    return Estimate(
        products=counted.flops / chip.flops,
        memory=counted.bytes / chip.bandwidth,
        operations=counted.total(operation),
        beside=beside,
        alone=alone,
        step=max(turn(counted), beside + alone),
        cycles=max(turn(counted, compilers), beside + alone) if chip.clock else 0.0,
        parts=dict(sorted(parts.items(), key=lambda item: -item[1])),
    )
