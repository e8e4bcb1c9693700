"""Operations that lay arrays out along logical axes, whatever mesh is in force (core.meshes).

`constrain`, `dense`, `take`, `take_rows` and `local` read the mesh that `jax.set_mesh` has set while a function is
traced, and do the right thing with no mesh, with Auto axes (the compiler propagates shardings), with Explicit axes
(shardings are part of the types) and inside a fully manual `shard_map` (arrays are already local).

What works token by token keeps rows split along their `length`. What mixes the tokens of a row makes it whole first:
`unsplit`, or `whole_rows` for a function that does little else.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from mmjax.core.meshes import Axes, fitting, mode, partition_here, parts, whole


def constrain(x: jax.Array, axes: Axes) -> jax.Array:
    """Lays x out along logical axes; does nothing where there is no mesh."""
    match mode():
        case AxisType.Auto:
            return jax.lax.with_sharding_constraint(x, partition_here(axes, x.shape))
        case AxisType.Explicit:
            return jax.sharding.reshard(x, partition_here(axes, x.shape))
    return x


def gradient_laid(w: jax.Array, axes: Axes) -> jax.Array:
    """w, with its gradient laid out along logical axes. With Explicit axes its type says so already."""
    return _gradient_laid(w, axes) if mode() is AxisType.Auto else w


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _gradient_laid(w: jax.Array, axes: Axes) -> jax.Array:
    return w


@_gradient_laid.defjvp
def _tangent_laid(axes: Axes, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return primals[0], constrain(tangents[0], axes)


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
    if mode() is AxisType.Explicit:
        out = partition_here(axes, shape)
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
        if mode() is AxisType.Explicit:
            out = partition_here(axes, (*ids.shape, *table.shape[1:]))
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
    if mode() is None:
        return f(*args)

    specs = jax.tree.map(partition_here, (in_axes, out_axes), is_leaf=_is_axes)
    args = jax.tree.map(lambda a, axes: constrain(a, axes), args, in_axes)
    return jax.shard_map(f, in_specs=specs[0], out_specs=specs[1])(*args)


def _is_axes(x: Any) -> bool:
    return isinstance(x, tuple) and all(a is None or isinstance(a, str) for a in x)


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
