"""A name for what a value says: the same in every process, and another as soon as any field of it is another."""

import dataclasses
import enum
import hashlib
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import numpy as np

from mmjax.core.errors import InputError


def fingerprint(*values: Any) -> str:
    """64 hexadecimal digits (SHA-256) of configs and plain values.

    Dataclasses count by their class and all of their fields, floats bit by bit, arrays by dtype, shape and content.
    Neither Python's `hash`, which changes from run to run, nor the address of an object is looked at.

    Raises:
      InputError: a value is none of these, so that nothing can be said of what it holds.
    """
    digest = hashlib.sha256()
    for part in _parts(values):
        digest.update(len(part).to_bytes(8, "little"))  # so that no two lists of parts read the same
        digest.update(part)
    return digest.hexdigest()


def _parts(value: Any) -> Iterator[bytes | memoryview]:
    match value:
        case None | bool() | int() | str() if not isinstance(value, enum.Enum):
            yield f"{type(value).__name__} {value}".encode()
        case float():
            yield f"float {value.hex()}".encode()
        case bytes():
            yield b"bytes"
            yield value
        case tuple() | list():
            yield f"list {len(value)}".encode()
            for item in value:
                yield from _parts(item)
        case dict():
            yield f"dict {len(value)}".encode()
            for key in sorted(value):
                yield from _parts(key)
                yield from _parts(value[key])
        case enum.Enum():
            yield f"enum {_name(type(value))} {value.name}".encode()
        case PurePath():
            yield f"path {value}".encode()
        case np.dtype():
            yield f"dtype {value.name}".encode()
        case np.ndarray() | np.generic() if value.dtype != object:
            yield f"array {value.dtype.name} {value.shape}".encode()
            yield np.ascontiguousarray(value).tobytes()
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = dataclasses.fields(value)
            yield f"{_name(type(value))} {len(fields)}".encode()
            for field in fields:
                yield field.name.encode()
                yield from _parts(getattr(value, field.name))
        case _:
            raise InputError(
                f"a {_name(type(value))} has no fingerprint, because what it holds is unknown; make it a dataclass"
            )


def _name(of: type) -> str:
    return f"{of.__module__}.{of.__qualname__}"
