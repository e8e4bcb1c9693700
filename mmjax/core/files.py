"""Files that are whole or absent, directories with one owner, and disk errors said in one sentence."""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mmjax.core.errors import InputError

PathLike = str | os.PathLike

# What the operating system says, and what to do about it. Libraries in C++ (tensorstore) raise ValueError with the
# text alone, so both the number and the text are looked for.
_DISK = {
    errno.ENOSPC: ("No space left on device", "no space is left on the disk; free some, or choose another directory"),
    errno.EDQUOT: ("Disk quota exceeded", "the disk quota is used up; free some space, or choose another directory"),
    errno.EROFS: ("Read-only file system", "the file system is read-only; choose a directory that can be written"),
    errno.EFBIG: ("File too large", "the file is larger than the file system or `ulimit -f` allows; raise the limit"),
    errno.EACCES: ("Permission denied", "permission is denied; change the permissions, or choose another directory"),
}


def write_atomic(path: PathLike, data: bytes | str) -> None:
    """Writes a file so that a reader, or a machine that loses power, finds the old content or the new, never a part.

    Text is written as UTF-8. On an error `path` is as it was.

    Raises:
      InputError: the disk is full, read-only, or the directory may not be written.
    """
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def atomic_file(path: PathLike) -> Iterator[BinaryIO]:
    """A file to write into, which is `path` once the block has ended, whole; on an error `path` is as it was.

    It is a temporary file in the same directory that is synced and renamed over `path`; then the directory is synced.

    Raises:
      InputError: the disk is full, read-only, or the directory may not be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with disk_errors("write", path):
        try:
            # Not tempfile: its files are readable by their owner only, whatever the umask says.
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            with open(fd, "wb") as file:
                yield file
                file.flush()
                os.fsync(fd)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


def sync_directory(path: PathLike) -> None:
    """Makes renames and deletions in a directory durable: they are on the disk when this returns."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# A child made by fork shares the open file, and with it the lock: worker processes that outlive a killed parent would
# keep the directory locked. So children close their copies.
_held: set[int] = set()


def _close_in_child() -> None:
    for fd in _held:
        os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextlib.contextmanager
def lock_directory(path: PathLike, *, wait: float = 0.0) -> Iterator[None]:
    """Holds a directory for this process (`flock` on its `.lock`); makes the directory if there is none.

    The lock ends with the `with` block or with the process, however that dies. `wait` is how many seconds to try for.

    Raises:
      InputError: someone else holds it (their process id is in the sentence), or it cannot be written.
    """
    path = Path(path)
    with disk_errors("lock", path):
        path.mkdir(parents=True, exist_ok=True)
        fd = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    _held.add(fd)
    try:
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    holder = os.pread(fd, 32, 0).decode(errors="replace").strip()
                    who = f"process {holder}" if holder.isdigit() else "another process"
                    raise InputError(
                        f"{path} is in use by {who}; wait for it to end, or use another directory"
                    ) from None
                time.sleep(0.05)
        with contextlib.suppress(OSError):  # a full disk: the lock holds without the number
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        if fd in _held:  # not in a forked child, where the number may name another file by now
            _held.discard(fd)
            os.close(fd)


def require_space(path: PathLike, bytes_needed: int, what: str) -> None:
    """Checks that the disk under `path` has room for `bytes_needed` more bytes; `path` need not exist yet.

    `what` is a verb phrase for the sentence: "unpack the samples".

    Raises:
      InputError: it has not.
    """
    existing = Path(path).absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < bytes_needed:
        raise InputError(
            f"cannot {what} in {os.fspath(path)}: it takes {bytes_needed / 1e6:,.1f} MB and the disk has"
            f" {free / 1e6:,.1f} MB free; free some space, or choose another directory"
        )


@contextlib.contextmanager
def disk_errors(what: str, where: PathLike) -> Iterator[None]:
    """Turns "disk full", "quota", "read-only" and "permission denied" into one sentence; other errors pass unchanged.

    `what` is a verb phrase ("save step 10"), `where` the file or directory. The error is recognised by its number or,
    for libraries that keep the text only, by its text; also where another error wraps it.

    Raises:
      InputError: `cannot {what} {where}: ...`, from the original error.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        advice = _advice(error)
        if advice is None:
            raise
        raise InputError(f"cannot {what} {os.fspath(where)}: {advice}") from error


def _advice(error: BaseException) -> str | None:
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    while pending:
        error = pending.pop()
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        number = getattr(error, "errno", None)
        for code, (text, advice) in _DISK.items():
            if number == code or (number is None and text.lower() in str(error).lower()):
                return advice
        pending += [error.__cause__, None if error.__suppress_context__ else error.__context__]
        pending += getattr(error, "exceptions", ())  # an ExceptionGroup
    return None
