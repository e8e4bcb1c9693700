"""A model as a Hugging Face directory: what was not changed is the same bytes, file by file."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mmjax.convert import header
from mmjax.convert import rules as tables
from mmjax.convert.files import CONFIG, INDEX, SINGLE, new_directory
from mmjax.convert.header import FORMATS, Header
from mmjax.convert.model import Model, Origin, origin_of
from mmjax.core import spec as specs
from mmjax.core import tree
from mmjax.core.errors import InputError
from mmjax.core.files import PathLike, require_space

SHARD_BYTES = 5_000_000_000  # of a file of a model that came from none
_FLOATS = {"float16", "bfloat16", "float32", "float64"}


def save(path: PathLike, model: Model, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a model as a directory that `load` and transformers read: whole, or not at all.

    A model from a directory gets the same files again, with the new numbers in them: config.json, the index, the
    safetensors files, and the small files beside them. One that has been given another number format gets new headers.
    Of leaves that are read when asked for (`opened`), one tensor is in memory at a time; of arrays, one leaf.

    Args:
      path: a directory that is not there yet, or is empty.
      model: one without an origin needs `Origin.of(config)` first.
      shard_bytes: where the model came from no directory, how large a file may be (a single tensor may be larger).

    Raises:
      InputError: there is something at `path`; the parameters are not those of the config; the disk is full.
    """
    origin = origin_of(model)
    spec, rules = model.of.spec(model.cfg), origin.found.rules
    copies = {k: v for k, v in origin.found.copies.items() if origin.headers}
    formats = _formats(tables.plan(spec, rules), model.params) | {k: (x.dtype, x.shape) for k, x in origin.kept.items()}
    formats |= {key: formats[of] for key, of in copies.items()}
    sizes = {key: math.prod(shape) * dtype.itemsize for key, (dtype, shape) in formats.items()}
    homes = {name: [k for k in h.tensors if k in formats] for name, h in origin.headers.items()}
    same = {name: h for name, h in origin.headers.items() if _same(h, formats)}
    if not origin.headers:
        homes = split(sizes, shard_bytes)
    headers = dict(same)
    for name in (name for name, keys in homes.items() if keys and name not in same):
        metadata = origin.headers[name].metadata if origin.headers else {"format": "pt"}
        headers[name] = header.build({key: formats[key] for key in homes[name]}, metadata, f"{Path(path) / name}")
    at = {key: (name, entry.start) for name, h in headers.items() for key, entry in h.tensors.items()}
    unchanged = bool(origin.headers) and len(same) == len(origin.headers)
    small = {CONFIG: origin.config if unchanged else _with_format(origin, formats), **origin.files}
    index = origin.index if unchanged else _index(origin, homes, sizes, formats)
    with new_directory(path) as folder:
        require_space(folder, sum(sizes.values()) + sum(map(len, small.values())), "save a model")
        for name, h in headers.items():
            _write_at(folder / name, 0, h.raw)
        for key, (name, start) in at.items():
            if key in origin.kept:
                _write_at(folder / name, start, np.asarray(origin.kept[key]))
        for key, tensor in _stream(spec, rules, model.params, at.keys(), copies):
            name, start = at[key]
            _write_at(folder / name, start, tensor)
            del tensor  # before the next
        for name, data in (small if index is None else small | {INDEX: index}).items():
            (folder / name).parent.mkdir(exist_ok=True)
            _write_at(folder / name, 0, data)


def _stream(
    spec: specs.Spec, rules: Iterable[tables.Rule], params: dict, keys: Iterable[str], copies: Mapping[str, str]
) -> Iterator[tuple[str, np.ndarray]]:
    """rules.stream of the wanted tensors, with those that are copies of others."""
    wanted = set(keys)
    originals = {of for key, of in copies.items() if key in wanted}
    for key, tensor in tables.stream(spec, rules, params, wanted | originals):
        for name in (key, *(k for k, of in copies.items() if of == key)):
            if name in wanted:
                yield name, tensor
        del tensor  # before the next


def _formats(made: tables.Plan, params: dict) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """The number format and shape of every tensor that parameters become."""
    flat, out = tree.flatten(params), {}
    for path, pieces in made.pieces.items():
        dtype = np.dtype(flat[path].dtype) if path in flat else np.dtype(np.float32)  # `stream` refuses the latter
        if dtype not in FORMATS.values():
            raise InputError(
                f"The parameter {path} is {dtype}, which safetensors does not have; give it another format."
            )
        out |= {piece.key: (dtype, made.tensors[piece.key]) for piece in pieces}
    return out


def _same(header: Header, formats: Mapping[str, tuple]) -> bool:
    return all(formats.get(key) == (entry.dtype, entry.shape) for key, entry in header.tensors.items())


def _write_at(path: Path, start: int, data: bytes | np.ndarray) -> None:
    # NumPy's 8- and 16-bit floats of ml_dtypes have no buffers of their own.
    flat = data if isinstance(data, bytes) else np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    with open(path, "r+b" if path.exists() else "xb") as file:
        file.seek(start)
        file.write(flat)


def split(sizes: Mapping[str, int], shard_bytes: int) -> dict[str, list[str]]:
    """Which tensors go into which file, in their order, under the names that transformers gives files."""
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for key, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(key)
        room -= size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _with_format(origin: Origin, formats: Mapping[str, tuple]) -> bytes:
    """config.json with the number format that the parameters have now: transformers reads them in that."""
    kinds = {
        dtype for key, (dtype, _) in formats.items() if key not in origin.kept and jnp.issubdtype(dtype, jnp.floating)
    }
    name = str(*kinds) if len(kinds) == 1 else ""

    def changed(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {
            k: name if k in ("dtype", "torch_dtype") and isinstance(v, str) and v in _FLOATS else changed(v)
            for k, v in value.items()
        }

    if name not in _FLOATS or (new := changed(origin.raw)) == origin.raw:
        return origin.config
    return (json.dumps(new, indent=2, sort_keys=True) + "\n").encode()


def _index(
    origin: Origin, homes: Mapping[str, list[str]], sizes: Mapping[str, int], formats: Mapping[str, tuple]
) -> bytes | None:
    if len(homes) == 1 and origin.index is None:
        return None
    said = json.loads(origin.index) if origin.index else {"metadata": {"total_parameters": 0}}
    metadata = said.get("metadata")
    metadata = dict(metadata) if isinstance(metadata, dict) else {}
    if not origin.index:
        metadata["total_parameters"] = sum(math.prod(shape) for _, shape in formats.values())
    metadata["total_size"] = sum(sizes.values())
    content = said | {"metadata": metadata, "weight_map": {key: name for name, keys in homes.items() for key in keys}}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
