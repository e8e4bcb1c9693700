"""The chips that programs are planned for, and their networks.

Peak figures of TPUs: Austin et al. 2025, "How to Scale Your Model", chapter 2, tables "TPU specs" and "ICI bandwidth"
(dense bfloat16; one way per link), which agree with cloud.google.com/tpu/docs (v4, v5e, v5p, v6e).
"""

import difflib
import re
from dataclasses import dataclass
from typing import Any

from mmjax.core.errors import InputError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """A device that a program is compiled for.

    flops: bfloat16 per second. memory: bytes that the compiler lets a program use. bandwidth: of memory, bytes per
    second. link: bytes per second one way of one link to a neighbour; a torus has two along each axis. axes: of the
    torus. whole: an axis of so many chips, or a multiple of it, closes to a ring. clock: cycles per second of the
    compiler's estimates. cores: devices on a chip, which share all of that; one each but for v4 (on a real v4 the two
    work as one).
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    axes: int
    whole: int
    clock: float
    cores: int = 1


TPUS = {
    "v4": Chip("TPU v4 (a core)", 275e12 / 2, 15.25 * GIB, 1.2e12 / 2, 4.5e10 / 2, 3, 4, 1.05e9, 2),
    "v5e": Chip("TPU v5e", 197e12, 15.75 * GIB, 8.1e11, 4.5e10, 2, 16, 1.5e9),
    "v5p": Chip("TPU v5p", 459e12, 95.74 * GIB, 2.8e12, 9e10, 3, 4, 1.75e9),
    "v6e": Chip("TPU v6e", 920e12, 31.25 * GIB, 1.6e12, 9e10, 2, 16, 1.75e9),
}


@dataclass(frozen=True)
class Topology:
    """Chips and how they hang together. sizes: of the torus."""

    text: str
    chip: Chip
    sizes: tuple[int, ...]

    def bandwidth(self, coordinates: list[tuple[int, ...]]) -> float:
        """Bytes per second that each of these chips can send to the others: over the links of all axes they differ in.

        Two links along an axis that closes to a ring, one where it does not (the chip at the end has no other).
        """
        links = 0
        for axis, size in enumerate(self.sizes):
            if len({c[axis] for c in coordinates}) > 1:
                links += 2 if size % self.chip.whole == 0 else 1
        return max(links, 1) * self.chip.link


def topology(text: str) -> Topology:
    """`v5e:16x16`, `v5p:8x8x4`: a chip and the sizes of its torus.

    Raises:
      InputError: another name or another shape; the message names the nearest.
    """
    name, _, shape = text.partition(":")
    if name not in TPUS:
        near = difflib.get_close_matches(name.lower(), TPUS, 1, 0.3)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"There are no chips {name!r} to plan for: {hint}There are {', '.join(TPUS)}.")
    chip = TPUS[name]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") + 1 != chip.axes:
        example = "x".join(["4"] * chip.axes)
        raise InputError(f"{text!r} is no topology: {chip.name} has {chip.axes} axes, as in {name}:{example}.")
    return Topology(text, chip, tuple(int(n) for n in shape.split("x")))


def devices(of: Topology) -> list[Any]:
    """The compile targets, in the order of their numbers.

    Raises:
      InputError: the compiler is not installed, or knows no such slice.
    """
    from jax.experimental import topologies

    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise InputError(
            "Planning for TPUs needs their compiler, libtpu, which works without a TPU; pip install 'mmjax[tpu]'."
        ) from None
    # A slice smaller than a host has as many chips of it as it has.
    host = [min(n, 2) for n in of.sizes] + [1] * (3 - len(of.sizes))
    host[2] = 1
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=of.text, chips_per_host_bounds=host).devices
    except Exception as error:
        raise InputError(f"The TPU compiler refuses the topology {of.text!r}: {str(error).splitlines()[0]}") from error
    return list(found)
