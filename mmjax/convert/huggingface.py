"""Hugging Face directories of weights, in and out: `load` gives a module with its parameters, `save` the files again.

    model = huggingface.load("path/to/siglip", mesh=mesh)     # sharded while it is read
    y = model.of.apply(model.params, x, model.cfg)
    huggingface.save("path/to/new", dataclasses.replace(model, params=trained))

config.json and safetensors are read, the small files beside them are carried along (`convert.side`), and nothing else:
no pickle, and none of the code that `auto_map` names. What was loaded and not changed is saved as the same bytes, file
by file.
"""

import difflib
import functools
import hashlib
import importlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.convert import header, lazily, side
from mmjax.convert import rules as tables
from mmjax.convert.files import CONFIG, INDEX, SINGLE, Directory, new_directory
from mmjax.convert.found import Found
from mmjax.convert.header import FORMATS, Header
from mmjax.core import spec as specs
from mmjax.core import tree
from mmjax.core.errors import InputError
from mmjax.core.files import PathLike, require_space
from mmjax.core.sharding import Rules
from mmjax.core.strict_json import shown

# The model_type in config.json → the module in mmjax.convert that has `read(raw, keys) -> Found`.
FAMILIES: dict[str, str] = {
    "vit": "vit",
    "deit": "vit",
    "dinov2": "vit",
    "dinov2_with_registers": "vit",
    "clip": "clip",
    "clip_vision_model": "clip",
    "clip_text_model": "clip",
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
    "siglip_text_model": "siglip",
    "siglip2": "siglip",
    "siglip2_vision_model": "siglip",
    "siglip2_text_model": "siglip",
    "pixtral": "pixtral",
    "qwen2_vl_vision": "qwen_vision",
    "qwen2_5_vl_vision": "qwen_vision",
    "qwen3_vl_vision": "qwen_vision",
    "qwen3_vl_moe_vision": "qwen_vision",
    "internvl_vision": "internvl",
    "swin": "swin",
    "pvt": "pvt",
    "pvt_v2": "pvt",
    "perceiver": "perceiver",
    "blip_2_qformer": "qformer",
    "instructblip_qformer": "qformer",
    "llama": "decoder",
    "mistral": "decoder",
    "qwen2": "decoder",
    "qwen3": "decoder",
    "gemma": "decoder",
    "gemma2": "decoder",
    "gemma3_text": "decoder",
    "llava": "llava",
    "llava_next": "llava",
    "llava_onevision": "llava",
    "qwen2_vl": "qwen_vl",
    "qwen2_5_vl": "qwen_vl",
    "qwen3_vl": "qwen_vl",
}
# Tensors that are no parameters (positions 0, 1, 2 …) are kept to be written again: so large each, and all together.
# Those that are somebody's, but not this model's (`Found.rest`), are kept however large.
MAX_KEPT, MAX_KEPT_ALL = 1 << 20, 64 << 20
# Everything that a table makes of a config is at least as long as its layers.
MAX_LAYERS = 10_000
SHARD_BYTES = 5_000_000_000  # of a file of a model that came from none
_FLOATS = {"float16", "bfloat16", "float32", "float64"}


@dataclass(frozen=True)
class Origin:
    """What a directory holds besides parameters: enough to write it again.

    config: the bytes of config.json. raw: what they say. found: what the family's reader made of it. headers, index:
    the layout of the files; none where the model came from no file. kept: small tensors that are no parameters,
    and parameters that the model does not compute with (`found.rest`). lost: the names of the large tensors that are
    no parameters, which are not written again. files: the small files beside the weights.
    """

    config: bytes
    raw: Mapping[str, Any]
    found: Found
    headers: Mapping[str, Header] = field(default_factory=dict)
    index: bytes | None = None
    kept: Mapping[str, Any] = field(default_factory=dict)
    lost: tuple[str, ...] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, config: dict) -> "Origin":
        """For parameters that came from no directory: the config.json that `save` shall write.

        Raises:
          InputError: the family is unknown, or the config is not one of its.
        """
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        raw = json.loads(text)
        return cls(text.encode(), raw, understand(raw, frozenset(), "The config"))


@dataclass(frozen=True)
class Model:
    """A module (`of.spec`, `of.apply`), its Config, its parameters, and where they came from."""

    of: ModuleType
    cfg: Any
    params: dict
    origin: Origin | None = None


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


def understand(raw: Mapping[str, Any], keys: frozenset[str], where: str) -> Found:
    """What the family that config.json names makes of it.

    Args:
      raw: what it says.
      keys: the names of the tensors beside it.
      where: names it in errors.

    Raises:
      InputError: the family is unknown, or the config is not one of its.
    """
    name = raw.get("model_type")
    if not isinstance(name, str):
        raise InputError(f"{where} has no model_type; it must name one of {', '.join(FAMILIES)}")
    if name not in FAMILIES:
        near = difflib.get_close_matches(name[:100], FAMILIES, 1, 0.6)
        hint = f"did you mean {near[0]}? M" if near else "m"
        code = "; the code that its auto_map names is never run" if "auto_map" in raw else ""
        known = f"mjax.convert knows {', '.join(FAMILIES)}{code}"
        raise InputError(f"{where} has the model_type {shown(name)}: {hint}{known}")
    _refuse_depths(raw, where)
    family = importlib.import_module(f"mmjax.convert.{FAMILIES[name]}")
    try:
        found = family.read(dict(raw), keys)
        shapes = [n for p in tree.flatten(found.of.spec(found.cfg)).values() for n in p.shape]
        if any(type(n) is not int or n < 0 for n in shapes):
            raise ValueError("a parameter has a size that is none")
        return found
    except InputError:
        raise
    except Exception as error:  # a stranger's values in arithmetic and dataclasses: anything may come of it
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(
            f"{where} cannot be understood as that of a {name} ({why}); compare it with the published one"
        ) from error


def _refuse_depths(raw: Mapping[str, Any], where: str) -> None:
    for key, value in raw.items():
        if isinstance(value, dict):
            _refuse_depths(value, where)
        elif re.search("layers|depth|blocks|stages", key):
            numbers = value if isinstance(value, list) else [value]
            if any(isinstance(n, int | float) and n > MAX_LAYERS for n in numbers):
                raise InputError(f"{where} has {shown(key)} {shown(value)}, where {MAX_LAYERS:,} are allowed")


def _refuse_layers(spec: specs.Spec, found: Found, tensors: int, where: str) -> None:
    """Raises InputError where a config claims more layers than there are tensors: before the table names them all."""
    leaves = tree.flatten(spec)
    for rule in found.rules:
        if "{}" in rule.theirs and rule.ours in leaves and leaves[rule.ours].shape[0] > tensors:
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
    origin = model.origin
    if origin is None:
        raise InputError(
            "This model came from no directory; give it origin=Origin.of(config), with a config.json's dict."
        )
    if (origin.found.of, origin.found.cfg) != (model.of, model.cfg):
        raise InputError(
            "The config of this model is not that of its origin; give it origin=Origin.of(config) with the new one."
        )
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
