"""The index of a dataset: where each document lies and how large its pictures are, found once and kept in a file.

8 bytes   "mmjaxidx"
8 bytes   length of the header (little endian, as all numbers here)
header    JSON: what was indexed ("key"), and what was left out
arrays    those of `Index` in order, as the header counts them
4 bytes   CRC-32 of all before
"""

import dataclasses
import json
import struct
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.core import strict_json
from mmjax.core.errors import InputError
from mmjax.core.files import write_atomic
from mmjax.data.formats import draft, schemas, shards
from mmjax.data.formats.draft import Draft, Options, Picture
from mmjax.data.formats.record import Address, Bad, Container, Record
from mmjax.sequence.document import Audio, Image, Text, Video

MAGIC = b"mmjaxidx"
HEAD = struct.Struct("<8sQ")
VERSION = 2  # of this format, and of what the readers make of records
LONGEST_HEADER = 256 * 2**20


@dataclass(frozen=True)
class Index:
    """What is known of n documents with m pictures, those that are left out among them.

    schema: how records were read. left_out: what could not be read.
    address: i64[n, 3]. number: i64[n], of the record among all, those left out too. repeat: i32[n], how many documents
    before it have its id. characters: i64[n], of text. crc: u32[n], of what it says. first: i64[n + 1], where its
    pictures begin. sizes: i32[m, 2], height and width, (0, 0) for a picture that is left out. marks: u32[m], of what is
    in the pictures' files (image.Found), read when the index was made and not since.
    """

    schema: str
    left_out: tuple[Bad, ...]
    address: np.ndarray
    number: np.ndarray
    repeat: np.ndarray
    characters: np.ndarray
    crc: np.ndarray
    first: np.ndarray
    sizes: np.ndarray
    marks: np.ndarray

    def __len__(self) -> int:
        return len(self.number)


ARRAYS = {
    "address": ("<i8", 3),
    "number": ("<i8", 0),
    "repeat": ("<i4", 0),
    "characters": ("<i8", 0),
    "crc": ("<u4", 0),
    "first": ("<i8", 0),
    "sizes": ("<i4", 2),
    "marks": ("<u4", 0),
}


def refuse(left_out: list[Bad] | tuple[Bad, ...], errors: int) -> None:
    """InputError if more was left out than `errors` allows; names the last that was found."""
    if len(left_out) <= errors:
        return
    bad = left_out[errors]
    if errors:
        raise InputError(f"{bad}. With it {errors + 1} places cannot be read, and errors is {errors}.")
    raise InputError(f"{bad}. Give errors=1 or more to leave out what cannot be read.")


def base_id(made: Draft, name: str, number: int) -> str:
    """A document's id before it is told apart from those that have the same."""
    if made.whole and made.id:
        return made.id
    return f"{name}/{number if made.id is None else made.id}"


def unique_id(base: str, number: int, repeat: int) -> str:
    """The id itself: of documents with one id, all but the first get their record's number behind it."""
    return base + f"#{number}" * repeat


# What is declared of media: documents that differ only there must be told apart.
TOLD: dict[type, tuple[str, ...]] = {
    Picture: ("size",),
    Image: ("height", "width"),
    Video: ("frames", "height", "width", "fps"),
    Audio: ("samples", "rate"),
}


def crc(made: Draft) -> int:
    """CRC-32 of what a document says, and of where its media stand and what is declared of them."""
    out = 0
    for span in made.spans:
        told = span.train if isinstance(span, Text) else [getattr(span, name) for name in TOLD[type(span)]]
        out = zlib.crc32(f"{type(span).__name__} {span.role} {span.turn} {told} ".encode(), out)
        if isinstance(span, Text):
            out = zlib.crc32(span.text.encode(errors="surrogatepass"), out)
    return out


