"""Our parameters and somebody else's tensors: the rules that a family's table is made of, applied both ways.

A table is a list of rules, each naming one leaf of our tree and the tensor or tensors that hold it. From the spec and
the table alone follow the shape that every tensor must have, which is missing or surplus, and the way there and back,
in which every number keeps its bits.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.core import tree
from mmjax.core.cast import cast
from mmjax.core.errors import InputError
from mmjax.core.spec import ParamSpec, Spec

Shape = tuple[int, ...]
# From the shape of our leaf (without layers) to the shape of their tensor, and its axes in our order.
Layout = Callable[[Shape], tuple[Shape, tuple[int, ...]]]


def same(shape: Shape) -> tuple[Shape, tuple[int, ...]]:
    """Their tensor is ours."""
    return shape, tuple(range(len(shape)))


def vector(shape: Shape) -> tuple[Shape, tuple[int, ...]]:
    """Theirs has one axis: biases of heads, scales, and single numbers as vectors."""
    return (math.prod(shape),), (0,)


def scalar(shape: Shape) -> tuple[Shape, tuple[int, ...]]:
    """Theirs has no axis, ours one of size 1."""
    return (), ()


def ones(count: int) -> Layout:
    """Theirs has so many more axes of size 1 in front."""
    return lambda shape: ((1,) * count + shape, tuple(range(count + len(shape))))


def linear(inputs: int = 1) -> Layout:
    """Theirs is [out, in] (torch.nn.Linear); ours is [in…, out…], with so many axes of inputs (heads have two)."""
    return lambda shape: ((math.prod(shape[inputs:]), math.prod(shape[:inputs])), (1, 0))


def convolution(shape: Shape) -> tuple[Shape, tuple[int, ...]]:
    """Theirs is [out, in, height, width] (torch.nn.Conv2d), ours [height, width, in, out]."""
    height, width, inputs, outputs = shape
    return (outputs, inputs, height, width), (2, 3, 1, 0)


def patches(patch: int, channels: int = 3) -> Layout:
    """Theirs is the convolution that embeds patches, [out, channels, patch, patch], ours a matrix (nn.patch_embed)."""
    return lambda shape: ((shape[-1], channels, patch, patch), (2, 3, 1, 0))


def clips(patch: int, frames: int, channels: int = 3) -> Layout:
    """The same over several frames, [out, channels, frames, patch, patch] (torch.nn.Conv3d)."""
    return lambda shape: ((shape[-1], channels, frames, patch, patch), (2, 3, 4, 1, 0))


@dataclass(frozen=True)
class Rule:
    """One leaf of ours.

    ours: its path, "blocks/attention/q/kernel".
    theirs: the tensor's name; "{}" stands for the number of the layer, where ours has a leading axis of layers.
    layout: how one becomes the other.
    join: several rules may name one tensor: theirs is their leaves one after the other, in the order of the table,
      along this axis of theirs.
    layers: the numbers (or words) that "{}" takes; 0, 1, 2 … if left out.
    rows: where ours has no axis of layers, but each of these tensors so many rows of its first axis.
    """

    ours: str
    theirs: str
    layout: Layout = same
    join: int | None = None
    layers: Sequence[int | str] | None = None
    rows: Sequence[int] | None = None

    @property
    def layered(self) -> bool:
        """Whether ours has an axis of layers, each in a tensor of its own."""
        return "{}" in self.theirs and self.rows is None


@dataclass(frozen=True)
class Piece:
    """What of a leaf is in a tensor: leaf[at] is theirs[start:stop along axis].transpose(axes).reshape(ours)."""

    key: str
    shape: Shape  # of the piece in their tensor
    axes: tuple[int, ...]
    ours: Shape  # of the piece in our leaf
    at: int | slice | EllipsisType = ...  # a layer, some rows, or all of it
    axis: int | None = None
    start: int = 0

    def load(self, tensor: np.ndarray) -> np.ndarray:
        if self.axis is not None:
            cut = slice(self.start, self.start + self.shape[self.axis])
            tensor = tensor[(slice(None),) * self.axis + (cut,)]
        return tensor.transpose(self.axes).reshape(self.ours)

    def save(self, leaf: np.ndarray) -> np.ndarray:
        return leaf.reshape([self.shape[a] for a in self.axes]).transpose(np.argsort(self.axes))


@dataclass(frozen=True)
class Plan:
    """What the rules make of a spec: the pieces of every leaf, layer after layer, and the shape of every tensor."""

    leaves: dict[str, ParamSpec]
    pieces: dict[str, tuple[Piece, ...]]
    stacked: frozenset[str]
    tensors: dict[str, Shape]


def plan(spec: Spec, rules: Iterable[Rule]) -> Plan:
    """The plan of a table.

    Raises:
      ValueError: the table does not name every leaf of the spec exactly once, or two rules want one tensor and do not
        join: a mistake in the table, not in anybody's file.
    """
    leaves = tree.flatten(spec)
    rules = list(rules)
    named = [r.ours for r in rules]
    if sorted(named) != sorted(leaves):
        twice = sorted({n for n in named if named.count(n) > 1})
        raise ValueError(
            f"The table does not fit the spec: it lacks {sorted(set(leaves) - set(named))}, names in vain "
            f"{sorted(set(named) - set(leaves))}, and twice {twice}."
        )
    pieces, tensors, joins = {}, {}, {}
    for rule in rules:
        out = []
        for key, place, shape in _parts(rule, leaves[rule.ours].shape):
            theirs, axes = rule.layout(shape)
            at, start, whole = rule.join, 0, theirs
            if key in tensors:
                before = tensors[key]
                if at is None or joins[key] != at:
                    raise ValueError(f"Two rules name the tensor {key} and do not say along which axis they join.")
                if before[:at] + before[at + 1 :] != theirs[:at] + theirs[at + 1 :]:
                    raise ValueError(f"The rule of {rule.ours} cannot join {theirs} to {before} of {key}.")
                start = before[at]
                whole = (*before[:at], start + theirs[at], *before[at + 1 :])
            joins[key], tensors[key] = at, whole
            out.append(Piece(key, theirs, axes, shape, place, at, start))
        pieces[rule.ours] = tuple(out)
    stacked = frozenset(r.ours for r in rules if r.layered)
    return Plan(leaves, pieces, stacked, tensors)


def _parts(rule: Rule, shape: Shape) -> Iterator[tuple[str, int | slice | EllipsisType, Shape]]:
    """The tensors of a leaf of this shape: their names, and what of the leaf each holds."""
    if "{}" not in rule.theirs:
        yield rule.theirs, ..., shape
        return
    numbers = range(shape[0]) if rule.layers is None else rule.layers
    if rule.rows is not None:
        if sum(rule.rows) != shape[0] or len(numbers) != len(rule.rows):
            raise ValueError(f"The rule of {rule.ours} names {rule.rows} of {shape[0]} rows.")
        stops = np.cumsum(rule.rows).tolist()
        for i, n, stop in zip(numbers, rule.rows, stops, strict=True):
            yield rule.theirs.format(i), slice(stop - n, stop), (n, *shape[1:])
        return
    if len(numbers) != shape[0]:
        raise ValueError(f"The rule of {rule.ours} names {len(numbers)} layers of {shape[0]}.")
    for n, i in enumerate(numbers):
        yield rule.theirs.format(i), n, shape[1:]


@runtime_checkable
class Source(Protocol):
    """Tensors by name, read when asked for (convert.files.Directory; `Arrays` for arrays at hand)."""

    where: str

    def shapes(self) -> Mapping[str, Shape]: ...

    def dtypes(self) -> Mapping[str, np.dtype]: ...

    def read(self, key: str) -> np.ndarray: ...


@dataclass(frozen=True)
class Arrays:
    """Arrays at hand as a Source."""

    arrays: Mapping[str, Any]
    where: str = "these arrays"

    def shapes(self) -> dict[str, Shape]:
        return {key: tuple(x.shape) for key, x in self.arrays.items()}

    def dtypes(self) -> dict[str, np.dtype]:
        return {key: np.dtype(x.dtype) for key, x in self.arrays.items()}

    def read(self, key: str) -> np.ndarray:
        return np.asarray(self.arrays[key])


def dropped(keys: Iterable[str], patterns: Mapping[str, str]) -> dict[str, str]:
    """Which of the keys are left out and why, by the first regular expression that matches a key whole."""
    out = {}
    for key in keys:
        for pattern, reason in patterns.items():
            if re.fullmatch(pattern, key):
                out[key] = reason
                break
    return out


def load(
    spec: Spec,
    rules: Iterable[Rule],
    source: Source,
    *,
    drop: Mapping[str, str] | None = None,
    shardings: dict | None = None,
    dtype: Any = None,
) -> dict:
    """The parameters of a spec, read from a source leaf by leaf.

    Args:
      spec: of the parameters.
      rules: the family's table.
      source: where the tensors are.
      drop: regular expressions of tensors that are not parameters, and why they are none.
      shardings: the parameters' shardings (`core.spec.shardings`): every device gets its part and the host holds one
        leaf at a time. Left out: on the default device.
      dtype: of the parameters; the file's own if left out.

    Raises:
      InputError: tensors are missing, surplus, of another shape (all are listed) or in a format that cannot be had;
        nothing has been read then.
    """
    drop = drop or {}
    made = plan(spec, rules)
    refuse(made, source, drop)
    refuse_formats(made, source, dtype)
    flat = {} if shardings is None else tree.flatten(shardings)
    formats = kinds(made, source, dtype)
    return tree.unflatten({path: _leaf(made, path, source, flat.get(path), formats[path]) for path in made.leaves})


def kinds(made: Plan, source: Source, dtype: Any) -> dict[str, np.dtype]:
    """The number format that every leaf gets."""
    formats, out = source.dtypes(), {}
    for path, of in made.leaves.items():
        kind = formats[made.pieces[path][0].key] if made.pieces[path] else of.dtype  # a stack may have no layers
        if dtype is not None and jnp.issubdtype(of.dtype, jnp.floating):
            kind = dtype
        out[path] = np.dtype(kind)
    return out


def refuse(made: Plan, source: Source, drop: Mapping[str, str]) -> None:
    """Raises InputError where the source's tensors are not those of the plan."""
    there = source.shapes()
    missing = sorted(set(made.tensors) - set(there))
    surplus = sorted(set(there) - set(made.tensors) - set(dropped(there, drop)))
    other = sorted(
        f"{key} is {list(there[key])} and not {list(shape)}"
        for key, shape in made.tensors.items()
        if key in there and tuple(there[key]) != shape
    )
    if not (missing or surplus or other):
        return
    said = [
        f"{len(what)} {name} ({', '.join(what[:20])}{', …' if len(what) > 20 else ''})"
        for name, what in (("missing", missing), ("surplus", surplus), ("of another shape", other))
        if what
    ]
    raise InputError(
        f"The tensors in {source.where} are not those of its config: {'; '.join(said)}; use the config.json that "
        f"belongs to these weights."
    )


