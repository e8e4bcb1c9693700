"""Arrays that may be made again, kept under the hash of what they were made from: in memory, and in a folder.

    store = Store(folder=Path("features"), disk=2**32, memory=2**28, age=7 * 86400)
    found = store.get(key)                 # a dict of arrays, or None
    store.put(key, {"tokens": tokens})

It is a cache: an entry may be gone at any time, and whoever asks then makes it again. It is never wrong: an entry of
which a bit has changed, or whose writing was cut off, is told by its length and SHA-256 and dropped. Any number of
processes share a folder without locks: an entry is written beside and renamed into place, one that is being read lives
until it is read, and what a killed process left half written is swept away. Nothing that a disk does is an error of the
run: a folder that cannot be used is left alone, which is said once.

An entry is one file (core.packed). Its time of change is when it was written, its time of access when it was last used.
"""

import contextlib
import logging
import math
import os
import re
import secrets
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmjax.core.errors import InputError
from mmjax.core.packed import DTYPES, Arrays, pack, unpack

KEY = re.compile("[0-9a-f]{64}")
ENTRY, WRITING = re.compile(r"[0-9a-f]{64}\.arrays"), re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]{16}\.tmp")
SKEW = 60.0  # seconds by which the clock of another machine may be ahead
STALE = 600.0  # seconds after which a file that is still being written belongs to a process that was killed
FULL = 3 / 4  # of the bytes on disk, to which a sweep makes room: what others write meanwhile fits in the rest
SHARE = 8  # an entry of more than the 1/SHARE part of the bytes is not kept: a few would drive out all others

log = logging.getLogger("mmjax")


@dataclass
class Counts:
    """What became of the questions and of the files."""

    memory: int = 0  # found in memory
    disk: int = 0  # found on disk
    missed: int = 0  # not found
    damaged: int = 0  # dropped, because they were not as they had been written
    swept: int = 0  # files removed to make room, or because of their age