class _Pass:
    """One pass over all records."""

    def __init__(self, container: Container, schema: str | None, options: Options, name: str, errors: int):
        self.container, self.schema, self.options, self.name, self.errors = container, schema, options, name, errors
        self.left_out: list[Bad] = []
        self.seen: set[int] = set()  # ids, as 64-bit hashes: where two meet by chance, one gets a number behind it
        # Not lists: ten million documents would take gigabytes.
        self.columns = {name: array("i" if kind == "<i4" else "q") for name, (kind, _) in ARRAYS.items()}
        self.columns["first"].append(0)

    def run(self) -> Index:
        number = 0
        for shard in range(len(self.container.shards)):
            for found in self._scan(shard):
                if not isinstance(found, Bad):
                    found = self._record(found, number)
                number += 1
                if found:
                    self.left_out.append(found)
                    refuse(self.left_out, self.errors)
        arrays = {}
        for name, (kind, width) in ARRAYS.items():
            column = self.columns[name]
            arrays[name] = np.frombuffer(column, column.typecode).astype(kind).reshape((-1, width) if width else -1)
        return Index(self.schema or "", tuple(self.left_out), **arrays)

    def _scan(self, shard: int) -> Iterator[Address | Bad]:
        try:
            yield from self.container.scan(shard)
        except InputError as error:
            yield Bad(self.container.shards[shard].told, str(error))

    def _record(self, address: Address, number: int) -> Bad | None:
        """Takes a record in; if that fails, says why."""
        try:
            record = self.container.read(address)
            self.schema = self.schema or schemas.guess(record)
            made = read(record, self.schema, self.options)
            seen = [draft.look(picture, self.options.limits) for picture in made.pictures]
            draft.finish(made, "?", [picture.size for picture in seen])
        except InputError as error:
            return Bad(self.container.place(address), str(error))
        base, repeat = base_id(made, self.name, number), 0
        while (hashed := _hash(unique_id(base, number, repeat))) in self.seen:
            repeat += 1
        self.seen.add(hashed)
        characters = sum(len(span.text) for span in made.spans if isinstance(span, Text))
        self.columns["address"].extend(address)
        for name, value in [("number", number), ("repeat", repeat), ("characters", characters), ("crc", crc(made))]:
            self.columns[name].append(value)
        self.columns["sizes"].extend(side for picture in seen for side in picture.size)
        self.columns["marks"].extend(picture.mark for picture in seen)
        self.columns["first"].append(len(self.columns["sizes"]) // 2)
        return None


def _hash(id: str) -> int:
    return int.from_bytes(blake2b(id.encode(), digest_size=8).digest(), "little")


def read(record: Record, schema: str, options: Options) -> Draft:
    """The record as a draft of a document."""
    return draft.check(schemas.find(schema)(record, options), options.limits)


def make(container: Container, schema: str | None, options: Options, name: str, errors: int) -> Index:
    """Reads every record once, and the header of every picture.

    Args:
      schema: None: what the first record that can be told speaks for.
      errors: how many places may be left out.

    Raises:
      InputError: more places cannot be read.
    """
    return _Pass(container, schema, options, name, errors).run()


def key(container: Container, options: Options, folder: Path, name: str) -> str:
    """What an index is of: files and options. The index of anything else is out of date."""
    plain = dataclasses.asdict(options) | {"root": "", "images": sorted(options.images.items())}
    # Relative, so that a dataset may be moved with its index.
    root = str(options.root.relative_to(folder)) if options.root.is_relative_to(folder) else str(options.root)
    files = [(s.name, s.size, s.mtime, s.checksum()) for s in container.shards]
    told = json.dumps([VERSION, name, plain, root, files], sort_keys=True)
    return blake2b(told.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def write(path: Path, index: Index, key: str) -> None:
    """Writes the file, whole or not at all."""
    header: dict[str, Any] = {"key": key, "schema": index.schema, "documents": len(index), "pictures": len(index.sizes)}
    header["left_out"] = [[bad.place, bad.reason] for bad in index.left_out]
    text = json.dumps(header).encode()
    parts = [HEAD.pack(MAGIC, len(text)), text]
    parts += [getattr(index, name).astype(kind).tobytes() for name, (kind, _) in ARRAYS.items()]
    data = b"".join(parts)
    write_atomic(path, data + zlib.crc32(data).to_bytes(4, "little"))


def most_bytes(dataset: int) -> int:
    """How many bytes the index of files of so many bytes takes at most: what is planted beside them is not read whole.

    A document or a picture takes a byte of its file, and here less than 64. (A Parquet file could pack its rows closer;
    its index would then be made each time.)
    """
    return LONGEST_HEADER + 64 * (dataset + 1)


def load(data: bytes, key: str, where: str) -> Index | str:
    """The index, or in a few words why it is of no use. It came with the dataset: nothing is believed unchecked."""
    if len(data) < HEAD.size + 4 or not data.startswith(MAGIC):
        return "is not an index"
    if zlib.crc32(data[:-4]).to_bytes(4, "little") != data[-4:]:
        return "is damaged"
    length = HEAD.unpack(data[: HEAD.size])[1]
    try:
        text = data[HEAD.size : HEAD.size + length]
        header = strict_json.loads(text, where, max_bytes=LONGEST_HEADER, max_depth=4, max_items=2**24)
        if header["key"] != key:
            return "is out of date: files or options are others now"
        n, m = int(header["documents"]), int(header["pictures"])
        rows = {"first": n + 1, "sizes": m, "marks": m}
        at, arrays = HEAD.size + length, {}
        for name, (kind, width) in ARRAYS.items():
            count = rows.get(name, n) * (width or 1)
            arrays[name] = np.frombuffer(data, kind, count, at).reshape((-1, width) if width else -1)
            at += arrays[name].nbytes
        schemas.find(header["schema"] or "mmjax")
        left_out = tuple(Bad(shards.told(place), shards.told(reason)) for place, reason in header["left_out"])
        out = Index(str(header["schema"]), left_out, **arrays)
    except (AttributeError, InputError, KeyError, TypeError, ValueError):
        return "is damaged"
    steps = np.diff(out.first)
    whole = at == len(data) - 4 and out.first[0] == 0 and out.first[-1] == m and (steps >= 0).all()
    sound = (
        whole and (out.address >= 0).all() and (out.sizes >= 0).all() and ((out.repeat >= 0) & (out.repeat < 9)).all()
    )
    return out if sound else "is damaged"
