"""ArrayRecord, Grain's own kind of file: records of bytes with random access, each checked by a hash."""

import functools
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mmjax.core.errors import InputError
from mmjax.data.formats import paths
from mmjax.data.formats.record import LIMITS, Address, Bad, Limits, Record
from mmjax.data.formats.shards import Shard, told

KEPT = 64  # open files
# One record at a time, and no threads of its own: what is fastest in random order.
OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


@dataclass(frozen=True)
class Records:
    """Addresses are (shard, record, 0). Damaged records are left out; a file whose end is torn off is lost whole.

    For the end has the list of where the records are.
    """

    shards: tuple[Shard, ...]
    limits: Limits = LIMITS
    files: "_Files" = field(default_factory=lambda: _Files(), compare=False, repr=False)

    def place(self, address: Address) -> str:
        return f"{self.shards[address[0]].told}, record {address[1]}"

    def scan(self, number: int) -> Iterator[Address | Bad]:
        shard = self.shards[number]
        try:
            count = self.files.count(shard)
        except InputError as error:
            yield Bad(shard.told, str(error))
            return
        first, why = -1, ""  # of the damaged records right before
        for record in range(count + 1):
            try:
                if record < count:
                    self.files.read(shard, record)
                why_now = ""
            except InputError as error:
                why_now = str(error)
            if why_now and first < 0:
                first, why = record, why_now
            elif not why_now:
                if first >= 0:
                    place = f"record {first}" if first == record - 1 else f"records {first} to {record - 1}"
                    yield Bad(f"{shard.told}, {place}", why)
                    first = -1
                if record < count:
                    yield number, record, 0

    def read(self, address: Address) -> Record:
        # The library tells a record's size only by decompressing it: what it takes until it is refused, it takes.
        data = self.files.read(self.shards[address[0]], address[1])
        if len(data) > self.limits.record_bytes:
            raise InputError(
                f"the record has {len(data):,} bytes, over the limit of {self.limits.record_bytes:,}; split it"
            )
        return Record(self.place(address), {"data": data}, functools.partial(self.read, address))


class _Files:
    """The readers used last. The library's have a position, so one thread reads at a time."""

    def __init__(self) -> None:
        self.readers: OrderedDict[Shard, Any] = OrderedDict()
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return _Files, ()

    def count(self, shard: Shard) -> int:
        with self.lock:
            count = self._reader(shard).num_records()
        if count > shard.size:  # a record takes a byte of the list at the end at least
            raise InputError(f"it speaks of {count:,} records in {shard.size:,} bytes; fetch it again")
        return count

    def read(self, shard: Shard, record: int) -> bytes:
        with self.lock:
            reader = self._reader(shard)
            if not 0 <= record < reader.num_records():
                raise InputError(f"there is no record {record}; make the index again")
            try:
                return reader.read([record])[0]
            except Exception as error:  # the library raises RuntimeError and IndexError
                if not reader.ok():  # it would refuse everything from now on
                    del self.readers[shard]
                raise InputError(f"the record is damaged ({_told(error)}); fetch the file again") from error

    def _reader(self, shard: Shard) -> Any:
        if shard in self.readers:
            self.readers.move_to_end(shard)
            return self.readers[shard]
        from array_record.python.array_record_module import ArrayRecordReader  # comes with grain

        found = paths.require_regular(shard.path)
        if (found.st_size, found.st_mtime_ns) != (shard.size, shard.mtime):
            raise InputError(f"{shard.told} was changed while in use; open the dataset again")
        try:
            reader = ArrayRecordReader(str(shard.path), OPTIONS)
            if not reader.ok():
                reader.read([0])  # says why
                raise InputError("it cannot be opened")
        except Exception as error:
            raise InputError(f"it is no sound ArrayRecord file ({_told(error)}); fetch it again") from error
        while len(self.readers) >= KEPT:
            self.readers.popitem(last=False)
        self.readers[shard] = reader
        return reader


def _told(error: Exception) -> str:
    return told(" ".join(str(error).split())[:200]) or type(error).__name__
