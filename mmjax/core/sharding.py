"""Where arrays lie on a mesh: logical axis names, the rules that map them to mesh axes, and the helpers.

Model code names logical axes only ("batch", "heads", "mlp" …). `constrain`, `dense`, `take`, `take_rows` and `local`
read the mesh that `jax.set_mesh` has set while a function is traced, and do the right thing with no mesh, with Auto
axes (the compiler propagates shardings), with Explicit axes (shardings are part of the types) and inside a fully manual
`shard_map` (arrays are already local).
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mmjax.core.errors import InputError

Axes = tuple[str | None, ...]
MESH_AXES = ("data", "fsdp", "tensor")


@dataclass(frozen=True)
class Rules:
    """Which mesh axes carry each logical axis; a logical axis that is not named here is never split.

    The first four are axes of parameters and of activations, `embed` is an axis of parameters alone: it is gathered
    for the moment of use (fully sharded data parallelism), while activations keep their width whole.
    """

    batch: tuple[str, ...] = ("data", "fsdp")
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


@dataclass(frozen=True)
class MeshConfig:
    """The mesh: how many devices along each axis. One of them may be -1: all devices that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    explicit: bool = False  # Explicit axes (shardings in types) instead of Auto ones (the compiler propagates)


def make_mesh(cfg: MeshConfig, devices: list | None = None) -> jax.sharding.Mesh:
    """A mesh (data, fsdp, tensor) over the given devices, or over all.

    Raises:
      InputError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [cfg.data, cfg.fsdp, cfg.tensor]
    known = int(np.prod([s for s in sizes if s != -1]))
    if sizes.count(-1) == 1 and known > 0 and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if min(sizes) < 1 or int(np.prod(sizes)) != len(devices):
        wanted = " × ".join(f"{name}={size}" for name, size in zip(MESH_AXES, sizes, strict=True))
        raise InputError(
            f"The mesh {wanted} does not fit {len(devices)} device(s); set mesh.data, mesh.fsdp and mesh.tensor to "
            f"sizes whose product is {len(devices)} (one of them may be -1)."
        )
    kind = AxisType.Explicit if cfg.explicit else AxisType.Auto
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(kind,) * 3, devices=devices)


def partition(axes: Axes, rules: Rules, sizes: dict[str, int], shape: tuple[int, ...] | None = None) -> P:
    """The PartitionSpec of logical axes on a mesh with these axis sizes.

    A mesh axis is used once, by the first dimension that names it. Where `shape` is given, a dimension that does not
    divide evenly stays whole (two key heads on four tensor devices are repeated, not cut).
    """
    used, entries = set(), []
    for i, logical in enumerate(axes):
        mesh_axes = tuple(a for a in rules.mesh_axes(logical) if a in sizes and a not in used)
        parts = int(np.prod([sizes[a] for a in mesh_axes]))
        if shape is not None and shape[i] % parts:
            mesh_axes = ()
        used.update(mesh_axes)
        entries.append(mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes or None)
    return P(*entries)


def named(mesh: jax.sharding.Mesh, axes: Axes, rules: Rules, shape: tuple[int, ...] | None = None) -> NamedSharding:
    """The NamedSharding of logical axes on a concrete mesh."""
    return NamedSharding(mesh, partition(axes, rules, dict(mesh.shape), shape))


def _mode() -> AxisType | None:
    """How the mesh in force wants to be spoken to; None where nothing may be said (no mesh, or all local)."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = set(mesh.axis_types) if mesh.axis_names else set()
    if AxisType.Manual in kinds or not kinds:
        return None
    return AxisType.Explicit if AxisType.Explicit in kinds else AxisType.Auto


def _partition_here(axes: Axes, shape: tuple[int, ...]) -> P:
    return partition(axes, _rules.get(), dict(jax.sharding.get_abstract_mesh().shape), shape)


def constrain(x: jax.Array, axes: Axes) -> jax.Array:
    """Lays x out along logical axes; does nothing where there is no mesh."""
    match _mode():
        case AxisType.Auto:
            return jax.lax.with_sharding_constraint(x, _partition_here(axes, x.shape))
        case AxisType.Explicit:
            return jax.sharding.reshard(x, _partition_here(axes, x.shape))
    return x


def _gathered(w: jax.Array, x: jax.Array) -> jax.Array:
    """w without the mesh axes that x is split over: the all-gather of fully sharded data parallelism."""
    taken = {a for entry in jax.typeof(x).sharding.spec for a in (entry if isinstance(entry, tuple) else (entry,))}
    entries = [
        tuple(a for a in (entry if isinstance(entry, tuple) else (entry,)) if a not in taken and a is not None)
        for entry in jax.typeof(w).sharding.spec
    ]
    return jax.sharding.reshard(w, P(*[e[0] if len(e) == 1 else e or None for e in entries]))


