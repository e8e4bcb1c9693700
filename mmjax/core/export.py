"""Arrays as one safetensors file, written one after the other: only one of them is in memory at a time.

    8 bytes: the header's length | the header, JSON: name, dtype, shape, place of every array | the arrays' bytes

https://github.com/huggingface/safetensors, "Format". The library's own writer wants all arrays in memory at once.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from mmjax.core.checksum import parse
from mmjax.core.errors import InputError
from mmjax.core.files import PathLike, atomic_file, require_space

_NAMES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
    "uint16": "U16",
    "int16": "I16",
    "float16": "F16",
    "bfloat16": "BF16",
    "uint32": "U32",
    "int32": "I32",
    "float32": "F32",
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
}


def write_safetensors(
    path: PathLike, leaves: Mapping[str, str], read: Callable[[str], np.ndarray], metadata: Mapping[str, str]
) -> int:
    """Writes arrays as a safetensors file that is there whole or not at all; returns its size in bytes.

    Args:
      leaves: dtype and shape of every array by name, as text (`mmjax.core.checksum.describe`).
      read: gives the array of a name; called once for each.
      metadata: texts for the header.

    Raises:
      InputError: the file exists, safetensors has no such dtype, or the disk is full. What `read` raises, as it is.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise InputError(f"{path} exists already; choose another name, or remove it first")
    if not path.parent.is_dir():
        raise InputError(f"there is no directory {path.parent}; make it first")
    described = {name: parse(text) for name, text in leaves.items()}
    for name, (dtype, _) in described.items():
        if dtype.name not in _NAMES:
            raise InputError(f"{name!r} is {dtype.name}, which safetensors does not have; leave it out with --only")
    # The wide ones first, so that each lies at a multiple of its width.
    order = sorted(described, key=lambda name: (-described[name][0].itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        dtype, shape = described[name]
        begin, end = end, end + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": _NAMES[dtype.name], "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    require_space(path.parent, 8 + len(raw) + end, f"write {path.name}")
    with atomic_file(path) as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name in order:
            # NumPy's 8- and 16-bit floats of ml_dtypes have no buffers of their own.
            file.write(np.ascontiguousarray(read(name)).reshape(-1).view(np.uint8))
    return 8 + len(raw) + end
