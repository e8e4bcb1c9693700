"""Directories of weights as Hugging Face lays them out: everything checked before memory is taken for a tensor.

config.json
model.safetensors                                       or one file of another name, or
model.safetensors.index.json + model-00001-of-00002.safetensors …
"""

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mmjax.convert import header
from mmjax.convert.header import Entry, Header
from mmjax.core import strict_json
from mmjax.core.errors import InputError
from mmjax.core.files import PathLike, disk_errors, sync_directory
from mmjax.core.strict_json import shown

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MAX_CONFIG, MAX_INDEX, MAX_HEADERS = 4 << 20, 16 << 20, 64 << 20
# Formats whose readers may run code that is in the file, or that other programs write.
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".npz")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file, or a link to one, and its size.

    Raises:
      InputError: it is not there, something else, or cannot be read. Pipes and devices are not opened, so none hangs.
    """
    try:
        if stat.S_ISREG(os.stat(path).st_mode):
            # It may have become a pipe just now.
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(fd, "rb", buffering=0) as file:
                found = os.fstat(fd)
                if stat.S_ISREG(found.st_mode):
                    yield file, found.st_size
                    return
    except FileNotFoundError:
        what = "is a link to a file that is not there" if path.is_symlink() else "is missing"
        raise InputError(f"{path} {what}; download the whole directory") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}; check the file and the disk") from error
    raise InputError(f"{path} is not a regular file; give a directory whose files are files")


def _fill(file: BinaryIO, into: memoryview, path: Path) -> None:
    done = 0
    while done < len(into):
        n = file.readinto(into[done:])
        if not n:
            raise InputError(f"{path} has become shorter while it was read; do not change it meanwhile")
        done += n


def read_small(path: Path, limit: int) -> bytes:
    """The bytes of a file.

    Raises:
      InputError: it cannot be read (`opened`), or has more than `limit` bytes.
    """
    with opened(path) as (file, size):
        if size > limit:
            raise InputError(f"{path} has {size:,} bytes, where {limit:,} are allowed; it is not what its name says")
        data = bytearray(size)
        _fill(file, memoryview(data), path)
    return bytes(data)


def _header(path: Path) -> Header:
    with opened(path) as (file, size):
        raw = bytearray(min(size, 32))
        _fill(file, memoryview(raw), path)
        n = 8 + header.length(bytes(raw), size, str(path))
        more = bytearray(max(0, n - len(raw)))
        _fill(file, memoryview(more), path)
    return header.parse(bytes((raw + more)[:n]), size, str(path))


def _object(data: bytes, path: Path, limit: int) -> dict[str, Any]:
    out = strict_json.loads(data, str(path), max_bytes=limit)
    if not isinstance(out, dict):
        raise InputError(f"{path} is not a JSON object; download it again")
    return out


class Directory:
    """The tensors of a directory of weights: a Source (`convert.rules`) that has read headers and no data yet.

    config: what config.json says, config_bytes as it says it. index: the bytes of the index, None where there is one
    file. headers: by file name, all of whose tensors are in exactly one file. names: of everything in the directory.

    Args:
      path: the directory. Links to files are followed: the cache of huggingface_hub is made of them. Where there is a
        model.safetensors beside an index, it is the one that is read, as in transformers.

    Raises:
      InputError: a file is missing, too large, damaged, or not what it should be; or all weights are pickles.
    """

    def __init__(self, path: PathLike):
        self.path = Path(path)
        self.where = str(self.path)
        self.names = names = listed(self.path)
        self.config_bytes = read_small(self.path / CONFIG, MAX_CONFIG)
        self.config = _object(self.config_bytes, self.path / CONFIG, MAX_CONFIG)
        self.index: bytes | None = None
        self.headers: dict[str, Header] = {}
        files, placed = self._files(names)
        room = MAX_HEADERS
        for name in files:
            self.headers[name] = _header(self.path / name)
            room -= len(self.headers[name].raw)
            if room < 0:
                raise InputError(
                    f"The headers in {self.path} have more than {MAX_HEADERS:,} bytes together; no model has such"
                )
        self._home = {key: name for name, h in self.headers.items() for key in h.tensors}
        if placed is not None:
            self._compare(placed)

    def _files(self, names: list[str]) -> tuple[list[str], dict[str, str] | None]:
        """The files of tensors, and what the index says about which tensor is where."""
        if SINGLE in names:
            return [SINGLE], None
        if INDEX in names:
            path = self.path / INDEX
            self.index = read_small(path, MAX_INDEX)
            placed = _object(self.index, path, MAX_INDEX).get("weight_map")
            if not isinstance(placed, dict) or not placed:
                raise InputError(f"{path} has no weight_map from tensors to files; download it again")
            return sorted({plain_name(name, path) for name in placed.values()}), placed
        some = [name for name in names if name.endswith(".safetensors")]
        if len(some) == 1:
            return some, None
        if some:
            raise InputError(
                f"{self.path} has {len(some)} safetensors files ({_some(some)}) and neither {SINGLE} nor {INDEX}; "
                f"download the whole directory, or leave one"
            )
        pickles = [name for name in names if name.endswith(_PICKLES)]
        if pickles:
            raise InputError(
                f"{self.path} has weights in formats that can run code ({_some(pickles)}) and none in safetensors; "
                f"convert them where you trust them (transformers: save_pretrained) and give that directory"
            )
        raise InputError(f"{self.path} has no safetensors file; give the directory of a model's weights")

    def _compare(self, placed: dict[str, str]) -> None:
        """Raises InputError where the index and the files' own headers differ."""
        path = self.path / INDEX
        if (held := sum(len(h.tensors) for h in self.headers.values())) != len(self._home):
            raise InputError(f"The files of {path} hold {held - len(self._home)} tensors twice; download them again")
        for key, name in placed.items():
            home = self._home.get(key)
            if home != name:
                real = "in no file" if home is None else f"in {home}"
                raise InputError(f"The tensor {shown(key)} is {real}, and in {name} by {path}; download both again")
        surplus = sorted(self._home.keys() - placed.keys())
        if surplus:
            raise InputError(f"The tensors {_some(surplus)} are in files of {path}, and not in it; download all again")

    def _entry(self, key: str) -> Entry:
        return self.headers[self._home[key]].tensors[key]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor."""
        return {key: self._entry(key).shape for key in self._home}

    def dtypes(self) -> dict[str, np.dtype]:
        """The number format of every tensor."""
        return {key: self._entry(key).dtype for key in self._home}

    def read(self, key: str) -> np.ndarray:
        """A tensor, in memory of its own.

        safetensors' own reader has no 8-bit formats in NumPy, and maps the file: were that cut short meanwhile, the
        process would die.

        Raises:
          InputError: the file is not the one any more whose header was read.
        """
        name = self._home[key]
        of, path, whole = self._entry(key), self.path / name, self.headers[name]
        with opened(path) as (file, size):
            if size != whole.size:
                raise InputError(f"{path} has changed while it was read; load it again")
            data = np.empty(of.stop - of.start, np.uint8)
            file.seek(of.start)
            _fill(file, memoryview(data), path)
        if of.dtype == bool and data.size and data.max() > 1:
            raise InputError(f"The tensor {shown(key)} in {path} is neither true nor false; download the file again")
        return data.view(of.dtype).reshape(of.shape)


class One(Directory):
    """The tensors of one file, as of a directory that has no others."""

    def __init__(self, path: PathLike, name: str):
        self.path = Path(path)
        self.where = str(self.path / name)
        self.headers = {name: _header(self.path / name)}
        self._home = dict.fromkeys(self.headers[name].tensors, name)


def listed(path: Path) -> list[str]:
    """The names of everything in a directory; InputError where it is none that can be read."""
    try:
        return sorted(os.listdir(path))
    except (OSError, ValueError):
        what = "is a file" if path.is_file() else "is not a directory that can be read"
        raise InputError(
            f"{path} {what}; give the local directory that holds {CONFIG} and the safetensors files"
        ) from None


def plain_name(name: Any, path: Path) -> str:
    """The name, where it is that of a safetensors file in the same directory and nothing else.

    Raises:
      InputError: it is not; `path` names it.
    """
    plain = isinstance(name, str) and name.isprintable() and len(name.encode()) <= 255
    if not plain or not name.endswith(".safetensors") or name.startswith(".") or set(name) & set("/\\"):
        raise InputError(
            f"{path} names the file {shown(name)}, which is no plain name of a safetensors file; repair it"
        )
    return name


def _some(names: list[str]) -> str:
    return ", ".join(map(shown, names[:5])) + (", …" if len(names) > 5 else "")


@contextlib.contextmanager
def new_directory(path: PathLike) -> Iterator[Path]:
    """A directory to write into, which is `path` once the block has ended, with all its files durable; or nothing is.

    Raises:
      InputError: there is something at `path` already, an empty directory excepted, or the disk is full or read-only.
    """
    path = Path(path).absolute()
    taken = f"{path} exists already; choose another directory, or remove it first"
    with disk_errors("save", path):
        if os.path.lexists(path) and (path.is_symlink() or not path.is_dir() or any(path.iterdir())):
            raise InputError(taken)
        if above := next((p for p in path.parents if p.exists() and not p.is_dir()), None):
            raise InputError(f"{path} cannot be made: {above} is a file; choose another directory")
        made = [p for p in path.parents if not p.exists()]
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            yield temporary
            mode = temporary.stat().st_mode & 0o666  # as the umask has it: safetensors makes files of their owner only
            for folder, _, names in os.walk(temporary):
                for name in names:
                    with open(os.path.join(folder, name), "rb") as file:
                        os.fchmod(file.fileno(), mode)
                        os.fsync(file.fileno())
                sync_directory(folder)
            try:
                os.rename(temporary, path)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):  # it came just now
                    raise InputError(taken) from None
                raise
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            for parent in made:
                with contextlib.suppress(OSError):
                    parent.rmdir()
            raise
        sync_directory(path.parent)