def refuse_formats(made: Plan, source: Source, dtype: Any) -> None:
    """Raises InputError where the source's number formats cannot be those of the plan's leaves."""
    there = source.dtypes()
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(f"Parameters cannot be {jnp.dtype(dtype)}; choose a floating-point format (dtype).")
    for path, of in made.leaves.items():
        floating = jnp.issubdtype(of.dtype, jnp.floating)
        for piece in made.pieces[path]:
            found, first = there[piece.key], there[made.pieces[path][0].key]
            if jnp.issubdtype(found, jnp.floating) != floating:
                raise InputError(
                    f"The tensor {piece.key} in {source.where} holds {found} where {path} is {of.dtype}; give weights "
                    f"that are not quantised."
                )
            if dtype is not None and floating:
                continue
            if found != first:
                raise InputError(
                    f"The layers of {path} in {source.where} have several number formats ({first}, {found} in "
                    f"{piece.key}); say which one all shall have (dtype)."
                )
            if jax.dtypes.canonicalize_dtype(found) != found:
                raise InputError(
                    f"The tensor {piece.key} in {source.where} holds {found}, which JAX would cut; say which format "
                    f"the parameters shall have (dtype), or set jax_enable_x64."
                )


def _leaf(made: Plan, path: str, source: Source, sharding: Any, dtype: Any) -> jax.Array:
    """One leaf: every tensor is read once, and goes into the parts of all of this process's devices that hold it."""
    of, pieces = made.leaves[path], made.pieces[path]
    if sharding is None:
        wanted = {tuple((0, size) for size in of.shape)}
    else:
        wanted = {_bounds(index, of.shape) for index in sharding.addressable_devices_indices_map(of.shape).values()}
    parts = {b: np.empty([stop - start for start, stop in b], dtype) for b in wanted}
    for piece in pieces:
        cuts = {b: cut for b in wanted if (cut := _cut(piece, b)) is not None}
        tensor = cast(piece.load(source.read(piece.key)), dtype, f"The tensor {piece.key}") if cuts else None
        for b, (here, there) in cuts.items():
            parts[b][here] = tensor[there]
    if sharding is None:
        return jnp.asarray(*parts.values())
    return jax.make_array_from_callback(of.shape, sharding, lambda index: parts[_bounds(index, of.shape)])


