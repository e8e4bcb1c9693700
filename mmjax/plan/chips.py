"""The chips that programs are planned for, and their networks.

TPUs: cloud.google.com/tpu/docs/v4, v5e, v5p and v6e, the tables of key specifications (dense bfloat16; bandwidth of
HBM); links: Austin et al. 2025, "How to Scale Your Model", chapter 2, table "ICI bandwidth" (one way). GPUs: NVIDIA's
data sheets of the SXM modules (dense bfloat16; NVLink one way; a network adapter for each GPU, as in DGX).
"""

import collections
import difflib
import importlib.util
import re
from dataclasses import dataclass
from typing import Any

from mmjax.core.errors import InputError

GIB = 2**30
NODE = 8  # GPUs that NVLink joins
# JAX takes three quarters of a GPU's memory for itself, unless XLA_PYTHON_CLIENT_MEM_FRACTION says more.
SHARE = 0.75


@dataclass(frozen=True)
class Chip:
    """A device that a program is compiled for.

    flops: bfloat16 per second. memory: bytes that a program may use. bandwidth: of memory, bytes per second.
    link: bytes per second one way of one link to a neighbour, of which a torus has two along each axis; of a GPU, to
      all others of its node.
    axes: of the torus; 0: there is none. whole: an axis of so many chips, or a multiple of it, closes to a ring; of a
      torus of three axes (cubes of 4 × 4 × 4 that switches join) if all of them are such.
    network: bytes per second one way out of a node. clock: cycles per second of the compiler's estimates, 0: it makes
      none.

    Of a v4's two cores, which work as one where there is a v4, the compiler alone knows one, and half the memory: what
    fits fits in any case, and cycles count for two.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    axes: int = 0
    whole: int = 0
    network: float = 0.0
    clock: float = 0.0


@dataclass(frozen=True)
class Target:
    """What XLA's GPU compiler wants to know of a GPU: multiprocessors and what each has, and its own name."""

    name: str
    capability: tuple[int, int]
    cores: int
    units: int  # for float32, of a multiprocessor
    clock: float  # GHz
    shared: int  # bytes of a multiprocessor
    cache: int  # bytes, of the second level


