"""Files out of a Debian package, read as archives from elsewhere are: in bounds, and never onto a path they name."""

import io
import lzma
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mmjax.core.errors import InputError

MAGIC, HEADER, DATA = b"!<arch>\n", 60, "data.tar.xz"
MEMORY = 256 * 2**20  # that unpacking xz may take; its strongest preset takes 65 MiB
CHUNK = 2**20


@dataclass(frozen=True)
class Limits:
    """What a package may hold: files, bytes in one of them, bytes unpacked in all."""

    members: int = 50_000
    file: int = 32 * 2**20
    total: int = 2**30


def members(path: Path, limits: Limits = Limits()) -> Iterator[tuple[str, bytes | None]]:
    """Name and content of every regular file of a .deb, in its order; of a link None, for links are not followed.

    The package is unpacked as it is read. Nothing is written.

    Raises:
      InputError: no whole Debian package with a data.tar.xz; more than the limits; a name that is absolute, goes up,
        or has characters that no file of a dataset needs; anything but files, directories and links.
    """
    with open(path, "rb") as file:
        unpacked = _Unpacked(file, _find(file, path), limits.total, path)
        try:
            with tarfile.open(fileobj=unpacked, mode="r|", bufsize=tarfile.BLOCKSIZE * 64) as tar:
                for number, member in enumerate(tar, 1):
                    if number > limits.members:
                        raise InputError(f"{path} holds over {limits.members:,} files; it is not the package meant.")
                    if not member.isdir():
                        yield _checked(member, path), _content(tar, member, limits, path)
        except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
            raise InputError(f"{path} is not a whole Debian package ({error}); download it again.") from error


def _find(file: BinaryIO, path: Path) -> int:
    """Goes to the packed files of a .deb, an `ar` archive of three members; returns how many bytes they have."""
    if file.read(len(MAGIC)) != MAGIC:
        raise InputError(f"{path} is not a Debian package; download it again.")
    names = []
    while len(header := file.read(HEADER)) == HEADER and header.endswith(b"`\n") and len(names) < 8:
        name, size = header[:16].decode("latin-1").strip().rstrip("/"), header[48:58].strip()
        if not size.isdigit():
            break
        if name == DATA:
            return int(size)
        names.append(name)
        file.seek(int(size) + int(size) % 2, io.SEEK_CUR)
    raise InputError(f"{path} has no {DATA} (only {', '.join(names) or 'nothing'}); take a package packed with xz.")


class _Unpacked(io.RawIOBase):
    """The bytes that `size` bytes of a file unpack to, `most` of them at most."""

    def __init__(self, file: BinaryIO, size: int, most: int, path: Path):
        self._file, self._left, self._most, self._path = file, size, most, path
        self._xz, self._count = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MEMORY), 0

    def readable(self) -> bool:
        return True

    def readinto(self, out) -> int:
        while not self._xz.eof:
            data = b""
            if self._xz.needs_input:
                data = self._file.read(min(CHUNK, self._left))
                self._left -= len(data)
                if not data:
                    raise EOFError("it ends early")
            found = self._xz.decompress(data, len(out))
            self._count += len(found)
            if self._count > self._most:
                raise InputError(f"{self._path} unpacks to over {self._most:,} bytes; it is not the package meant.")
            if found:
                out[: len(found)] = found
                return len(found)
        return 0


def _checked(member: tarfile.TarInfo, path: Path) -> str:
    name = member.name.removeprefix("./")
    parts = name.split("/")
    if not name.isprintable() or "\\" in name or any(part in ("", ".", "..") for part in parts):
        raise InputError(f"{path} holds a file called {member.name!r}; do not use this package.")
    return name


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, limits: Limits, path: Path) -> bytes | None:
    if member.issym() or member.islnk():
        return None
    if not member.isreg() or member.issparse():
        raise InputError(f"{path}: {member.name!r} is neither file, directory nor link; do not use this package.")
    if member.size > limits.file:
        raise InputError(f"{path}: {member.name!r} has {member.size:,} bytes, over {limits.file:,}; do not use it.")
    return tar.extractfile(member).read()
