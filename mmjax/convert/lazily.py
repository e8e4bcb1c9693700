"""Parameters that are read when asked for: a model of any size as a tree of leaves that hold nothing yet.

They are `core.parts.Lazy`: what writes models (`huggingface.save`, `orbax.write`) takes them for arrays, and has one
tensor at a time in memory.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmjax.convert.rules import Piece, Rule, Shape, Source, kinds, plan, refuse, refuse_formats
from mmjax.core import tree
from mmjax.core.cast import cast
from mmjax.core.spec import Spec


@dataclass(frozen=True)
class Leaf:
    """A leaf of ours that is read from a source when asked for: `leaf[i]` gives a layer, `np.asarray(leaf)` all."""

    source: Source
    pieces: tuple[Piece, ...]
    shape: Shape
    dtype: np.dtype
    stacked: bool

    def __getitem__(self, i: int) -> np.ndarray:
        piece = self.pieces[i]
        return cast(piece.load(self.source.read(piece.key)), self.dtype, f"The tensor {piece.key}")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if len(self.pieces) == 1 and not self.stacked:
            return self[0]
        out = np.empty(self.shape, self.dtype)
        for i, piece in enumerate(self.pieces):
            out[piece.at] = self[i]
        return out


def load(
    spec: Spec, rules: Iterable[Rule], source: Source, *, drop: Mapping[str, str] | None = None, dtype: Any = None
) -> dict:
    """The parameters of a spec as `Leaf`s, of which none is read yet; arguments and errors are those of
    `convert.rules.load`."""
    made = plan(spec, rules)
    refuse(made, source, drop or {})
    refuse_formats(made, source, dtype)
    formats = kinds(made, source, dtype)
    return tree.unflatten(
        {
            path: Leaf(source, made.pieces[path], of.shape, formats[path], path in made.stacked)
            for path, of in made.leaves.items()
        }
    )


@dataclass(frozen=True)
class Whole:
    """An array that `read` gives when asked for, all of it at once."""

    shape: Shape
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    stacked: bool = False

    def __getitem__(self, i: int) -> np.ndarray:
        return self.read()[i, ...]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.read()


@dataclass(frozen=True)
class Cast:
    """A leaf in another number format, cast when it is read."""

    leaf: Any
    dtype: np.dtype
    what: str

    @property
    def shape(self) -> Shape:
        return tuple(self.leaf.shape)

    @property
    def stacked(self) -> bool:
        return getattr(self.leaf, "stacked", False)

    def __getitem__(self, i: int) -> np.ndarray:
        return cast(self.leaf[i], self.dtype, self.what)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return cast(np.asarray(self.leaf), self.dtype, self.what)
