"""mmjax's own record: a whole document in one piece of bytes, made to be kept in ArrayRecord files.

    8 bytes   "mmjaxdoc"
    4 bytes   version, 1 (little endian, as all numbers here)
    4 bytes   length of the header
    header    JSON: {"id", "spans": [{"type": "text", "text", "role", "train", "turn"}, {"type": "image", "height",
              "width", "role", "turn", "bytes", "form"}, …]}
    media     one after the other, in the order of the spans; "bytes" says how long each is

An image's form is "file" (JPEG, PNG, WebP or GIF bytes) or "pixels" (u8[height, width, 3]). Videos ("frames", "height",
"width", "fps") are u8[frames, height, width, 3] and sounds ("samples", "rate") f32[samples], both as they are.
"""

import functools
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np

from mmjax.core import strict_json
from mmjax.core.errors import InputError
from mmjax.core.strict_json import shown
from mmjax.data.formats import paths
from mmjax.data.formats.draft import Draft, Options, Picture
from mmjax.data.formats.record import Record
from mmjax.data.formats.shards import read_all
from mmjax.sequence.document import Audio, Document, Encoded, Image, Role, Span, Text, Video

MAGIC = b"mmjaxdoc"
VERSION = 1
HEAD = struct.Struct("<8sII")
LONGEST_HEADER = 64 * 2**20
Array = np.ndarray


