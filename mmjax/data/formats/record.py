"""What all kinds of files share: raw records, where they lie, and how large they may be."""

import base64
import binascii
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from mmjax.core import strict_json
from mmjax.core.errors import InputError
from mmjax.data.formats.shards import Shard
from mmjax.sequence.document import Encoded
from mmjax.tokenizers import image as image_files

Address = tuple[int, int, int]  # the shard's number, and two numbers that are the container's own

_last = threading.local()  # record: what `Record.later` keeps


@dataclass(frozen=True)
class Limits:
    """What a record may take up; what is larger counts as one that cannot be read.

    record_bytes: of a record's JSON text, of a file in a tar archive, of an ArrayRecord's record. The last is known
      only when it has been decompressed: a stranger's small file may take gigabytes for as long as that lasts.
    entries: of lists and objects in a record's JSON, all together.
    depth: of those within each other.
    files: that make up one record of a tar archive.
    images: in a document.
    group_bytes: of a Parquet row group before compression, as the file declares it; two are in memory at a time.
    picture: see tokenizers.image.
    """

    record_bytes: int = 256 * 2**20
    entries: int = 1_000_000
    depth: int = 64
    files: int = 4096
    images: int = 4096
    group_bytes: int = 4 * 2**30
    picture: image_files.Limits = image_files.LIMITS

    def __post_init__(self):
        if min(self.record_bytes, self.entries, self.depth, self.files, self.images, self.group_bytes) < 1:
            raise InputError(f"{self} admits no record; give limits of at least 1")


LIMITS = Limits()


@dataclass(frozen=True)
class Bad:
    """A place that could not be read, and why."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


@dataclass(frozen=True)
class Record:
    """A raw record.

    place: for messages: shard, and byte, row or record in it.
    fields: what JSON or a row of a table says; for an ArrayRecord, {"data": its bytes}.
    files: what lies beside them in a tar archive, by what follows the first dot of its name.
    again: reads the same record again, so that a document need not keep its media in memory.
    """

    place: str
    fields: dict[str, Any]
    again: Callable[[], "Record"] = field(repr=False, compare=False)
    files: Mapping[str, Encoded] = field(default_factory=dict)

    def later(self, *keys: str | int, start: int = 0, stop: int | None = None) -> Encoded:
        """The bytes (or base64 text) found in `fields` by these keys one after the other, read when asked for.

        A thread keeps the last record that it took bytes from later: a document's media are read one after the other,
        right after the document itself, and none of them reads the whole record anew.
        """
        _last.record = self
        return Encoded(functools.partial(_part, self.again, keys, start, stop))


def _part(again: Callable[[], Record], keys: tuple[str | int, ...], start: int, stop: int | None) -> bytes:
    record: Record | None = getattr(_last, "record", None)
    if record is None or record.again is not again:
        record = _last.record = dataclasses.replace(again(), again=again)
    value: Any = record.fields
    for key in keys:
        value = value[key]
    return (decode_url(value, LIMITS.record_bytes) if isinstance(value, str) else value)[start:stop]


def decode_url(url: str, most: int) -> bytes:
    """The bytes of a base64 `data:` URL (RFC 2397).

    Raises:
      InputError: it is another kind of URL, not base64, or of more than `most` bytes.
    """
    head, comma, body = url.partition(",")
    if not head.lower().startswith("data:") or not comma or not head.lower().endswith(";base64"):
        raise InputError(f"{strict_json.shown(url)} is not a data: URL in base64; write data:image/png;base64,…")
    if len(body) * 3 // 4 > most:
        raise InputError(f"a data: URL holds {len(body) * 3 // 4:,} bytes, over the limit of {most:,}; shrink it")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"a data: URL is not valid base64 ({error}); encode it again") from None


@runtime_checkable
class Container(Protocol):
    """A kind of file that holds records. Reads from any thread, and may be pickled."""

    shards: tuple[Shard, ...]

    def scan(self, number: int) -> Iterator[Address | Bad]:
        """The records of shard `number` in order, and the places at which none can be found."""

    def place(self, address: Address) -> str:
        """Where a record lies, for messages."""

    def read(self, address: Address) -> Record:
        """One record; InputError, without the place, where it cannot be read."""


def parse(data: bytes, limits: Limits) -> dict[str, Any]:
    """A record's JSON, which is an object; InputError otherwise."""
    fields = strict_json.loads(
        data, "the record", max_bytes=limits.record_bytes, max_depth=limits.depth, max_items=limits.entries
    )
    if not isinstance(fields, dict):
        raise InputError(f"the record is {strict_json.shown(fields)} and not an object; make each record one {{…}}")
    return fields