class Store:
    """A cache of named arrays; see the top of the file. Threads may share one.

    Entries come back read-only. The bytes on disk are bounded for all processes together, as long as no more than a few
    write at the same moment (each looks at the folder before it has written a 32nd part of them).
    """

    def __init__(self, *, folder: Path | None = None, disk: int = 0, memory: int = 0, age: float = math.inf):
        """Args:
          folder: where entries are kept, made with access for its owner alone; None: in memory only.
          disk: bytes of all files in the folder.
          memory: bytes of the arrays kept in this process.
          age: seconds after which an entry is not used any more, however it is asked for.

        Raises:
          InputError: a bound that is none.
        """
        if min(disk, memory) < 0 or not age > 0 or (folder is not None and not disk):
            raise InputError(
                f"a cache of {disk} bytes on disk, {memory} in memory and {age} seconds keeps nothing; give positive "
                f"numbers"
            )
        self.folder, self.disk, self.memory, self.age = folder, disk, memory, age
        self.counts = Counts()
        self._told = False  # that an entry was too large
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, tuple[float, Arrays]] = OrderedDict()  # (when written, arrays), last used last
        self._held = 0  # bytes in memory
        self._unseen = math.inf  # bytes written since the folder was last looked at
        self._writes = folder is not None
        if folder is not None:
            self._open()

    def get(self, key: str) -> Arrays | None:
        """What was put under a key; None where it is not there (any more)."""
        _check(key)
        with self._lock:
            found = self._recall(key)
            if found is not None:
                self.counts.memory += 1
                return dict(found)
        read = None if self.folder is None else self._read(key)
        with self._lock:
            if read is None:
                self.counts.missed += 1
                return None
            self.counts.disk += 1
            self._keep(key, *read)
            return dict(read[1])

    def put(self, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keeps arrays under a key of 64 hexadecimal digits; whoever puts there again puts the same.

        Raises:
          InputError: the key is none, or an array is not of a dtype in DTYPES.
        """
        _check(key)
        own = {}
        for name, value in arrays.items():
            if np.asarray(value).dtype.name not in DTYPES:
                raise InputError(f"{name!r} is of type {np.asarray(value).dtype}; a cache keeps {', '.join(DTYPES)}")
            own[name] = np.array(value, order="C")  # a copy: it must not keep a whole batch alive, nor change with it
            own[name].setflags(write=False)
        with self._lock:
            self._keep(key, time.time(), own)
        if self.folder is not None:
            self._write(key, own)

    # In memory. The lock is held.

    def _recall(self, key: str) -> Arrays | None:
        if key not in self._kept:
            return None
        if self._old(self._kept[key][0]):
            self._forget(key)
            return None
        self._kept.move_to_end(key)
        return self._kept[key][1]

    def _keep(self, key: str, written: float, arrays: Arrays) -> None:
        size = _size(arrays)
        if key in self._kept:
            self._forget(key)
        if size > self.memory / SHARE:
            return
        self._kept[key] = written, arrays
        self._held += size
        while self._held > self.memory:
            self._forget(next(iter(self._kept)))

    def _forget(self, key: str) -> None:
        self._held -= _size(self._kept.pop(key)[1])

    def _old(self, written: float) -> bool:
        return not -SKEW <= time.time() - written <= self.age

    # On disk.

    def _open(self) -> None:
        try:
            with contextlib.suppress(FileExistsError):
                self.folder.mkdir(parents=True, mode=0o700)
            found = os.stat(self.folder)
            if not stat.S_ISDIR(found.st_mode):
                self._give_up("it is not a folder")
            elif found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022:
                self._give_up("others may write there; give a folder of your own (chmod 700)")
            else:
                os.listdir(self.folder)
        except OSError as error:
            self._give_up(error.strerror or str(error))

    def _give_up(self, why: str) -> None:
        """Goes on without the folder, and says so once."""
        if self._stop_writing(why):
            self.folder = None

    def _stop_writing(self, why: str) -> bool:
        """Goes on with what is in the folder, and says so once."""
        with self._lock:
            first, self._writes = self._writes, False
        if first:
            log.warning("nothing more is kept in %s: %s", self.folder, why)
        return first

    def _path(self, key: str) -> Path | None:
        folder = self.folder  # another thread may give up meanwhile
        return None if folder is None else folder / f"{key}.arrays"

    def _read(self, key: str) -> tuple[float, Arrays] | None:
        """When an entry was written, and its arrays, if it is there and whole."""
        path = self._path(key)
        if path is None:
            return None
        try:
            # A link or a pipe is none of ours.
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(fd, "rb") as file:
                about = os.fstat(fd)
                if not stat.S_ISREG(about.st_mode) or about.st_size > self.disk:
                    return self._drop(path)
                if self._old(about.st_mtime):
                    path.unlink(missing_ok=True)
                    return None
                data = file.read()
                with contextlib.suppress(OSError):
                    os.utime(fd, ns=(time.time_ns(), about.st_mtime_ns))
            return about.st_mtime, unpack(key, data)
        except OSError:  # not there, or not to be read just now
            return None
        except InputError:
            return self._drop(path)

    def _drop(self, path: Path) -> None:
        # It may be that another process has put a whole one there by now: then that is made again, too.
        self.counts.damaged += 1
        with contextlib.suppress(OSError):
            path.unlink()

    def _write(self, key: str, arrays: Arrays) -> None:
        path = self._path(key)
        data = pack(key, arrays)
        if path is None or not self._writes:
            return
        if len(data) > self.disk / SHARE:
            if not self._told:
                self._told = True
                most = f"of more than an eighth of {self.disk:,} bytes"
                log.warning("entries %s are not kept in %s: this one has %s", most, self.folder, f"{len(data):,}")
            return
        temporary = path.with_name(f".{key}.{secrets.token_hex(8)}.tmp")
        try:
            with self._lock:
                self._unseen += len(data)
                due = self._unseen > self.disk / 32
            if due:
                self._sweep(len(data))
            try:
                # Not synced: a file that a power cut spoils is told by its SHA-256, and syncing would cost more than
                # making most entries again.
                with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                    file.write(data)
                os.replace(temporary, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise
        except FileNotFoundError:
            # The folder was removed, or another process took this one for dead.
            if not path.parent.is_dir():
                self._stop_writing("it is gone")
        except OSError as error:
            self._stop_writing(error.strerror or str(error))

    def _sweep(self, room: int) -> None:
        """Removes what is too old or was left behind, and then what was not used for longest, until there is room."""
        now, files, total = time.time(), [], 0
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):  # others sweep as well
                    about = entry.stat(follow_symlinks=False)
                    if WRITING.fullmatch(entry.name):
                        left = not -SKEW <= now - about.st_mtime <= STALE
                    elif ENTRY.fullmatch(entry.name):
                        left = self._old(about.st_mtime)
                        if not left:
                            files.append((about.st_atime_ns, about.st_size, entry.path))
                    else:
                        continue  # not ours
                    if left:
                        self._remove(entry.path)
                    else:
                        total += about.st_size
        for _, size, path in sorted(files):
            if total + room <= FULL * self.disk:
                break
            self._remove(path)
            total -= size
        with self._lock:
            self._unseen = room

    def _remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
            self.counts.swept += 1


def _check(key: str) -> None:
    if not KEY.fullmatch(key):
        raise InputError(f"the key {key[:80]!r} is not 64 hexadecimal digits; use core.fingerprint")


def _size(arrays: Arrays) -> int:
    return sum(x.nbytes for x in arrays.values())
