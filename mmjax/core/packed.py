"""Named arrays as bytes that tell whether they are still what they were.

Magic, a line of JSON (key, names, dtypes, shapes), the arrays' bytes, and the SHA-256 of all before.
"""

import hashlib
import json
import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from mmjax.core import strict_json
from mmjax.core.errors import InputError

Arrays = dict[str, np.ndarray]

MAGIC, DIGEST, HEADER = b"mmjax arrays 1\n", 32, 4096  # HEADER: bytes that the line of JSON has at most
DTYPES = ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "float16", "bfloat16", "float32", "float64")


def pack(key: str, arrays: Mapping[str, np.ndarray]) -> bytes:
    """An entry as the bytes of its file."""
    about = {name: [x.dtype.name, list(x.shape)] for name, x in arrays.items()}
    header = json.dumps({"key": key, "arrays": about}).encode() + b"\n"
    if len(header) > HEADER:
        raise InputError(f"an entry of {len(arrays)} arrays has too long a header; keep fewer, or shorter names")
    body = b"".join([MAGIC, header, *(np.ascontiguousarray(x).tobytes() for x in arrays.values())])
    return body + hashlib.sha256(body).digest()


def unpack(key: str, data: bytes) -> Arrays:
    """The arrays of an entry's bytes, read-only.

    Raises:
      InputError: they are not what `pack` made for this key.
    """
    body = memoryview(data)[:-DIGEST]
    if len(data) < len(MAGIC) + DIGEST or hashlib.sha256(body).digest() != data[-DIGEST:]:
        raise InputError("the entry is damaged; make it again")
    stop = data.find(b"\n", len(MAGIC), len(MAGIC) + HEADER) + 1
    if data[: len(MAGIC)] != MAGIC or not stop:
        raise InputError("the entry is in another format; make it again")
    about = strict_json.loads(data[len(MAGIC) : stop], "the entry", max_bytes=HEADER)
    try:
        if about["key"] != key:
            raise InputError("the entry belongs to another key; make it again")
        return _arrays(body[stop:], about["arrays"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError("the entry does not hold what its header says; make it again") from error


def _arrays(data: memoryview, about: dict[str, list]) -> Arrays:
    found, at = {}, 0
    for name, (dtype, shape) in about.items():
        size = math.prod(shape) * jnp.dtype(DTYPES[DTYPES.index(dtype)]).itemsize
        flat = np.frombuffer(data[at : at + size], jnp.dtype(dtype))
        found[name] = np.require(flat.reshape(shape), requirements="A")
        found[name].setflags(write=False)
        at += size
    if at != len(data):
        raise ValueError(f"{at} bytes of arrays, {len(data)} in the file")
    return found
