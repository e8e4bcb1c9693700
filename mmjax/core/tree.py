"""Names for the leaves of a tree: nested dicts, dataclasses and optimiser states as one flat dict, and back."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mmjax.core.errors import InputError


def flatten(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by name, in the order of `jax.tree.leaves`.

    A name is the path with "/" between its parts: keys of dicts, field names of dataclasses (`flax.struct`) and named
    tuples (optax states), positions in lists and tuples: "opt_state/0/mu/layers/w". `None` is no leaf. A tree that is
    itself a leaf has the name "".

    Raises:
      InputError: a key holds a "/" or is empty, or two leaves would have one name.
    """
    flat: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        parts = [_part(key) for key in keys]
        for part in parts:
            if not part or "/" in part:
                raise InputError(
                    f"the key {part!r} in {'/'.join(parts)!r} cannot name a leaf; rename it, without '/' and not empty"
                )
        name = "/".join(parts)
        if name in flat:
            raise InputError(f"two leaves of the tree are called {name!r}; rename one of their keys")
        flat[name] = leaf
    return flat


def _part(key: Any) -> str:
    for attribute in ("name", "idx", "key"):  # GetAttrKey, SequenceKey, DictKey and FlattenedIndexKey
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def unflatten(flat: Mapping[str, Any]) -> Any:
    """The nested dict whose leaves have these names; what `flatten` made of dataclasses and tuples is dicts now.

    Raises:
      InputError: a name is a leaf and a folder at once ("a" and "a/b").
    """
    if list(flat) == [""]:
        return flat[""]
    # Dicts alone mark folders here, a leaf may be anything: so remember which folders this function made.
    tree: dict[str, Any] = {}
    folders: dict[str, dict[str, Any]] = {"": tree}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        folder, path = tree, ""
        for part in parents:
            path = f"{path}/{part}"
            if path not in folders:
                if part in folder:
                    raise InputError(f"{path[1:]!r} is a leaf and also the folder of {name!r}; rename one of them")
                folders[path] = folder[part] = {}
            folder = folders[path]
        if last in folder:
            raise InputError(f"{name!r} is a leaf and also the folder of other leaves; rename one of them")
        folder[last] = leaf
    return tree


def count(tree: Any) -> int:
    """How many numbers a tree holds (its parameters), from shapes alone: works on `jax.ShapeDtypeStruct` too."""
    return sum(math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """How many bytes the arrays of a tree take, unsharded, from shapes and dtypes alone."""
    return sum(
        math.prod(np.shape(leaf)) * (leaf if hasattr(leaf, "dtype") else np.asarray(leaf)).dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
