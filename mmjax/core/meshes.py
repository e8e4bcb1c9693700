"""Meshes: logical axis names, the rules that map them to mesh axes, and what both say of a shape.

Model code names logical axes only ("batch", "length", "heads" …). Which mesh axes carry them is said once, by `Rules`;
`core.sharding` has the operations that obey.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mmjax.core.errors import InputError

Axes = tuple[str | None, ...]
# From the least traffic to the most, as jax.make_mesh wants it: the last axis gets the nearest neighbours. Gradients
# are summed over `data` once a step, and a layer's parameters are gathered over `fsdp` ahead of use; but attention
# waits for keys and values of its neighbours over `sequence`, and every product for activations summed over `tensor`.
MESH_AXES = ("data", "fsdp", "sequence", "tensor")


@dataclass(frozen=True)
class Rules:
    """Which mesh axes carry each logical axis; a logical axis that is not named here is never split.

    `batch` and `length`, a row's tokens or patches, are axes of activations; heads, mlp and vocab of parameters too.
    `embed` is an axis of parameters alone: it is gathered for the moment of use (fully sharded data parallelism), while
    activations keep their width whole.
    """

    batch: tuple[str, ...] = ("data", "fsdp")
    length: tuple[str, ...] = ("sequence",)
    heads: tuple[str, ...] = ("tensor",)
    mlp: tuple[str, ...] = ("tensor",)
    vocab: tuple[str, ...] = ("tensor",)
    embed: tuple[str, ...] = ("fsdp",)

    def mesh_axes(self, logical: str | None) -> tuple[str, ...]:
        return getattr(self, logical, ()) if logical else ()


_rules: contextvars.ContextVar[Rules] = contextvars.ContextVar("mmjax_rules", default=Rules())  # noqa: B039 (frozen)


@contextlib.contextmanager
def use_rules(rules: Rules) -> Iterator[None]:
    """Traces what is inside with these rules. They are read while tracing: a compiled function keeps its own."""
    token = _rules.set(rules)
    try:
        yield
    finally:
        _rules.reset(token)


@contextlib.contextmanager
def whole(logical: str) -> Iterator[None]:
    """Traces what is inside with one logical axis split over nothing."""
    with use_rules(replace(_rules.get(), **{logical: ()})):
        yield


@dataclass(frozen=True)
class MeshConfig:
    """The mesh: how many devices along each axis. One of them may be -1: all devices that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1
    explicit: bool = False  # Explicit axes (shardings in types) instead of Auto ones (the compiler propagates)


def make_mesh(cfg: MeshConfig, devices: list | None = None) -> jax.sharding.Mesh:
    """A mesh of MESH_AXES over the given devices, or over all.

    Raises:
      InputError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [getattr(cfg, name) for name in MESH_AXES]
    known = int(np.prod([s for s in sizes if s != -1]))
    if sizes.count(-1) == 1 and known > 0 and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if min(sizes) < 1 or int(np.prod(sizes)) != len(devices):
        wanted = " × ".join(f"{name}={size}" for name, size in zip(MESH_AXES, sizes, strict=True))
        raise InputError(
            f"The mesh {wanted} does not fit {len(devices)} device(s); set mesh.data, mesh.fsdp, "
            f"mesh.sequence and mesh.tensor to sizes whose product is {len(devices)} (one of them may be -1)."
        )
    kinds = (AxisType.Explicit if cfg.explicit else AxisType.Auto,) * len(MESH_AXES)
    try:
        return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=kinds, devices=devices)
    except NotImplementedError:
        # A torus of three axes (TPU v4, v5p) whose axes must be split to give these sizes.
        placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return jax.sharding.Mesh(placed, MESH_AXES, axis_types=kinds)


def partition(axes: Axes, rules: Rules, sizes: dict[str, int], shape: tuple[int, ...] | None = None) -> P:
    """The PartitionSpec of logical axes on a mesh with these axis sizes.

    A mesh axis is used once, by the first dimension that names it. Where `shape` is given, a dimension that does not
    divide evenly stays whole (two key heads on four tensor devices are repeated, not cut). So does one that would have
    a single part: with Explicit axes, types are then the same as without the axis.
    """
    used, entries = set(), []
    for i, logical in enumerate(axes):
        mesh_axes = tuple(a for a in rules.mesh_axes(logical) if a in sizes and a not in used)
        parts = int(np.prod([sizes[a] for a in mesh_axes]))
        if parts == 1 or (shape is not None and shape[i] % parts):
            mesh_axes = ()
        used.update(mesh_axes)
        entries.append(mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes or None)
    return P(*entries)


def named(mesh: jax.sharding.Mesh, axes: Axes, rules: Rules, shape: tuple[int, ...] | None = None) -> NamedSharding:
    """The NamedSharding of logical axes on a concrete mesh."""
    return NamedSharding(mesh, partition(axes, rules, dict(mesh.shape), shape))


def parts_of(logical: str, mesh: Any, rules: Rules) -> int:
    """Over how many devices a mesh splits a logical axis."""
    return int(np.prod([mesh.shape[a] for a in rules.mesh_axes(logical) if a in mesh.shape]))


def mode() -> AxisType | None:
    """How the mesh in force wants to be spoken to; None where nothing may be said (no mesh, or all local)."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = set(mesh.axis_types) if mesh.axis_names else set()
    if AxisType.Manual in kinds or not kinds:
        return None
    return AxisType.Explicit if AxisType.Explicit in kinds else AxisType.Auto


def partition_here(axes: Axes, shape: tuple[int, ...] | None = None) -> P:
    """`partition` on the mesh and with the rules in force."""
    return partition(axes, _rules.get(), dict(jax.sharding.get_abstract_mesh().shape), shape)


def fitting(axes: Axes, shape: tuple[int, ...]) -> Axes:
    """The axes with None where the dimension is not split: what `local` may be given for an array of this shape."""
    if mode() is None:
        return (None,) * len(axes)
    spec = partition_here(axes, shape)
    return tuple(None if entry is None else axis for axis, entry in zip(axes, spec, strict=True))


def mesh_axes(axes: Axes) -> tuple[tuple[str, ...], ...]:
    """The mesh axes in force that each dimension of an array with these logical axes is split over."""
    if mode() is None:
        return ((),) * len(axes)
    return tuple(entry if isinstance(entry, tuple) else (entry,) if entry else () for entry in partition_here(axes))


def parts(logical: str) -> int:
    """Over how many devices the mesh in force splits a logical axis; 1 where nothing may be said."""
    if mode() is None:
        return 1
    return parts_of(logical, jax.sharding.get_abstract_mesh(), _rules.get())
