"""JSON Lines, and a JSON file that is one list: found record by record, so files may be larger than memory."""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from mmjax.core.errors import InputError
from mmjax.data.formats.record import LIMITS, Address, Bad, Limits, Record, parse
from mmjax.data.formats.shards import Shard, chunks

SPACE = b" \t\r\n"
WORD = re.compile(rb"[^ \t\r\n]")
# Brackets, whole strings, and the beginning of one that does not end here. Possessive: nothing is ever tried twice.
BRACKET = re.compile(rb'[\[\]{}]|"(?:[^"\\]++|\\.)*+"|"', re.DOTALL)
AT_TOP = re.compile(rb'[\[\]{",]')  # between the records of a list, where commas part them


@dataclass(frozen=True)
class _Json:
    """Addresses are (shard, offset, length) of the record's text."""

    shards: tuple[Shard, ...]
    limits: Limits = LIMITS

    def place(self, address: Address) -> str:
        return f"{self.shards[address[0]].told}, byte {address[1]}"

    def read(self, address: Address) -> Record:
        number, start, length = address
        if length > self.limits.record_bytes:
            raise InputError(
                f"the record has {length:,} bytes, over the limit of {self.limits.record_bytes:,}; split it"
            )
        data = self.shards[number].read(start, length)
        return Record(self.place(address), parse(data, self.limits), functools.partial(self.read, address))


class Lines(_Json):
    """A record a line. A broken line is left out alone."""

    def scan(self, number: int) -> Iterator[Address | Bad]:
        start = 0  # of the line
        with self.shards[number].opened() as fd:
            blank = True  # all of the line that lies in earlier chunks
            for base, chunk in chunks(fd):
                at = 0
                while (end := chunk.find(b"\n", at)) >= 0:
                    if not blank or chunk[at:end].strip(SPACE):
                        yield number, start, base + end - start
                    start, at, blank = base + end + 1, end + 1, True
                blank = blank and not chunk[at:].strip(SPACE)
            if not blank:
                yield number, start, self.shards[number].size - start


class List(_Json):
    """One list of all records.

    A record that is not sound is left out alone as long as its quotes and brackets pair; where they do not, everything
    from it on is lost, for nothing tells where the next one begins.
    """

    def scan(self, number: int) -> Iterator[Address | Bad]:
        shard = self.shards[number]
        with shard.opened() as fd:
            yield from _Elements(shard, number).run(chunks(fd))


class _Elements:
    """Finds where the elements of the outermost list begin and end, in one pass and little memory."""

    def __init__(self, shard: Shard, number: int):
        self.shard, self.number = shard, number
        self.depth = 0  # of brackets that are open
        self.quoted = self.escaped = False  # inside a string; right after an odd number of backslashes
        self.start: int | None = None  # of the element that is open
        self.ended = False

    def run(self, parts: Iterator[tuple[int, bytes]]) -> Iterator[Address | Bad]:
        for base, chunk in parts:
            at = 0
            while at < len(chunk):
                if self.quoted:
                    at = self._string(chunk, at)
                elif self.depth > 1:
                    at = self._deep(chunk, at)
                elif self.ended or self.depth == 0:
                    found = WORD.search(chunk, at)
                    if not found:
                        break
                    if self.ended or found[0] != b"[":
                        what = "something follows the list" if self.ended else "it is not a list of records"
                        yield self._bad(base + found.start(), f"{what}; make the file one JSON list, or JSON Lines")
                        return
                    self.depth, at = 1, found.end()
                else:
                    at, element = self._top(base, chunk, at)
                    if element:
                        yield element
        if not self.ended:
            start = self.shard.size if self.start is None else self.start
            yield self._bad(start, "the list does not end; the file is cut off or damaged from here on, fetch it again")

    def _bad(self, start: int, reason: str) -> Bad:
        return Bad(f"{self.shard.told}, byte {start}", reason)

    def _string(self, chunk: bytes, at: int) -> int:
        """Goes on after the string, or to the end of the chunk."""
        if self.escaped:
            self.escaped, at = False, at + 1
        while True:
            end = chunk.find(b'"', at)
            stop = end if end >= 0 else len(chunk)
            odd = (stop - at - len(chunk[at:stop].rstrip(b"\\"))) % 2 == 1
            if end < 0:
                self.escaped = odd
                return len(chunk)
            if not odd:
                self.quoted = False
                return end + 1
            at = end + 1

    def _deep(self, chunk: bytes, at: int) -> int:
        """Goes on to where the element may end, into a string that the chunk does not end, or to the chunk's end."""
        depth = self.depth
        for found in BRACKET.finditer(chunk, at):
            token = found[0]
            if token in (b"{", b"["):
                depth += 1
            elif token in (b"}", b"]"):
                depth -= 1
            if depth == 1 or token == b'"':
                self.depth, self.quoted = depth, token == b'"'
                return found.end()
        self.depth = depth
        return len(chunk)

    def _top(self, base: int, chunk: bytes, at: int) -> tuple[int, Address | None]:
        """Between elements: one step on, and the element that ends there."""
        if self.start is None:
            found = WORD.search(chunk, at)
            if not found:
                return len(chunk), None
            at = found.start()
            if found[0] != b"]":
                self.start = base + at
        found = AT_TOP.search(chunk, at)
        if not found:
            return len(chunk), None
        if found[0] in b",]":
            self.ended = found[0] != b","
            self.depth -= self.ended
            element = None if self.start is None else (self.number, self.start, base + found.start() - self.start)
            self.start = None
            return found.end(), element
        self.quoted = found[0] == b'"'
        self.depth += not self.quoted
        return found.end(), None
