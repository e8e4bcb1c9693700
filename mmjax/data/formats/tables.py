"""Parquet: a row is a record. Row groups are read one at a time, and the last two kept."""

import contextlib
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from mmjax.core.errors import InputError
from mmjax.data.formats.record import LIMITS, Address, Bad, Limits, Record
from mmjax.data.formats.shards import Shard, told

KEPT = 2  # row groups in memory
NAMES = 64 * 2**20  # bytes of text, and so many entries at most, in the list of a file's contents


@dataclass(frozen=True)
class Parquet:
    """Addresses are (shard, row group, row). A damaged row group is left out whole; the others are kept.

    Reading far from the last row takes a whole row group: convert what is read in random order to ArrayRecord.
    """

    shards: tuple[Shard, ...]
    limits: Limits = LIMITS
    kept: "_Kept" = field(default_factory=lambda: _Kept(), compare=False, repr=False)

    def place(self, address: Address) -> str:
        return f"{self.shards[address[0]].told}, row group {address[1]}, row {address[2]}"

    def scan(self, number: int) -> Iterator[Address | Bad]:
        shard = self.shards[number]
        try:
            with _opened(shard) as file:
                groups = file.metadata.num_row_groups
        except InputError as error:
            yield Bad(shard.told, str(error))
            return
        for group in range(groups):
            try:
                rows = self._group(number, group).num_rows
            except InputError as error:
                yield Bad(f"{shard.told}, row group {group}", str(error))
                continue
            yield from ((number, group, row) for row in range(rows))

    def read(self, address: Address) -> Record:
        number, group, row = address
        table = self._group(number, group)
        if not 0 <= row < table.num_rows:
            raise InputError(f"there is no row {row} among {table.num_rows}; make the index again")
        try:
            fields: dict[str, Any] = table.slice(row, 1).to_pylist()[0]
        except Exception as error:  # text that is not UTF-8, dates out of range: Arrow's own kinds of errors
            raise InputError(f"the row cannot be read ({_told(error)}); have it repaired by who made it") from error
        return Record(self.place(address), fields, functools.partial(self.read, address))

    def _group(self, number: int, group: int) -> Any:
        return self.kept.get((number, group), lambda: self._load(number, group))

    def _load(self, number: int, group: int) -> Any:
        shard = self.shards[number]
        with _opened(shard) as file:
            try:
                if not 0 <= group < file.metadata.num_row_groups:
                    raise InputError(f"there is no row group {group}; make the index again")
                size = file.metadata.row_group(group).total_byte_size
                if not 0 <= size <= self.limits.group_bytes:
                    raise InputError(
                        f"the row group takes {size:,} bytes, over the limit of {self.limits.group_bytes:,}; write "
                        f"the file with smaller row groups, or raise Limits.group_bytes"
                    )
                return file.read_row_group(group, use_threads=False)
            except InputError:
                raise
            except Exception as error:  # whatever Arrow raises at damaged data
                raise InputError(f"the row group is damaged ({_told(error)}); fetch the file again") from error


class _Kept:
    """The tables used last. One thread reads at a time, and what it read is there for the next."""

    def __init__(self) -> None:
        self.tables: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, key: tuple[int, int], load: Callable[[], Any]) -> Any:
        with self.lock:
            if key not in self.tables:
                while len(self.tables) >= KEPT:
                    self.tables.popitem(last=False)
                self.tables[key] = load()
            self.tables.move_to_end(key)
            return self.tables[key]

    def __reduce__(self) -> tuple:
        return _Kept, ()


@contextlib.contextmanager
def _opened(shard: Shard) -> Iterator[Any]:
    """A shard as Arrow's ParquetFile; InputError for what Arrow cannot open."""
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise InputError("Parquet files need pyarrow; pip install 'mmjax[data]'") from error
    with shard.opened() as fd, open(fd, "rb", closefd=False) as file:
        try:
            opened = parquet.ParquetFile(
                file,
                page_checksum_verification=True,
                thrift_string_size_limit=NAMES,
                thrift_container_size_limit=NAMES // 64,
            )
        except Exception as error:
            raise InputError(f"it is no sound Parquet file ({_told(error)}); fetch it again") from error
        yield opened


def _told(error: Exception) -> str:
    return told(" ".join(str(error).split())[:200]) or type(error).__name__