def _cut(piece: Piece, bounds: tuple[tuple[int, int], ...]) -> tuple[Any, tuple[slice, ...]] | None:
    """Where a part of a leaf (its bounds) has what is in a piece, and where the piece has it; None: nowhere."""
    inner = tuple(slice(*edge) for edge in bounds)
    if piece.at is ...:
        return ..., inner
    first, last = bounds[0]
    if isinstance(piece.at, int):
        return (piece.at - first, inner[1:]) if first <= piece.at < last else None
    start, stop = max(first, piece.at.start), min(last, piece.at.stop)
    there = slice(start - piece.at.start, stop - piece.at.start)
    return (slice(start - first, stop - first), (there, *inner[1:])) if start < stop else None


def _bounds(index: tuple[slice, ...], shape: Shape) -> tuple[tuple[int, int], ...]:
    return tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))


def stream(
    spec: Spec, rules: Iterable[Rule], params: dict, keys: Iterable[str] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Their tensors with their names, of all parameters, or of those whose names are in `keys`.

    In the order of our leaves. Of arrays on devices the host holds one leaf at a time (all of those that share
    tensors); of leaves that are read when asked for (`core.parts.Lazy`), one tensor.

    Raises:
      InputError: the parameters are not those of the spec, or not all on this process's devices.
    """
    made = plan(spec, rules)
    flat = tree.flatten(params)
    wrong = sorted(set(flat) ^ set(made.leaves)) or sorted(
        path for path, p in made.leaves.items() if tuple(np.shape(flat[path])) != p.shape
    )
    if wrong:
        raise InputError(
            f"These parameters are not those of the config: {wrong} differ; give the tree that its spec describes."
        )
    wanted = set(made.tensors) if keys is None else set(keys)
    for group in _groups(made):
        takers: dict[str, list[tuple[str, Piece]]] = {}
        for path in group:
            for piece in made.pieces[path]:
                if piece.key in wanted:
                    takers.setdefault(piece.key, []).append((path, piece))
        leaves = {path: _readable(path, flat[path]) for path in group} if takers else {}
        for key, parts in takers.items():
            yield key, _tensor(key, made, leaves, parts)
        del leaves  # before the next


def _groups(made: Plan) -> list[list[str]]:
    """The leaves, those that share tensors together."""
    groups: list[tuple[list[str], set[str]]] = []
    for path, pieces in made.pieces.items():
        paths, keys = [path], {piece.key for piece in pieces}
        for other in [group for group in groups if not keys.isdisjoint(group[1])]:
            groups.remove(other)
            paths, keys = other[0] + paths, other[1] | keys
        groups.append((paths, keys))
    return [paths for paths, _ in groups]


def _readable(path: str, leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array):
        return leaf
    if not leaf.is_fully_addressable:
        raise InputError(f"The parameter {path} is spread over several processes; gather it on one before saving.")
    # A copy, because an array keeps what NumPy was once given of it, and the host would hold all of them.
    return np.asarray(jnp.copy(leaf))


def _tensor(key: str, made: Plan, leaves: dict[str, Any], parts: list[tuple[str, Piece]]) -> np.ndarray:
    """Their tensor, made of layers or rows of our leaves."""
    whole = None
    for path, piece in parts:
        leaf = leaves[path]
        theirs = piece.save(np.asarray(leaf[piece.at]) if isinstance(piece.at, int) else np.asarray(leaf)[piece.at])
        if piece.axis is None:
            return np.ascontiguousarray(theirs).reshape(piece.shape)
        if whole is None:
            whole = np.empty(made.tensors[key], leaf.dtype)
        if whole.dtype != leaf.dtype:
            raise InputError(
                f"The tensor {key} is made of {whole.dtype} and {leaf.dtype} ({path}); give both one format."
            )
        stop = piece.start + piece.shape[piece.axis]
        whole[(slice(None),) * piece.axis + (slice(piece.start, stop),)] = theirs
    return whole


def save(spec: Spec, rules: Iterable[Rule], params: dict, keys: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """Their tensors by name, all at once; arguments and errors are those of `stream`."""
    return dict(stream(spec, rules, params, keys))
