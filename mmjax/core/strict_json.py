"""JSON from strangers: bounded in size, depth and count before it takes memory, and nothing readers disagree on."""

import json
import math
import re
from collections import Counter
from typing import Any, NoReturn

from mmjax.core.errors import InputError

DIGITS = 40  # of a whole number; transformers writes 10**30 where a tokenizer takes texts of any length
HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # of a surrogate pair, escaped


class _Wrong(ValueError):
    """What is wrong, without where."""


def loads(data: bytes, where: str, *, max_bytes: int, max_depth: int = 64, max_items: int = 1_000_000) -> Any:
    """What the JSON text (RFC 8259) says.

    Args:
      data: UTF-8, without a byte order mark.
      where: names the file in errors.
      max_bytes: of the text.
      max_depth: lists and objects within each other.
      max_items: lists, objects and their entries together, which bounds the memory that the result takes.

    Raises:
      InputError: the text is not JSON, larger than a limit, or holds what readers understand differently: a key twice
        in one object, NaN or Infinity, a number of more digits than a double has or than a whole number needs, half a
        surrogate.
    """
    try:
        if len(data) > max_bytes:
            raise _Wrong(f"has {len(data):,} bytes, where {max_bytes:,} are allowed")
        brackets = data.count(b"[") + data.count(b"{")
        if brackets + data.count(b",") > max_items:  # those in strings count too: a bound, not a number
            raise _Wrong(f"has more than {max_items:,} entries")
        out = json.loads(
            data.decode(), object_pairs_hook=_unique, parse_int=_integer, parse_float=_real, parse_constant=_constant
        )
        # Most texts can be neither too deep nor hold half a pair, which UTF-8 has no bytes for.
        if brackets > max_depth or HALF.search(data):
            _walk(out, max_depth)
        return out
    except _Wrong as error:
        what = str(error)
    except RecursionError:
        what = f"is nested more than {max_depth} levels deep"
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 at byte {error.start}"
    except ValueError as error:
        what = f"is not JSON ({error})"
    raise InputError(f"{where} {what}; download the file again, or have it repaired by who made it")


def _integer(text: str) -> int:
    if len(text) > DIGITS:
        raise _Wrong(f"holds a number of {len(text)} digits, where {DIGITS} are allowed")
    return int(text)


def _real(text: str) -> float:
    if len(text) > 64:
        raise _Wrong(f"holds a number of {len(text)} characters, where 64 are allowed")
    return float(text) if math.isfinite(float(text)) else _constant(text)


def _constant(text: str) -> NoReturn:
    raise _Wrong(f"holds the number {text}, which is not finite")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise _Wrong(f"has the key {shown(twice)} twice in one object")
    return out


def _walk(root: Any, max_depth: int) -> None:
    """Level by level: a stranger's text must not set the depth of our own calls."""
    level, depth = [root], 0
    while level:
        below = []
        for item in level:
            if isinstance(item, dict):
                below += item.keys()
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str) and not item.isascii() and any("\ud800" <= c <= "\udfff" for c in item):
                raise _Wrong(f"holds half a surrogate pair in {shown(item)}")
        depth += any(isinstance(item, dict | list) for item in level)
        if depth > max_depth:
            raise _Wrong(f"is nested more than {max_depth} levels deep")
        level = below


def shown(text: Any) -> str:
    """What a stranger wrote, for a sentence: quoted, escaped, and not long."""
    out = repr(text)
    return out if len(out) <= 80 else f"{out[:80]}…"
