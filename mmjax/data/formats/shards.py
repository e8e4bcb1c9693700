"""The files of a dataset, in order; read at any offset from any thread."""

import contextlib
import glob
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mmjax.core.errors import InputError
from mmjax.core.strict_json import shown
from mmjax.data.formats import paths

KINDS = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".tar": "tar",
    ".array_record": "array_record",
    ".arrayrecord": "array_record",
}
CHUNK = 2**20  # bytes that are read at a time where a whole file is gone through
ENDS = 2**16  # bytes at both ends of a file by which a changed one is recognised


@dataclass(frozen=True)
class Shard:
    """One file, opened for each read: thousands of them need no file descriptors, and nothing is tied to a process.

    name: relative to the dataset. size, mtime: what they were when the dataset was opened.
    """

    path: Path
    name: str
    size: int
    mtime: int

    @property
    def told(self) -> str:
        """The name, for messages."""
        return told(self.name)

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        """A file descriptor; InputError if the file is not the one that the dataset was opened with."""
        fd = paths.open_regular(self.path)
        try:
            found = os.fstat(fd)
            if (found.st_size, found.st_mtime_ns) != (self.size, self.mtime):
                raise InputError(f"{self.told} was changed while in use; open the dataset again")
            yield fd
        finally:
            os.close(fd)

    def read(self, start: int, length: int) -> bytes:
        """So many bytes from an offset; InputError if the file has fewer."""
        with self.opened() as fd:
            return read_all(fd, start, length, self.told)

    def checksum(self) -> int:
        """CRC-32 of both ends, which are where formats keep their lists of contents."""
        with self.opened() as fd:
            first = os.pread(fd, ENDS, 0)
            return zlib.crc32(os.pread(fd, ENDS, max(0, self.size - ENDS)), zlib.crc32(first))


def told(text: str) -> str:
    """A stranger's text as it may reach a terminal: as it is, or quoted where it holds more than signs and spaces."""
    return text if text.isprintable() else shown(text)


def read_all(fd: int, start: int, length: int, name: str) -> bytes:
    """So many bytes from an offset; InputError if the file has fewer."""
    parts, left = [], length
    while left > 0:
        try:
            part = os.pread(fd, min(left, 2**30), start + length - left)
        except OSError as error:
            raise InputError(f"{name} cannot be read ({error.strerror}); check the disk") from error
        if not part:
            raise InputError(f"{name} ends {left:,} bytes before the record does; fetch the file again")
        parts.append(part)
        left -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def chunks(fd: int, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """The file from an offset on, a part at a time, each with its offset."""
    while part := os.pread(fd, CHUNK, start):
        yield start, part
        start += len(part)


@dataclass(frozen=True)
class Found:
    """A dataset's files.

    kind: see KINDS. folder: what names are relative to, and what its pictures must lie in unless told otherwise.
    name: of the dataset. index: where its index is kept.
    """

    shards: tuple[Shard, ...]
    kind: str
    folder: Path
    name: str
    index: Path


def find(path: str | os.PathLike, root: Path | None = None) -> Found:
    """The files that a path means: one file, the data files right in a folder, or all that fit a pattern with `*`.

    Files found in a folder or by a pattern may be links only if they lead to inside `root` (None: the folder); a file
    that is named itself may be any link. They are sorted by name.

    Raises:
      InputError: there are none, or of several kinds; a path leads elsewhere, or to something that is not a file; a
        name is not UTF-8.
    """
    text = os.fspath(path)
    if paths.is_address(text):
        raise InputError(f"{text} is an address, and nothing is fetched; download the dataset and give its path")
    given = Path(os.path.abspath(text))
    if given.is_dir():
        return _many(given, sorted(os.listdir(given)), given.name, given, root)
    if glob.has_magic(text) and not given.exists():
        # The folder above the first part that has a star: names are relative to it.
        parts = given.parts
        fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        folder = Path(*parts[:fixed])
        names = sorted(glob.glob(str(Path(*parts[fixed:])), root_dir=folder, recursive=True))
        plain = re.sub(r"[^\w.-]+", "_", "-".join(parts[fixed:]))
        return _many(
            folder, names, re.sub(r"[*?\[\]{}]+", "", given.stem).strip("-_.") or folder.name, folder / plain, root
        )
    kind = KINDS.get(given.suffix.lower())
    _refuse_bytes(given.name)
    found = paths.require_regular(Path(os.path.realpath(given)))
    if kind is None:
        raise InputError(f"{given} is of no known kind; its name should end in {', '.join(KINDS)}")
    shard = Shard(Path(os.path.realpath(given)), given.name, found.st_size, found.st_mtime_ns)
    folder = Path(os.path.realpath(given.parent))
    return Found((shard,), kind, folder, given.stem, given.with_name(f"{given.name}.mmjax-index"))


def _refuse_bytes(name: str) -> None:
    """InputError for a name that is not text: ids, the index and messages have it in them."""
    if not paths.is_text(name):
        raise InputError(f"the name {shown(name)} is not UTF-8; rename the file or folder")


def _many(folder: Path, names: list[str], name: str, base: Path, root: Path | None) -> Found:
    names = [n for n in names if Path(n).suffix.lower() in KINDS]
    kinds = sorted({KINDS[Path(n).suffix.lower()] for n in names})
    if len(kinds) != 1:
        found = f"files of several kinds ({', '.join(kinds)})" if kinds else f"no file that ends in {', '.join(KINDS)}"
        raise InputError(f"{folder} has {found}; give the path of one kind of file, as {folder / '*.jsonl'}")
    folder = Path(os.path.realpath(folder))
    shards = []
    for n in [name, *names]:
        _refuse_bytes(n)
    for n in names:
        path = Path(os.path.realpath(folder / n))
        if not path.is_relative_to(root or folder):
            raise InputError(
                f"{told(str(folder / n))} leads out of {root or folder} through a link; give as root what holds both"
            )
        found = paths.require_regular(path)
        shards.append(Shard(path, n, found.st_size, found.st_mtime_ns))
    return Found(tuple(shards), kinds[0], folder, name, base.with_name(f"{base.name}.mmjax-index"))
