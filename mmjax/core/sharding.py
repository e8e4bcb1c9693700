"""Where arrays lie on a mesh: logical axis names, the rules that map them to mesh axes, and the helpers.

Model code names logical axes only ("batch", "length", "heads" …). `constrain`, `dense`, `take`, `take_rows` and `local`
read the mesh that `jax.set_mesh` has set while a function is traced, and do the right thing with no mesh, with Auto
axes (the compiler propagates shardings), with Explicit axes (shardings are part of the types) and inside a fully manual
`shard_map` (arrays are already local).

What works token by token keeps rows split along their `length`. What mixes the tokens of a row makes it whole first:
`unsplit`, or `whole_rows` for a function that does little else.
"""

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
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


def gradient_laid(w: jax.Array, axes: Axes) -> jax.Array:
    """w, with its gradient laid out along logical axes. With Explicit axes its type says so already."""
    return _gradient_laid(w, axes) if _mode() is AxisType.Auto else w


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _gradient_laid(w: jax.Array, axes: Axes) -> jax.Array:
    return w


@_gradient_laid.defjvp
def _tangent_laid(axes: Axes, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return primals[0], constrain(tangents[0], axes)


def fitting(axes: Axes, shape: tuple[int, ...]) -> Axes:
    """The axes with None where the dimension is not split: what `local` may be given for an array of this shape."""
    if _mode() is None:
        return (None,) * len(axes)
    spec = _partition_here(axes, shape)
    return tuple(None if entry is None else axis for axis, entry in zip(axes, spec, strict=True))


def _gathered(w: jax.Array, x: jax.Array) -> jax.Array:
    """w without the mesh axes that x is split over: the all-gather of fully sharded data parallelism."""
    taken = {a for entry in jax.typeof(x).sharding.spec for a in (entry if isinstance(entry, tuple) else (entry,))}
    entries = [
        tuple(a for a in (entry if isinstance(entry, tuple) else (entry,)) if a not in taken and a is not None)
        for entry in jax.typeof(w).sharding.spec
    ]
    return jax.sharding.reshard(w, P(*[e[0] if len(e) == 1 else e or None for e in entries]))


def dense(x: jax.Array, w: jax.Array | dict[str, jax.Array], axes: Axes, *, wide: bool = False) -> jax.Array:
    """The product of an activation with a parameter, over all axes of x after the first two.

    Args:
      x: [B, L, in…].
      w: [in…, out…], or that with a product of low rank beside it (nn.lora), which may drop some of what it reads.
      axes: logical axes of the result [B, L, out…].
      wide: a float32 result of bfloat16 operands, not rounded to their type. Its cotangent is: the products of the
        backward pass are of bfloat16 as well.
    """
    if isinstance(w, dict):
        read = _dropped(x, **w["drop"]) if "drop" in w else x
        beside = dense(dense(read, w["a"], ("batch", "length", None)), w["b"], axes, wide=wide)
        y = dense(x, w["base"], axes, wide=wide)
        return y + (w["scale"] * beside).astype(y.dtype)
    axes, kind = fitting(axes, x.shape[:2] + w.shape[x.ndim - 2 :]), jnp.result_type(x, w)
    x, w = x.astype(kind), w.astype(kind)
    if wide and kind.itemsize < 4:
        return _wide(x, w, axes)
    return _product(x, w, axes)


def _dropped(x: jax.Array, key: jax.Array, kept: jax.Array) -> jax.Array:
    """x with numbers left out at random, and the others larger by as much: so many are `kept`, f32[]."""
    # A product, not a choice: with Explicit axes the numbers at random lie whole on each device, and x may be split.
    return x * (jax.random.bernoulli(key, kept, x.shape) / kept).astype(x.dtype)


def _product(x: jax.Array, w: jax.Array, axes: Axes, dtype: Any = None) -> jax.Array:
    inner = x.ndim - 2
    shape = x.shape[:2] + w.shape[inner:]
    dims = ((tuple(range(2, x.ndim)), tuple(range(inner))), ((), ()))
    if _mode() is AxisType.Explicit:
        out = _partition_here(axes, shape)
        return jax.lax.dot_general(x, _gathered(w, x), dims, preferred_element_type=dtype, out_sharding=out)
    if axes[1]:
        return constrain(jax.lax.dot_general(x, w, dims, preferred_element_type=dtype), axes)
    # Rows as one: on CPUs the gradients of a flat product take two thirds of the time of one in three dimensions. (Not
    # where rows are split along their length: their parts do not follow each other in the flat array.) The parameter
    # keeps its shape, or a scan would keep a copy of every layer's for its backward pass.
    flat = ((tuple(range(1, inner + 1)), tuple(range(inner))), ((), ()))
    y = jax.lax.dot_general(x.reshape(-1, *x.shape[2:]), w, flat, preferred_element_type=dtype)
    return constrain(y.reshape(shape), axes)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _wide(x: jax.Array, w: jax.Array, axes: Axes) -> jax.Array:
    return _product(x, w, axes, jnp.float32)


@_wide.defjvp
def _wide_tangent(axes: Axes, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (x, w), (dx, dw) = primals, tangents
    return _wide(x, w, axes), (_product(dx, w, axes) + _product(x, dw, axes)).astype(jnp.float32)


def take(table: jax.Array, ids: jax.Array, axes: Axes) -> jax.Array:
    """table[ids] for a parameter table ("vocab", …) that may be split; ids must be in range (see Batch)."""
    # Gathered over "embed" first, as `dense` does: looked up in narrow slices, it would be laid out twice.
    table = constrain(table, ("vocab",) + (None,) * (table.ndim - 1))
    axes = fitting(axes, (*ids.shape, *table.shape[1:]))

    def read(table: jax.Array, ids: jax.Array) -> jax.Array:
        if _mode() is AxisType.Explicit:
            out = _partition_here(axes, (*ids.shape, *table.shape[1:]))
            return table.at[ids].get(out_sharding=out)
        return constrain(table[ids], axes)

    return _read(read, table, ids)


def _read(f: Callable, x: jax.Array, index: jax.Array) -> jax.Array:
    """f(x, index), linear in x, whose gradient adds up in float32: thousands of tokens may have read the same place."""
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize >= 4:
        return f(x, index)
    return _read_narrow(f, x, index)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _read_narrow(f: Callable, x: jax.Array, index: jax.Array) -> jax.Array:
    return f(x, index)


@_read_narrow.defjvp
def _read_tangent(f: Callable, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (x, index), (dx, _) = primals, tangents
    return _read_narrow(f, x, index), f(dx.astype(jnp.float32), index).astype(x.dtype)


def take_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[b, index[b, l]] for every row b, with zeros where index is negative: never leaves the row.

    Every device reads whole rows of x for its part of the index; the result is split along its length as that is.

    Args:
      x: [B, M, ...].
      index: i32[B, L].

    Returns:
      [B, L, ...].
    """

    def read(x: jax.Array, index: jax.Array) -> jax.Array:
        # "fill" would wrap -1 around first, as Python does: send every negative index past the end instead.
        outside = jnp.where(index < 0, x.shape[1], index)
        return jax.vmap(lambda row, i: row.at[i].get(mode="fill", fill_value=0))(x, outside)

    if parts("length") == 1:
        return _read(read, x, index)
    rows, split = fitting(("batch", "length"), index.shape)
    rest = (None,) * (x.ndim - 2)

    def each(x: jax.Array, index: jax.Array) -> jax.Array:
        return local(read, (x, index), ((rows, None, *rest), (rows, split)), (rows, split, *rest))

    return _read(each, x, index)


def unsplit(tree: Any) -> Any:
    """Arrays [B, …] with every row whole: for what mixes the tokens of a row."""
    if parts("length") == 1:
        return tree
    return jax.tree.map(lambda a: constrain(a, ("batch",) + (None,) * (a.ndim - 1)), tree)


def whole_rows(*names: str) -> Callable:
    """For a function that mixes the tokens of a row: the arguments of these names, trees of arrays [B, …], are made
    whole but for their rows, nothing inside is split along `length`, nor is what comes out.
    """

    def decorate(f: Callable) -> Callable:
        signature = inspect.signature(f)

        @functools.wraps(f)
        def on_whole_rows(*args: Any, **kwargs: Any) -> Any:
            if parts("length") == 1:
                return f(*args, **kwargs)
            given = signature.bind(*args, **kwargs)
            given.arguments |= {k: unsplit(v) for k, v in given.arguments.items() if k in names}
            with whole("length"):
                return f(*given.args, **given.kwargs)

        return on_whole_rows

    return decorate


def regroup(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """x[B, L, …] as [B, n · L or L / n, *shape]: tokens taken apart, or neighbours put together.

    Where a split along the length would tear neighbours apart, rows are made whole first.
    """
    inner, outer = int(np.prod(x.shape[2:])), int(np.prod(shape))
    length = x.shape[1] * inner // outer
    # In two steps: arrays whose sharding is part of their type are split or merged, not both at once.
    middle = (inner // outer, *shape) if outer <= inner else (outer // inner, *x.shape[2:])

    def cut(x: jax.Array) -> jax.Array:
        b, here = x.shape[0], x.shape[1] * inner // outer
        between = x.reshape(b, min(here, x.shape[1]), *middle)
        return between.reshape(b, here, *shape)

    many = parts("length")
    if many == 1:
        return cut(x)
    rows = fitting(("batch",), x.shape[:1])[0]
    split = "length" if x.shape[1] % many == length % many == 0 else None
    rest = (None,) * (x.ndim - 2), (None,) * len(shape)
    return local(cut, (x,), ((rows, split, *rest[0]),), (rows, split, *rest[1]))


def local(f: Callable, args: Any, in_axes: Any, out_axes: Any) -> Any:
    """f(*args) on each device's part of the arrays, where there is a mesh; there is no communication unless f makes it.

    For what a compiler cannot split by itself: loops whose bounds are data, and hand-written kernels.

    Args:
      f: a function of local arrays. A dimension that is split in one argument must be split alike in all. An argument
        that is whole where others are split is read by several devices: its cotangent is the sum of theirs.
      args: a tuple of trees of arrays.
      in_axes: the same trees with `Axes` in the place of arrays, None where there is None.
      out_axes: the same of the results; a dimension may be named only where its size divides evenly (see `fitting`).
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


def mesh_axes(axes: Axes) -> tuple[tuple[str, ...], ...]:
    """The mesh axes in force that each dimension of an array with these logical axes is split over."""
    if _mode() is None:
        return ((),) * len(axes)
    spec = partition(axes, _rules.get(), dict(jax.sharding.get_abstract_mesh().shape))
    return tuple(entry if isinstance(entry, tuple) else (entry,) if entry else () for entry in spec)


def parts(logical: str) -> int:
    """Over how many devices the mesh in force splits a logical axis; 1 where nothing may be said."""
    if _mode() is None:
        return 1
    return parts_of(logical, jax.sharding.get_abstract_mesh(), _rules.get())


def parts_of(logical: str, mesh: Any, rules: Rules) -> int:
    """Over how many devices a mesh splits a logical axis."""
    return int(np.prod([mesh.shape[a] for a in rules.mesh_axes(logical) if a in mesh.shape]))


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


def shaped(shape: tuple[int, ...], dtype: Any, like: Any) -> jax.ShapeDtypeStruct:
    """What a kernel's result looks like, which varies over the manual axes that all arrays in the tree `like` do."""
    kind = jax.typeof(jax.tree.leaves(like)[0])
    if hasattr(kind, "manual_axis_type"):
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind.manual_axis_type)
    return jax.ShapeDtypeStruct(shape, dtype, vma=kind.vma)  # before jax 0.9 or so


def unvary(cotangent: jax.Array, primal: jax.Array) -> jax.Array:
    """The cotangent of an array that devices share: summed over the axes along which only the cotangent varies."""
    axes = tuple(_varies(cotangent) - _varies(primal))
    return jax.lax.psum(cotangent, axes) if axes else cotangent