CHIPS = {
    "v4": Chip("TPU v4", 275e12, 15.25 * GIB, 1.228e12, 4.5e10, 3, 4, clock=2 * 1.05e9),
    "v5e": Chip("TPU v5e", 197e12, 15.75 * GIB, 8.19e11, 4.5e10, 2, 16, clock=1.5e9),
    "v5p": Chip("TPU v5p", 459e12, 95.74 * GIB, 2.765e12, 9e10, 3, 4, clock=1.75e9),
    "v6e": Chip("TPU v6e", 918e12, 31.25 * GIB, 1.638e12, 9e10, 2, 16, clock=1.75e9),
    "a100": Chip("A100 80 GB", 312e12, SHARE * 85.1e9, 2.04e12, 3e11, network=2.5e10),
    "h100": Chip("H100 80 GB", 989e12, SHARE * 84.9e9, 3.35e12, 4.5e11, network=5e10),
    "h200": Chip("H200 141 GB", 989e12, SHARE * 151.4e9, 4.8e12, 4.5e11, network=5e10),
    "b200": Chip("B200 180 GB", 2250e12, SHARE * 191.5e9, 7.7e12, 9e11, network=5e10),
}
TARGETS = {
    "a100": Target("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 1.41, 167_936, 40 * 2**20),
    "h100": Target("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 1.98, 233_472, 50 * 2**20),
    "h200": Target("NVIDIA H200 141GB HBM3e", (9, 0), 132, 128, 1.98, 233_472, 50 * 2**20),
    "b200": Target("NVIDIA B200", (10, 0), 148, 128, 1.965, 233_472, 126 * 2**20),
}


@dataclass(frozen=True)
class Topology:
    """Chips and how they hang together. kind: their name in CHIPS. sizes: of the torus, or how many GPUs."""

    text: str
    kind: str
    sizes: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def gpu(self) -> bool:
        return self.kind in TARGETS

    @property
    def most(self) -> float:
        """Bytes that a program may use at most: of a TPU what its compiler allows, of a GPU all that there are."""
        return self.chip.memory / (SHARE if self.gpu else 1.0)

    def bandwidth(self, coordinates: list[tuple[int, ...]]) -> float:
        """Bytes per second that each of these chips can send to the others.

        On a torus over the links of all axes they differ in: two along an axis that they take whole and that closes to
        a ring, else one (the chip at the end has no other). Groups are taken to share no links; where the chips of one
        lie s apart along an axis, s groups do, and are s times slower. Of GPUs, NVLink within a node; beyond it a ring
        for each of the group's GPUs in a node, by that GPU's network adapter, or NVLink where it is slower.
        """
        if self.gpu:
            nodes = collections.Counter(c[0] // NODE for c in coordinates)
            cards = self.chip.network * max(nodes.values())
            return self.chip.link if len(nodes) == 1 else min(self.chip.link, cards)
        links = 0
        for axis, size in enumerate(self.sizes):
            places = len({c[axis] for c in coordinates})
            if places > 1:
                links += 2 if places == size and self._closes(axis) else 1
        return max(links, 1) * self.chip.link

    def _closes(self, axis: int) -> bool:
        """Whether an axis of the torus closes to a ring."""
        sizes = self.sizes if self.chip.axes == 3 else (self.sizes[axis],)
        return all(size % self.chip.whole == 0 for size in sizes)


def topology(text: str) -> Topology:
    """`v5e:16x16`, `v5p:8x8x4`: a TPU and the sizes of its torus; `h100:8`: so many GPUs.

    Raises:
      InputError: another name or another shape; the message names the nearest.
    """
    kind, _, shape = text.partition(":")
    if kind not in CHIPS:
        near = difflib.get_close_matches(kind.lower(), CHIPS, 1, 0.3)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"There are no chips {kind!r} to plan for: {hint}There are {', '.join(CHIPS)}.")
    chip = CHIPS[kind]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") + 1 != max(chip.axes, 1):
        example = f"{kind}:{'x'.join(['4'] * chip.axes) or NODE}"
        what = f"the torus of {chip.name} has {chip.axes} axes" if chip.axes else "GPUs are counted"
        raise InputError(f"{text!r} is no topology: {what}, as in {example}.")
    sizes = tuple(int(n) for n in shape.split("x"))
    if not chip.axes and sizes[0] > NODE and sizes[0] % NODE:
        raise InputError(f"{text!r} is no topology: GPUs come in nodes of {NODE}; give a multiple of that.")
    return Topology(text, kind, sizes)


def devices(of: Topology) -> list[Any]:
    """The compile targets, in the order of their numbers.

    Raises:
      InputError: the compiler is not installed, or knows no such slice.
    """
    from jax.experimental import topologies

    if of.gpu:
        _refuse_without_plugin()
        nodes, each = -(-of.sizes[0] // NODE), min(of.sizes[0], NODE)
        settings = {"target_config": description(of.kind), "topology": f"1x{nodes}x{each}"}
        named = {"platform": "cuda", "topology_name": of.kind}
    else:
        _refuse_without_libtpu()
        # A slice smaller than a host of 2 × 2 has as many chips of it as it has.
        settings = {"chips_per_host_bounds": [*(min(n, 2) for n in of.sizes[:2]), 1]}
        named = {"platform": "tpu", "topology_name": of.text}
    try:
        found = topologies.get_topology_desc(**named, **settings).devices
    except Exception as error:
        raise InputError(f"The compiler refuses the topology {of.text!r}: {first_line(error)}") from error
    return [d for d in found if getattr(d, "core_on_chip", 0) == 0]


def first_line(error: Exception) -> str:
    """What an error says first, or what it is called."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def coordinates(of: Topology, devices: list[Any]) -> list[tuple[int, ...]]:
    """Where devices lie: in the torus, or which GPU it is."""
    return [(d.id,) if of.gpu else tuple(d.coords) for d in devices]


def _refuse_without_libtpu() -> None:
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise InputError(
            "Planning for TPUs needs their compiler, libtpu, which works without a TPU; pip install 'mmjax[tpu]'."
        ) from None


def _refuse_without_plugin() -> None:
    import jax

    if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
        of = f"=={jax.__version__}"
        raise InputError(
            f"Planning for GPUs needs XLA's compiler for them, which works without a GPU; pip install --no-deps "
            f"jax-cuda13-plugin{of} jax-cuda13-pjrt{of} (or 'mmjax[cuda13]', with all of CUDA)."
        )


def description(kind: str) -> str:
    """A GPU as XLA describes it (GpuTargetConfigProto, as text); what all of them share is from CUDA's guide."""
    t, chip = TARGETS[kind], CHIPS[kind]
    newest = "feature_extension: ACCELERATED_FEATURES" if t.capability >= (9, 0) else ""
    return f"""gpu_device_info {{
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: {t.cores} fpus_per_core: {t.units} clock_rate_ghz: {t.clock}
  shared_memory_per_core: {t.shared} shared_memory_per_block: 49152 shared_memory_per_block_optin: {t.shared - 1024}
  device_memory_size: {int(chip.memory / SHARE)} memory_bandwidth: {int(chip.bandwidth)} l2_cache_size: {t.cache}
  cuda_compute_capability {{ major: {t.capability[0]} minor: {t.capability[1]} {newest} }}
  runtime_version: "13.0.0" driver_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{t.name}"
"""
