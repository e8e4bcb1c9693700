"""Hugging Face directories of weights, in and out: `load` gives a module with its parameters, `save` the files again.

    model = huggingface.load("path/to/siglip", mesh=mesh)     # sharded while it is read
    y = model.of.apply(model.params, x, model.cfg)
    huggingface.save("path/to/new", dataclasses.replace(model, params=trained))

config.json and safetensors are read, the small files beside them are carried along (`convert.side`), and nothing else:
no pickle, and none of the code that `auto_map` names. What was loaded and not changed is saved as the same bytes, file
by file.
"""

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.convert import lazily, side
from mmjax.convert import rules as tables
from mmjax.convert.files import CONFIG, Directory
from mmjax.convert.found import Found
from mmjax.convert.model import FAMILIES as FAMILIES  # part of what this file offers
from mmjax.convert.model import Model, Origin, understand
from mmjax.convert.writing import SHARD_BYTES as SHARD_BYTES
from mmjax.convert.writing import save as save
from mmjax.convert.writing import split as split
from mmjax.core import spec as specs
from mmjax.core import tree
from mmjax.core.errors import InputError
from mmjax.core.files import PathLike
from mmjax.core.meshes import Rules

# Tensors that are no parameters (positions 0, 1, 2 …) are kept to be written again: so large each, and all together.
# Those that are somebody's, but not this model's (`Found.rest`), are kept however large.
MAX_KEPT, MAX_KEPT_ALL = 1 << 20, 64 << 20


def load(
    path: PathLike, *, mesh: jax.sharding.Mesh | None = None, rules: Rules | None = None, dtype: Any = None
) -> Model:
    """The model in a local directory, as `save_pretrained` writes it or huggingface_hub downloads it.

    Args:
      path: the directory.
      mesh: what to shard the parameters over; left out, they are on the default device. Either way the host holds one
        parameter at a time.
      rules: which mesh axes carry which axes of parameters.
      dtype: of the parameters; that of the files if left out.

    Raises:
      InputError: the family is unknown; a file is missing, damaged or unsafe; or a tensor is missing, surplus, of
        another shape than config.json says, or in a format that is none of parameters.
    """
    source, found, spec = _understood(path)
    params = tables.load(
        spec,
        found.rules,
        source,
        drop={**found.dropped, **found.rest},
        shardings=None if mesh is None else specs.shardings(spec, mesh, rules or Rules()),
        dtype=dtype,
    )
    kept, lost = _dropped(source, tables.plan(spec, found.rules), found)
    kept = {key: np.asarray(x) for key, x in in_format(kept, found, dtype).items()}
    return Model(found.of, found.cfg, params, _origin(source, found, kept, lost))


def opened(path: PathLike, *, dtype: Any = None) -> Model:
    """The same model with nothing read but headers and small files: its leaves are read when `save` asks for them.

    So a model of any size is copied in the memory of one tensor; all tensors that are no parameters are kept.

    Args:
      path: the directory; it must not change meanwhile.
      dtype: of the parameters; that of the files if left out.

    Raises:
      InputError: what `load` refuses.
    """
    source, found, spec = _understood(path)
    params = lazily.load(spec, found.rules, source, drop={**found.dropped, **found.rest}, dtype=dtype)
    ours, shapes, dtypes = tables.plan(spec, found.rules).tensors, source.shapes(), source.dtypes()
    kept = {
        key: lazily.Whole(shapes[key], dtypes[key], functools.partial(source.read, key))
        for key in shapes
        if key not in ours and key not in found.copies
    }
    kept = in_format(kept, found, dtype)
    return Model(found.of, found.cfg, params, _origin(source, found, kept))


def in_format(kept: Mapping[str, Any], found: Found, dtype: Any) -> dict[str, Any]:
    """What is kept, parameters that the model does not compute with in another number format; all as it is for None."""
    rest = {} if dtype is None else tables.dropped(kept, found.rest)
    return {
        key: lazily.Cast(x, np.dtype(dtype), f"The tensor {key}")
        if key in rest and jnp.issubdtype(x.dtype, jnp.floating)
        else x
        for key, x in kept.items()
    }


def _understood(path: PathLike) -> tuple[Directory, Found, specs.Spec]:
    """A directory, what its config says, and the spec of its parameters."""
    source = Directory(path)
    keys = source.shapes().keys()
    found = understand(source.config, frozenset(keys), f"{source.path / CONFIG}")
    if found.otherwise is not None and not all(_equal(source, *pair) for pair in found.copies.items()):
        found = found.otherwise
    spec = found.of.spec(found.cfg)
    _refuse_layers(spec, found, len(keys), source.where)
    return source, found, spec


def _origin(source: Directory, found: Found, kept: Mapping[str, Any], lost: tuple[str, ...] = ()) -> Origin:
    files = side.read(source.path, source.names)
    return Origin(source.config_bytes, source.config, found, source.headers, source.index, kept, lost, files)


def _refuse_layers(spec: specs.Spec, found: Found, tensors: int, where: str) -> None:
    """Raises InputError where a config claims more layers than there are tensors: before the table names them all."""
    leaves = tree.flatten(spec)
    for rule in found.rules:
        if not rule.layered or rule.ours not in leaves:
            continue
        if leaves[rule.ours].shape[0] > tensors:
            raise InputError(
                f"The config in {where} has {leaves[rule.ours].shape[0]:,} layers, and its files {tensors:,} tensors; "
                f"use the config.json that belongs to these weights"
            )


def _equal(source: Directory, key: str, other: str) -> bool:
    """Whether two tensors of a directory hold the same numbers; the host holds one at a time."""
    if source.shapes()[key] != source.shapes()[other] or source.dtypes()[key] != source.dtypes()[other]:
        return False
    one, two = (hashlib.sha256(np.ascontiguousarray(source.read(k)).view(np.uint8)).digest() for k in (key, other))
    return one == two


def _dropped(source: Directory, made: tables.Plan, found: Found) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    kept, lost, room = {}, [], MAX_KEPT_ALL
    rest = tables.dropped(source.shapes(), found.rest)
    for h in source.headers.values():
        for key, entry in h.tensors.items():
            if key in made.tensors or key in found.copies:
                continue
            size = entry.stop - entry.start
            if key in rest:
                kept[key] = source.read(key)
            elif size > min(MAX_KEPT, room):
                lost.append(key)
            else:
                kept[key] = source.read(key)
                room -= size
    return kept, tuple(lost)