def dense(x: jax.Array, w: jax.Array, axes: Axes) -> jax.Array:
    """The product of an activation with a parameter, over all axes of x after the first two.

    Args:
      x: [B, L, in…].
      w: [in…, out…].
      axes: logical axes of the result [B, L, out…].
    """
    inner = x.ndim - 2
    if _mode() is AxisType.Explicit:
        out = _partition_here(axes, x.shape[:2] + w.shape[inner:])
        dims = ((tuple(range(2, x.ndim)), tuple(range(inner))), ((), ()))
        return jax.lax.dot_general(x, _gathered(w, x), dims, out_sharding=out)
    # One flat matrix product: on CPUs its gradients take two thirds of the time of a product in three dimensions.
    width = int(np.prod(w.shape[:inner]))
    y = x.reshape(-1, width) @ w.reshape(width, -1)
    return constrain(y.reshape(x.shape[:2] + w.shape[inner:]), axes)


def take(table: jax.Array, ids: jax.Array, axes: Axes) -> jax.Array:
    """table[ids] for a parameter table ("vocab", …) that may be split; ids must be in range (see Batch)."""
    # Gathered over "embed" first, as `dense` does: looked up in narrow slices, it would be laid out twice.
    table = constrain(table, ("vocab",) + (None,) * (table.ndim - 1))
    if _mode() is AxisType.Explicit:
        out = _partition_here(axes, (*ids.shape, *table.shape[1:]))
        return table.at[ids].get(out_sharding=out)
    return constrain(table[ids], axes)


def take_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[b, index[b, l]] for every row b, with zeros where index is negative: never leaves the row, so it is local.

    Args:
      x: [B, M, ...].
      index: i32[B, L].

    Returns:
      [B, L, ...].
    """
    # "fill" would wrap -1 around first, as Python does: send every negative index past the end instead.
    outside = jnp.where(index < 0, x.shape[1], index)
    return jax.vmap(lambda row, i: row.at[i].get(mode="fill", fill_value=0))(x, outside)


def local(f: Callable, args: Any, in_axes: Any, out_axes: Any) -> Any:
    """f(*args) on each device's part of the arrays, where there is a mesh; there is no communication unless f makes it.

    For what a compiler cannot split by itself: loops whose bounds are data, and hand-written kernels.

    Args:
      f: a function of local arrays. A dimension that is split in one argument must be split alike in all.
      args: a tuple of trees of arrays.
      in_axes: the same trees with `Axes` in the place of arrays, None where there is None.
      out_axes: the same of the results; a dimension may be named only where its size divides evenly.
    """
    if _mode() is None:
        return f(*args)

    def spec(axes: Axes) -> P:
        return partition(axes, _rules.get(), dict(jax.sharding.get_abstract_mesh().shape))

    specs = jax.tree.map(spec, (in_axes, out_axes), is_leaf=_is_axes)
    args = jax.tree.map(lambda a, axes: constrain(a, axes), args, in_axes)
    return jax.shard_map(f, in_specs=specs[0], out_specs=specs[1])(*args)


def _is_axes(x: Any) -> bool:
    return isinstance(x, tuple) and all(a is None or isinstance(a, str) for a in x)


def parts(logical: str) -> int:
    """Over how many devices the mesh in force splits a logical axis; 1 where nothing may be said."""
    if _mode() is None:
        return 1
    mesh = jax.sharding.get_abstract_mesh()
    return int(np.prod([mesh.shape[a] for a in _rules.get().mesh_axes(logical) if a in mesh.shape]))


def _varies(x: jax.Array) -> frozenset[str]:
    """The manual mesh axes along which devices hold different values of x."""
    kind = jax.typeof(x)
    if hasattr(kind, "manual_axis_type"):
        return frozenset(kind.manual_axis_type.varying)
    return frozenset(kind.vma)  # before jax 0.9 or so


def vary(tree: Any, like: Any = None) -> Any:
    """All arrays of a tree typed as varying over the same manual axes: those of any array in it, or in `like` as well.

    Inside `shard_map`, types say over which axes devices differ, and a loop's carry must not change its type.
    """
    axes = frozenset().union(*map(_varies, jax.tree.leaves((tree, like))))
    if not axes:
        return tree

    def one(x: jax.Array) -> jax.Array:
        more = tuple(axes - _varies(x))
        if not more:
            return x
        return jax.lax.pcast(x, more, to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary(x, more)

    return jax.tree.map(one, tree)


def unvary(cotangent: jax.Array, primal: jax.Array) -> jax.Array:
    """The cotangent of an array that devices share: summed over the axes along which only the cotangent varies."""
    axes = tuple(_varies(cotangent) - _varies(primal))
    return jax.lax.psum(cotangent, axes) if axes else cotangent
