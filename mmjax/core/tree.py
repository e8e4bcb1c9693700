"""Names for the leaves of a tree: nested dicts, dataclasses and optimiser states as one flat dict, and back."""

import difflib
import fnmatch
import math
from collections.abc import Collection, Mapping, Sequence
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


def choose(tree: Mapping[str, Any], patterns: Sequence[str]) -> tuple[dict, dict]:
    """The leaves of a nested dict that any of the patterns names, and the rest, as two nested dicts without empty ones.

    A pattern is a name ("vision", which takes everything in it, or "decoder/norm/scale") or has wildcards, of which *
    crosses "/" ("*/attention/*", "*/bias"). With "!" in front it takes back what it names from those before it
    ("connector", "!connector/projection"), or, as the first of all, from everything ("!decoder": all but the decoder).
    `merge` puts the two together again.

    Raises:
      InputError: a pattern that names nothing.
    """
    flat = flatten(tree)
    chosen = set(flat) if patterns and patterns[0].startswith("!") else set()
    for given in patterns:
        pattern = given.removeprefix("!")
        named = {name for name in flat if fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}/")}
        if not named:
            near = difflib.get_close_matches(pattern, _folders(flat), 1, 0.4)
            hint = (
                f"did you mean {given[: -len(pattern)] + near[0]!r}?"
                if near
                else "give a path of the tree, as 'vision' or '*/bias'."
            )
            raise InputError(f"the pattern {given!r} names no parameter; {hint}")
        chosen = chosen | named if given == pattern else chosen - named
    parts = ({n: x for n, x in flat.items() if (n in chosen) is wanted} for wanted in (True, False))
    return tuple(unflatten(part) if part else {} for part in parts)


def cover(tree: Mapping[str, Any], names: Collection[str]) -> tuple[str, ...]:
    """The fewest names and folders that hold these leaves of a nested dict, and no other; patterns for `choose`."""
    flat = flatten(tree)
    open = {folder for name in flat if name not in names for folder in _folders({name: None})}
    out: dict[str, None] = {}
    for name in flat:
        if name in names:
            out[min(_folders({name: None}) - open, key=len)] = None
    return tuple(out)


def _folders(flat: Mapping[str, Any]) -> set[str]:
    """All names and the folders they lie in."""
    return {"/".join(parts[: i + 1]) for parts in (name.split("/") for name in flat) for i in range(len(parts))}


def merge(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict:
    """One nested dict of two that have no leaf in common.

    Raises:
      InputError: they have.
    """
    out = dict(a)
    for key, value in b.items():
        if key not in out:
            out[key] = value
        elif isinstance(value, Mapping) and isinstance(out[key], Mapping):
            out[key] = merge(out[key], value)
        else:
            raise InputError(f"{key!r} is in both trees; leave it out of one")
    return out


def count(tree: Any) -> int:
    """How many numbers a tree holds (its parameters), from shapes alone: works on `jax.ShapeDtypeStruct` too."""
    return sum(math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """How many bytes the arrays of a tree take, unsharded, from shapes and dtypes alone."""
    return sum(
        math.prod(np.shape(leaf)) * (leaf if hasattr(leaf, "dtype") else np.asarray(leaf)).dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
