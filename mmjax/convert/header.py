"""The header of a safetensors file, believed only after it accounts for every byte of the file.

    8 bytes    length of the header, little-endian
    header     JSON: {name: {"dtype": "BF16", "shape": [2, 3], "data_offsets": [start, stop]}, "__metadata__": {…}}
    data       the tensors, where start and stop count from here

https://github.com/huggingface/safetensors, "Format". Nothing here runs code, and nothing takes memory that the file's
own size does not justify.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from mmjax.core import strict_json
from mmjax.core.errors import InputError
from mmjax.core.strict_json import shown

MAX_HEADER = 16 << 20  # the headers of published shards have less than 1 MiB
MAX_NAME = 512
MAX_AXES = 32
FORMATS = {
    "BOOL": np.dtype(bool),
    **{f"{kind.upper()}{8 * n}": np.dtype(f"<{kind}{n}") for kind in "iu" for n in (1, 2, 4, 8)},
    **{f"F{8 * n}": np.dtype(f"<f{n}") for n in (2, 4, 8)},
    "BF16": np.dtype(jnp.bfloat16),
    "C64": np.dtype("<c8"),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "F8_E4M3FNUZ": np.dtype(jnp.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(jnp.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(jnp.float8_e8m0fnu),
}
# In the order in which the library writes tensors: the widest first, so that each lies at a multiple of its width.
_WRITTEN = "U64 I64 F64 C64 F32 U32 I32 BF16 F16 U16 I16 F8_E8M0 F8_E4M3 F8_E4M3FNUZ F8_E5M2 F8_E5M2FNUZ I8 U8 BOOL"
_NAMES = {FORMATS[name]: name for name in _WRITTEN.split()}
# How files begin that are not safetensors but are sometimes called so.
_OTHERS = {
    b"PK\x03\x04": "a zip archive, as torch.save writes it",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"\x89HDF": "an HDF5 file",
    b"version https://git-lfs": "a pointer of Git LFS, without the file it points to",
    b"<!DOCTYPE": "a web page",
}


@dataclass(frozen=True)
class Entry:
    """One tensor: its number format and shape, and where its bytes are, counted from the start of the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """raw: the file's first bytes, up to the data. size: of the whole file. tensors: in the order of the data."""

    raw: bytes
    size: int
    metadata: Mapping[str, str]
    tensors: Mapping[str, Entry]


def length(first: bytes, size: int, where: str) -> int:
    """The length of the header that a file of `size` bytes starts with, from its first 32 bytes or fewer.

    Raises:
      InputError: the file is too short for it, or it is longer than `MAX_HEADER`.
    """
    if size < 10:
        raise InputError(f"{where} has {size} bytes, too few for a safetensors file; download it again")
    out = int.from_bytes(first[:8], "little")
    if 2 <= out <= min(size - 8, MAX_HEADER):
        return out  # whatever it looks like: a header of 640 bytes begins as a pickle does
    for begin, what in _OTHERS.items():
        if first.startswith(begin):
            raise InputError(f"{where} is {what}, and not a safetensors file; convert it to safetensors first")
    if out > size - 8:
        raise InputError(
            f"{where} is not a whole safetensors file: its header has {out:,} bytes by its own account, and the file "
            f"{size:,} in all; download it again"
        )
    raise InputError(f"{where} has a header of {out:,} bytes, where 2 to {MAX_HEADER:,} are allowed; download it again")


def parse(raw: bytes, size: int, where: str) -> Header:
    """The header of a file of `size` bytes, from its first bytes, up to the data.

    Raises:
      InputError: it is not strict JSON, names a number format that is not in `FORMATS`, or its tensors do not cover
        the data exactly: a hole, an overlap, bytes that the shape does not account for, a part outside the file.
    """
    if raw[8:9] != b"{":
        raise InputError(f"{where} is not a safetensors file: its header is no JSON object; download it again")
    content = strict_json.loads(raw[8:], f"The header of {where}", max_bytes=MAX_HEADER, max_depth=4)
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError(f"The __metadata__ in {where} is not an object of texts; repair the file")
    tensors = {}
    for name, value in content.items():
        try:
            tensors[name] = _entry(name, value, len(raw))
        except _Wrong as error:
            raise InputError(
                f"The tensor {shown(name)} in {where} {error}; download the file again, or use another one"
            ) from None
    # Where two begin at the same place, an empty one comes before the one that has bytes.
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)))
    at = len(raw)
    for name, entry in tensors.items():
        if entry.start != at:
            what = "overlaps the one before it" if entry.start < at else f"leaves {entry.start - at:,} bytes unnamed"
            raise InputError(f"The tensor {shown(name)} in {where} {what}; download the file again")
        at = entry.stop
    if at != size:
        raise InputError(
            f"The tensors in {where} end at byte {at:,} and the file at byte {size:,}; download the file again"
        )
    return Header(raw, size, metadata, tensors)


def build(formats: Mapping[str, tuple[np.dtype, tuple[int, ...]]], metadata: Mapping[str, str], where: str) -> Header:
    """The header of a file of these tensors, as the library writes it.

    Raises:
      InputError: safetensors has no such number format, or what `parse` refuses.
    """
    for name, (dtype, _) in formats.items():
        if dtype not in _NAMES:
            raise InputError(f"{where} cannot be written: {name} is {dtype}, which safetensors does not have")
    widest = list(_NAMES)
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    stop = 0
    for name in sorted(formats, key=lambda name: (widest.index(formats[name][0]), name)):
        dtype, shape = formats[name]
        start, stop = stop, stop + math.prod(shape) * dtype.itemsize
        content[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    raw = len(text).to_bytes(8, "little") + text
    return parse(raw, len(raw) + stop, where)


class _Wrong(ValueError):
    """What is wrong with a tensor, without its name."""


def _entry(name: str, value: Any, begin: int) -> Entry:
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise _Wrong(f"has a name that is empty, longer than {MAX_NAME} characters, or cannot be printed")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise _Wrong("is not described by dtype, shape and data_offsets alone")
    dtype = FORMATS.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise _Wrong(f"has the number format {shown(value['dtype'])}, which is none of {', '.join(FORMATS)}")
    shape, offsets = _sizes(value, "shape"), _sizes(value, "data_offsets")
    if len(shape) > MAX_AXES:
        raise _Wrong(f"has {len(shape)} axes, where {MAX_AXES} are allowed")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _Wrong(f"has the data_offsets {shown(offsets)}, which are no start and stop")
    size = offsets[1] - offsets[0]
    # Sizes beside a 0 are checked too: NumPy cannot hold [2**62, 2**62, 0].
    if math.prod(shape) * dtype.itemsize != size or math.prod(n for n in shape if n) * dtype.itemsize >= 2**63:
        raise _Wrong(f"of shape {shown(shape)} and format {value['dtype']} does not fit its {size:,} bytes")
    return Entry(dtype, tuple(shape), begin + offsets[0], begin + offsets[1])


def _sizes(value: dict[str, Any], key: str) -> list[int]:
    out = value[key]
    if not isinstance(out, list) or any(type(n) is not int or not 0 <= n < 2**63 for n in out):
        raise _Wrong(f"has the {key} {shown(out)}, which is no list of sizes")
    return out
