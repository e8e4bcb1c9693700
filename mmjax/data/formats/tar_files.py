"""WebDataset: tar archives in which files of one name, up to its first dot, make a record. Nothing is extracted."""

import functools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from mmjax.core.errors import InputError
from mmjax.core.strict_json import shown
from mmjax.data.formats import tar_header
from mmjax.data.formats.record import LIMITS, Address, Bad, Limits, Record, parse
from mmjax.data.formats.shards import CHUNK, Shard, read_all
from mmjax.data.formats.tar_header import BLOCK, Broken, Member
from mmjax.sequence.document import Encoded

# Loading one runs whatever code it holds (npy too, where it holds objects): they are passed over, by name, unread.
PICKLES = re.compile(r"(^|\.)(pkl|pickle|pyd|pyc|pth?|npy|npz|joblib|dill|ckpt|bin)$", re.IGNORECASE)


@dataclass(frozen=True)
class _Group:
    """Entries in a row with one key. wrong: why the record must not be used, if so."""

    key: str
    start: int
    end: int
    suffixes: tuple[str, ...]
    wrong: str = ""


@dataclass(frozen=True)
class Tar:
    """Addresses are (shard, offset of the first header, bytes to the header after the last).

    Where a header is damaged the next sound one is searched for, and what lies between is one bad place. The records
    right before and after it are kept if they have the same files as the others, and otherwise belong to it.
    """

    shards: tuple[Shard, ...]
    limits: Limits = LIMITS

    def place(self, address: Address) -> str:
        return f"{self.shards[address[0]].told}, byte {address[1]}"

    def scan(self, number: int) -> Iterator[Address | Bad]:
        shard = self.shards[number]
        open_: _Group | None = None
        usual: tuple[str, ...] = ()
        broken = False  # the group that is open, or the next one, may lack files

        def close(now_broken: bool) -> Iterator[Address | Bad]:
            nonlocal usual
            if open_ and open_.wrong:
                yield Bad(f"{shard.told}, byte {open_.start}", open_.wrong)
            elif open_ and (not (broken or now_broken) or open_.suffixes == usual):
                usual = open_.suffixes
                yield number, open_.start, open_.end - open_.start

        with shard.opened() as fd:
            for found in _members(fd, shard):
                if isinstance(found, Bad):
                    yield from close(True)
                    yield found
                    open_, broken = None, True
                elif found.kind != b"5" or found.wrong:  # not a folder
                    key, suffix = split(found.name)
                    if open_ and key == open_.key:
                        open_ = replace(open_, end=found.next, suffixes=(*open_.suffixes, suffix))
                    else:
                        yield from close(False)
                        broken = broken and open_ is None
                        open_ = _Group(key, found.start, found.next, (suffix,))
                    open_ = replace(open_, wrong=open_.wrong or self._wrong(found, len(open_.suffixes)))
            yield from close(False)

    def _wrong(self, member: Member, files: int) -> str:
        if member.wrong:
            return f"{shown(member.name)} {member.wrong}"
        if member.size > self.limits.record_bytes:
            return f"{shown(member.name)} has {member.size:,} bytes, over the limit of {self.limits.record_bytes:,}"
        return f"a record of more than {self.limits.files:,} files; split it" if files > self.limits.files else ""

    def read(self, address: Address) -> Record:
        number, start, length = address
        shard = self.shards[number]
        files: dict[str, Encoded] = {}
        key = ""
        with shard.opened() as fd:
            reader = functools.partial(_read, fd, shard.told)
            at = start
            while at < start + length:
                member = tar_header.member(reader, at, min(start + length, shard.size))
                if member is None or self._wrong(member, len(files) + 1):
                    raise InputError("the record is not what the index says; make the index again")
                at = member.next
                if member.kind == b"5":
                    continue
                key, suffix = split(member.name)
                if PICKLES.search(suffix):
                    continue
                if suffix in files:
                    raise InputError(f"{shown(member.name)} is there twice; take one out of the archive")
                files[suffix] = Encoded(functools.partial(shard.read, member.data, member.size))
        fields = parse(files["json"].read(), self.limits) if "json" in files else {}
        return Record(self.place(address), {"__key__": key} | fields, functools.partial(self.read, address), files)


def split(name: str) -> tuple[str, str]:
    """A name's key and suffix: "a/b.c.jpg" → "a/b", "c.jpg"."""
    folder, _, base = name.removeprefix("./").rpartition("/")
    key, _, suffix = base.partition(".")
    return f"{folder}/{key}" if folder else key, suffix.lower()


def _read(fd: int, name: str, start: int, length: int) -> bytes:
    return read_all(fd, start, length, name)


def _members(fd: int, shard: Shard) -> Iterator[Member | Bad]:
    """All entries in order, and the places where there should be one and is not."""
    reader = functools.partial(_read, fd, shard.told)
    at, size, ended = 0, shard.size, False
    while at < size:
        try:
            found = tar_header.member(reader, at, size)
        except Broken as error:
            yield Bad(f"{shard.told}, byte {at}", str(error))
            at, ended = _search(reader, at + BLOCK, size), True
            continue
        if found:
            at, ended = found.next, False
            yield found
        else:
            # Two empty blocks end an archive, and what is padded or joined from several goes on with others.
            at, ended = _data(fd, at, size), True
    if not ended:
        yield Bad(f"{shard.told}, byte {size}", "the archive lacks its end: it is cut off; fetch it again")


def _search(read: Callable[[int, int], bytes], start: int, size: int) -> int:
    """The offset of the next sound header, or the end."""
    at = start
    while at < size:
        part = read(at, min(CHUNK, size - at))
        place = part.find(b"ustar")
        while place >= 0:
            header = place - 257
            if header >= 0 and header % BLOCK == 0 and tar_header.is_header(part[header : header + BLOCK]):
                return at + header
            place = part.find(b"ustar", place + 1)
        at += CHUNK  # a multiple of the block, and so no header spans two parts
    return size


def _data(fd: int, start: int, size: int) -> int:
    """The offset of the next block that is not empty, or the end. Holes in the file are not read."""
    at = start
    while at < size:
        try:
            at = max(at, os.lseek(fd, at, os.SEEK_DATA) // BLOCK * BLOCK)
        except OSError:  # no data any more
            return size
        part = os.pread(fd, CHUNK, at)
        left = part.lstrip(b"\0")
        if left:
            return at + (len(part) - len(left)) // BLOCK * BLOCK
        at += max(len(part), BLOCK)
    return size
