"""Models as mmjax checkpoints that Hugging Face directories can be made of again.

    orbax.write("run/base", huggingface.opened("path/to/siglip"))    # in the memory of one tensor
    model = orbax.read("run/base", mesh=mesh)                        # sharded as it is read
    huggingface.save("path/to/new", orbax.opened("run/base"))        # the same bytes, in the memory of one tensor

What is written is one step of an ordinary checkpoint (`mmjax.checkpoint`): `params/…` as the model's spec has them, and
`origin/…`, bytes, with all that the directory holds besides parameters (`huggingface.Origin`). The names of files and
tensors are in the step's metadata.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.checkpoint import Checkpoints
from mmjax.convert import header, huggingface, lazily, side
from mmjax.convert import rules as tables
from mmjax.convert.files import MAX_CONFIG, MAX_INDEX, new_directory, plain_name
from mmjax.convert.found import Found
from mmjax.convert.model import Model, Origin, origin_of
from mmjax.core import manifest as manifests
from mmjax.core import meshes, parts, processes, strict_json, tree
from mmjax.core import spec as specs
from mmjax.core.archive import local_path
from mmjax.core.checksum import checksums_numpy
from mmjax.core.errors import InputError
from mmjax.core.files import PathLike, require_space
from mmjax.core.meshes import Rules
from mmjax.core.strict_json import shown

FORMAT = 1
_DTYPES = {dtype.name: dtype for dtype in header.FORMATS.values()}
_KEY = "huggingface"  # of what this file adds to the metadata of a step


def packed(model: Model) -> tuple[dict, dict]:
    """A model as `Checkpoints.save` takes it: the tree, and what must be in the step's metadata.

    So a training loop saves steps that `read` and `opened` understand: more may be in both, an optimizer's state.

    Raises:
      InputError: the model came from nowhere, or is not what its config says.
    """
    origin = origin_of(model)
    wanted, there = tree.flatten(model.of.spec(model.cfg)), tree.flatten(model.params)
    differ = sorted(wanted.keys() ^ there.keys()) or [n for n, p in wanted.items() if p.shape != tuple(there[n].shape)]
    if differ:
        raise InputError(
            f"The parameters are not those of the model's config ({', '.join(map(shown, differ[:5]))} differ); give it "
            f"its own"
        )
    small = {"config": origin.config} if origin.index is None else {"config": origin.config, "index": origin.index}
    out: dict[str, Any] = {name: np.frombuffer(data, np.uint8) for name, data in small.items()}
    out |= _numbered("headers", [np.frombuffer(h.raw, np.uint8) for h in origin.headers.values()])
    out |= _numbered("files", [np.frombuffer(data, np.uint8) for data in origin.files.values()])
    out |= _numbered("kept", [_as_bytes(x) for x in origin.kept.values()])
    names = {
        "format": FORMAT,
        "headers": {name: h.size for name, h in origin.headers.items()},
        "files": list(origin.files),
        "kept": {key: np.dtype(x.dtype).name for key, x in origin.kept.items()},
        "lost": list(origin.lost),
    }
    return {"params": model.params, "origin": out}, {_KEY: names}


def _numbered(name: str, arrays: list[Any]) -> dict[str, dict[str, Any]]:
    return {name: {f"{i:05d}": x for i, x in enumerate(arrays)}} if arrays else {}


def _bytes(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8)


def _as_bytes(x: Any) -> Any:
    """The bytes of a tensor: zarr has not every number format."""
    if not isinstance(x, parts.Lazy):
        return _bytes(x)
    return lazily.Whole((_bytes_of(x.shape, x.dtype),), np.dtype(np.uint8), lambda: _bytes(np.asarray(x)))


def write(
    path: PathLike, model: Model, *, step: int = 0, sizes: Mapping[str, int] | None = None, rules: Rules | None = None
) -> None:
    """Writes a model as a new checkpoint directory of one step: whole, or not at all.

    Leaves that are read when asked for (`huggingface.opened`, `opened`) are written part by part, in one process, in
    the memory of one tensor; arrays, as `Checkpoints.save` writes them, in every process that holds a part.

    Args:
      path: a directory that is not there yet, or is empty.
      sizes: the axes of the mesh that will read it ({"fsdp": 8}): arrays are cut so that a device finds its part alone.
        For leaves that are read when asked for; arrays are written as they lie.
      rules: which mesh axes carry which axes of parameters.

    Raises:
      InputError: there is something at `path`; the disk is full; the model came from nowhere.
    """
    content, metadata = packed(model)
    flat = tree.flatten(content)
    if not any(isinstance(x, parts.Lazy) for x in flat.values()):
        if sizes:
            raise InputError("Arrays on devices are written as they lie; give sizes for a model that is `opened` only.")
        directory = local_path(path)
        alone = not processes.several() and os.path.lexists(directory)  # of several, one may have begun
        if alone and (directory.is_symlink() or not directory.is_dir() or any(directory.iterdir())):
            raise InputError(f"{directory} exists already; choose another directory, or remove it first")
        with Checkpoints(directory) as checkpoints:
            if checkpoints.steps():
                raise InputError(f"{directory} holds checkpoints already; choose another directory")
            checkpoints.save(step, content, metadata=metadata)
        return
    if processes.several():
        raise InputError(
            "What is read when asked for is written by one process alone; run it in one, or load the model"
        )
    spec = tree.flatten(model.of.spec(model.cfg))
    cuts = {f"params/{name}": _cuts(p, rules or Rules(), dict(sizes or {})) for name, p in spec.items()}
    with new_directory(path) as folder:
        require_space(folder, sum(_bytes_of(x.shape, x.dtype) for x in flat.values()), "write a checkpoint")
        data = folder / str(step)
        made = {"format": manifests.FORMAT, "step": step, "metadata": metadata, "keys": {}}
        made["leaves"] = parts.write(data, flat, cuts)
        made["files"] = manifests.list_files(data)
        (folder / "done").mkdir()
        manifests.write_manifest(folder, made)


def _cuts(of: specs.ParamSpec, rules: Rules, sizes: dict[str, int]) -> tuple[int, ...]:
    """Into how many parts a mesh of these sizes cuts the axes of a parameter."""
    placed = meshes.partition(of.axes, rules, sizes, of.shape)
    names = [entry if isinstance(entry, tuple) else (entry,) for entry in placed]
    return tuple(math.prod(sizes[name] for name in some if name) for some in names)


def opened(path: PathLike, *, step: int | None = None, dtype: Any = None) -> Model:
    """A model from a checkpoint, with leaves that are read when they are asked for.

    Every file is compared with its CRC-32 first.

    Args:
      path: a checkpoint directory that `write`, or `Checkpoints.save` with `packed`, has made.
      step: the newest, if left out.
      dtype: of the parameters; as they were saved, if left out.

    Raises:
      InputError: no such step, it is damaged, holds no model, or one that is not what its config.json says.
    """
    directory, manifest = _manifest(path, step)
    for problem in manifests.damaged_files(directory / str(manifest["step"]), manifest["files"]):
        raise manifests.Damaged(problem)
    origin, leaves = _understood(directory, manifest)
    params = {name: leaves[f"params/{name}"] for name in tree.flatten(origin.found.of.spec(origin.found.cfg))}
    if dtype is not None:
        params = {name: _cast(name, x, dtype) for name, x in params.items()}
        origin = dataclasses.replace(origin, kept=huggingface.in_format(origin.kept, origin.found, dtype))
    return Model(origin.found.of, origin.found.cfg, tree.unflatten(params), origin)


def read(
    path: PathLike,
    *,
    step: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    rules: Rules | None = None,
    dtype: Any = None,
) -> Model:
    """A model from a checkpoint, its parameters on devices; arguments and errors are those of `opened` and of
    `huggingface.load`. Checksums are compared, of files and of arrays.
    """
    directory, manifest = _manifest(path, step)
    origin, leaves = _understood(directory, manifest)
    spec = origin.found.of.spec(origin.found.cfg)
    places = {} if mesh is None else tree.flatten(specs.shardings(spec, mesh, rules or Rules()))
    like = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places.get(name.removeprefix("params/")))
        for name, x in leaves.items()
        if name.startswith("params/")
    }
    with Checkpoints(directory) as checkpoints:
        found = tree.flatten(checkpoints.restore(tree.unflatten(like), manifest["step"], partial=True).tree)
    params = {name: found[f"params/{name}"] for name in tree.flatten(spec)}
    if dtype is not None:
        params = {name: _cast_array(name, x, _floating(dtype)) for name, x in params.items()}
    kept = {key: np.asarray(x) for key, x in huggingface.in_format(origin.kept, origin.found, dtype).items()}
    return Model(origin.found.of, origin.found.cfg, tree.unflatten(params), dataclasses.replace(origin, kept=kept))


def _floating(dtype: Any) -> np.dtype:
    if not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(f"Parameters are to be {np.dtype(dtype)}, which is no floating-point format; give one.")
    return np.dtype(dtype)


def _cast_array(name: str, x: jax.Array, dtype: np.dtype) -> jax.Array:
    """core.cast.cast on devices."""
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype == dtype:
        return x
    out = x.astype(dtype)
    if bool((jnp.isfinite(x) & ~jnp.isfinite(out)).any()):
        raise InputError(
            f"The parameter {name} holds numbers larger than any of {dtype}; choose another format (dtype)"
        )
    return out


def _cast(name: str, leaf: Any, dtype: Any) -> Any:
    if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype == _floating(dtype):
        return leaf
    return lazily.Cast(leaf, np.dtype(dtype), f"The parameter {name}")


def _manifest(path: PathLike, step: int | None) -> tuple[Path, dict[str, Any]]:
    directory = local_path(path)
    return directory, manifests.read_manifest(directory, manifests.newest_step(directory) if step is None else step)


def _understood(directory: Path, manifest: dict[str, Any]) -> tuple[Origin, dict[str, parts.Stored]]:
    """What a step says about the directory it came from, none of it believed, and its arrays."""
    where = f"step {manifest['step']} in {directory}"
    names = _names(manifest, where)
    leaves = parts.stored(directory, manifest)

    def small(name: str, limit: int) -> bytes:
        leaf = leaves.get(f"origin/{name}")
        if leaf is None or leaf.dtype != np.uint8 or len(leaf.shape) != 1 or leaf.shape[0] > limit:
            raise manifests.Damaged(f"{where} has no origin/{name} of at most {limit:,} bytes")
        data = np.asarray(leaf)
        manifests.compare_leaves(
            checksums_numpy({name: data}),
            manifest | {"leaves": {name: manifest["leaves"][f"origin/{name}"]}},
            directory,
        )
        return data.tobytes()

    config = small("config", MAX_CONFIG)
    raw = strict_json.loads(config, f"config.json of {where}", max_bytes=MAX_CONFIG)
    if not isinstance(raw, dict):
        raise InputError(f"config.json of {where} is not a JSON object; make the checkpoint again")
    index = small("index", MAX_INDEX) if "origin/index" in leaves else None
    headers = {
        plain_name(name, directory): header.parse(
            small(f"headers/{i:05d}", header.MAX_HEADER + 8), size, f"{shown(name)} of {where}"
        )
        for i, (name, size) in enumerate(names["headers"].items())
    }
    side.refuse({name: _size(leaves, f"origin/files/{i:05d}") for i, name in enumerate(names["files"])}, where)
    files = {name: small(f"files/{i:05d}", side.MAX_FILE) for i, name in enumerate(names["files"])}
    entries = {key: entry for h in headers.values() for key, entry in h.tensors.items()}
    kept = {}
    for i, (key, dtype) in enumerate(names["kept"].items()):
        size = _size(leaves, f"origin/kept/{i:05d}")
        if key not in entries or dtype not in _DTYPES or size != _bytes_of(entries[key].shape, _DTYPES[dtype]):
            raise manifests.Damaged(f"{where} keeps the tensor {shown(key)}, which is not that of its header")
        kept[key] = _tensor(leaves[f"origin/kept/{i:05d}"], entries[key].shape, _DTYPES[dtype])
    found = huggingface.understand(raw, frozenset(entries), f"config.json of {where}")
    if found.otherwise is not None and _differ(found, leaves):
        found = found.otherwise
    _refuse(found, leaves, entries if headers else None, {*kept, *names["lost"], *found.copies}, where)
    return Origin(config, raw, found, headers, index, kept, tuple(names["lost"]), files), leaves


def _bytes_of(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _tensor(leaf: parts.Stored, shape: tuple[int, ...], dtype: np.dtype) -> lazily.Whole:
    return lazily.Whole(shape, dtype, lambda: np.asarray(leaf).view(dtype).reshape(shape))


def _differ(found: Found, leaves: Mapping[str, parts.Stored]) -> list[str]:
    """The parameters of which one has what the other has not, or has otherwise: a step and a config."""
    wanted = tree.flatten(found.of.spec(found.cfg))
    there = {name.removeprefix("params/"): x for name, x in leaves.items() if name.startswith("params/")}
    return sorted(wanted.keys() ^ there.keys()) or [
        name
        for name, p in wanted.items()
        if p.shape != there[name].shape
        or jnp.issubdtype(p.dtype, jnp.floating) != jnp.issubdtype(there[name].dtype, jnp.floating)
    ]


def _refuse(
    found: Found,
    leaves: Mapping[str, parts.Stored],
    entries: Mapping[str, header.Entry] | None,
    others: set[str],
    where: str,
) -> None:
    """Raises InputError where the arrays are not those of the config, or the headers not those of files of them."""
    differ = _differ(found, leaves)
    if not differ and entries is not None:
        tensors = tables.plan(found.of.spec(found.cfg), found.rules).tensors
        differ = sorted((tensors.keys() | others | found.copies.keys()) ^ entries.keys()) or [
            key for key, shape in tensors.items() if entries[key].shape != shape
        ]
    if differ:
        raise InputError(
            f"The arrays in {where} are not those of its config.json ({', '.join(map(shown, differ[:5]))} differ); "
            f"make the checkpoint again"
        )


def _parameters(found: Found) -> dict[str, specs.ParamSpec]:
    return tree.flatten(found.of.spec(found.cfg))


def _there(leaves: Mapping[str, parts.Stored]) -> dict[str, parts.Stored]:
    """The arrays of parameters, by path."""
    return {name.removeprefix("params/"): x for name, x in leaves.items() if name.startswith("params/")}


def _size(leaves: Mapping[str, parts.Stored], name: str) -> int:
    return math.prod(leaves[name].shape) if name in leaves else -1


def _names(manifest: dict[str, Any], where: str) -> dict[str, Any]:
    names = manifest["metadata"].get(_KEY) if isinstance(manifest["metadata"], dict) else None
    if names is None:
        raise InputError(
            f"{where} holds no model of mmjax.convert; give one that it wrote, or save with convert.orbax.packed"
        )
    names = names if isinstance(names, dict) else {}
    whole = [
        *(isinstance(names.get(k), list) and all(isinstance(n, str) for n in names[k]) for k in ("files", "lost")),
        isinstance(names.get("headers"), dict) and all(type(n) is int and n >= 0 for n in names["headers"].values()),
        isinstance(names.get("kept"), dict) and all(isinstance(n, str) for n in names["kept"].values()),
    ]
    if not all(whole):
        raise manifests.Damaged(f"the metadata of {where} is not what mmjax.convert writes")
    if names.get("format") != FORMAT:
        raise InputError(f"{where} was written by a newer mmjax, in format {shown(names.get('format'))}; update mmjax")
    return names