def encode(document: Document) -> bytes:
    """The document with all its media, which are read now. The same document gives the same bytes.

    Raises:
      InputError: a medium cannot be read or is not of the size that is declared; a text has half a surrogate pair.
    """
    spans, media = [], []
    for n, span in enumerate(document.spans):
        where = f"Document {document.id!r}, span {n}"
        told: dict[str, Any] = {"type": type(span).__name__.lower(), "role": span.role, "turn": span.turn}
        if isinstance(span, Text):
            told |= {"text": span.text, "train": span.train}
        else:
            names = [name for name in ("height", "width", "frames", "fps", "samples", "rate") if hasattr(span, name)]
            told |= {name: getattr(span, name) for name in names}
            form, body = _media(span, where)
            told |= {"bytes": len(body), **({"form": form} if form else {})}
            media.append(body)
        spans.append(told)
    try:
        told = {"id": document.id, "spans": spans}
        header = json.dumps(told, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise InputError(f"Document {document.id!r} cannot be written ({error}); repair its text or numbers") from error
    if len(header) > LONGEST_HEADER:
        raise InputError(
            f"Document {document.id!r} has {len(header):,} bytes of text, over {LONGEST_HEADER:,}; split it"
        )
    return b"".join([HEAD.pack(MAGIC, VERSION, len(header)), header, *media])


def _media(span: Image | Video | Audio, where: str) -> tuple[str, bytes]:
    """A medium's form (of an image only) and its bytes."""
    source = span.source.read() if isinstance(span, Image) and isinstance(span.source, Encoded) else span.source
    if isinstance(source, Path):
        source = _file(source)
    if isinstance(source, bytes):
        return "file", source
    array = source if isinstance(source, np.ndarray) else source()
    shape, dtype = _declared(span)
    if array.shape != shape or array.dtype != dtype:
        raise InputError(f"{where}: declared as {dtype}{list(shape)} but is {array.dtype}{list(array.shape)}")
    # Explicitly little endian, for the bytes are read on other machines.
    return "pixels" if isinstance(span, Image) else "", array.astype(array.dtype.newbyteorder("<")).tobytes()


def _declared(span: Image | Video | Audio) -> tuple[tuple[int, ...], np.dtype]:
    if isinstance(span, Audio):
        return (span.samples,), np.dtype(np.float32)
    frames = (span.frames,) if isinstance(span, Video) else ()
    return (*frames, span.height, span.width, 3), np.dtype(np.uint8)


def _file(path: Path) -> bytes:
    with open(paths.open_regular(Path(path).resolve()), "rb") as file:
        return read_all(file.fileno(), 0, file.seek(0, 2), str(path))


def decode(record: Record, options: Options) -> Draft:
    """The document of a record whose fields are {"data": bytes}; media are read again when they are wanted.

    Raises:
      InputError: the record is not whole, of a later version, or says what no document can say.
    """
    data = record.fields.get("data")
    if not isinstance(data, bytes) or len(data) < HEAD.size or not data.startswith(MAGIC):
        raise InputError("the record is not one of mmjax's; make the file with `python -m mmjax.data convert`")
    _, version, length = HEAD.unpack(data[: HEAD.size])
    if version != VERSION:
        raise InputError(f"the record is of version {version}, and this mmjax reads {VERSION}; use a newer one")
    if length > min(LONGEST_HEADER, len(data) - HEAD.size):
        raise InputError(f"the record's header of {length:,} bytes is not all there; make the file again")
    limits = options.limits
    header = strict_json.loads(
        data[HEAD.size : HEAD.size + length],
        "the record's header",
        max_bytes=LONGEST_HEADER,
        max_depth=limits.depth,
        max_items=limits.entries,
    )
    at = HEAD.size + length
    try:
        spans: list[Span | Picture] = []
        for told in header["spans"]:
            size = told["bytes"] if told["type"] != "text" else 0
            if not _count(size) or at + size > len(data):
                raise ValueError(f"a medium of {size} bytes at {at} of {len(data)}")
            spans.append(_span(told, record, at, size))
            at += size
        if at != len(data) or not isinstance(header["id"], str):
            raise ValueError(f"{len(data) - at} bytes that nothing speaks of, or no id")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the record's header is wrong ({shown(str(error))}); make the file again") from error
    return Draft(header["id"], tuple(spans), whole=True)


def _span(told: dict, record: Record, at: int, size: int) -> Span | Picture:
    """One span; KeyError, TypeError or ValueError for what is wrong."""
    kind, role, turn = told["type"], told["role"], told["turn"]
    if role not in get_args(Role) or not isinstance(turn, bool):
        raise ValueError(f"role {role!r}, turn {turn!r}")
    if kind == "text":
        if not isinstance(told["text"], str) or not isinstance(told["train"], bool):
            raise ValueError("a text that is none")
        return Text(told["text"], role, told["train"], turn)
    source = record.later("data", start=at, stop=at + size)
    names = {"image": ("height", "width"), "video": ("frames", "height", "width"), "audio": ("samples",)}[kind]
    sizes = tuple(told[name] for name in names)
    if not all(_count(n) and n > 0 for n in sizes):
        raise ValueError(f"{kind} of {sizes}")
    if kind == "image" and told["form"] == "file":
        return Picture(source, role, turn, size=sizes)
    if kind == "audio":
        if size != 4 * sizes[0] or not _count(told["rate"]) or told["rate"] < 1:
            raise ValueError(f"sound of {size} bytes for {sizes[0]} samples, rate {told['rate']!r}")
        return Audio(sizes[0], told["rate"], _later(source, sizes, "<f4"), role, turn)
    if size != 3 * math.prod(sizes) or (kind == "image" and told["form"] != "pixels"):
        raise ValueError(f"{kind} of {size} bytes for {sizes}")
    if kind == "image":
        return Image(*sizes, _later(source, (*sizes, 3), "u1"), role, turn)
    if not isinstance(told["fps"], int | float) or not told["fps"] > 0:
        raise ValueError(f"video of {told['fps']!r} frames a second")
    return Video(*sizes, float(told["fps"]), _later(source, (*sizes, 3), "u1"), role, turn)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40


def _later(source: Encoded, shape: tuple[int, ...], dtype: str) -> Callable[[], Array]:
    return functools.partial(_array, source, shape, dtype)


def _array(source: Encoded, shape: tuple[int, ...], dtype: str) -> Array:
    # A copy in the machine's own byte order, which may be written to.
    return np.frombuffer(source.read(), dtype).reshape(shape).astype(np.dtype(dtype).newbyteorder("="))
