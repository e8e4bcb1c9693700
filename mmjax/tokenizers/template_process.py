"""The process in which a chat template is rendered, from outside: asked over pipes, ended when it takes too long."""

import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmjax.core.errors import InputError

WORKER = Path(__file__).with_name("template_worker.py")
KEPT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TZ")  # of the environment, in which there may be secrets
CHUNK = 2**16
BYTES = 8  # of JSON for a character, with room to spare
START = 60.0  # seconds in which Python must start, however busy the machine


@dataclass(frozen=True)
class Limits:
    """What a template may take: seconds for a document, bytes of memory, characters of each rendering.

    Memory is limited by the operating system (`resource`, so not on Windows; macOS does not keep to it).
    """

    seconds: float = 5.0
    memory: int = 2**29
    characters: int = 2**22

    def __post_init__(self):
        if not self.seconds > 0 or self.memory < 2**24 or self.characters < 1:
            raise InputError(f"{self} admits no rendering; give some seconds, characters, and at least 16 MiB.")


LIMITS = Limits()


@dataclass(frozen=True)
class About:
    """What a template says: the strings it compares with, the names it asks objects for, whether it has the tag."""

    strings: tuple[str, ...]
    names: frozenset[str]
    generation: bool


class Process:
    """Renders one template; started when it is first asked, and again after it was ended.

    One rendering at a time, from any thread. A forked process starts its own.
    """

    def __init__(self, source: str, limits: Limits = LIMITS):
        self.source, self.limits = source, limits
        self._forget()
        _all.add(self)

    def _forget(self) -> None:
        self._lock, self._running, self._about = threading.Lock(), None, None

    @property
    def about(self) -> About:
        """InputError if the template cannot be read."""
        with self._lock:
            if self._about is None:
                self._start()
            return self._about

    def render(self, sets: Sequence[dict[str, Any]], jobs: Sequence[tuple[int, int, bool, tuple[str, str]]]) -> list:
        """Renderings, one for each job: (which set of messages and variables, how many messages, prompt, marks).

        None for one with marks that the template refuses.

        Raises:
          InputError: the template fails, or takes more than its limits; the next call works again.
        """
        with self._lock:
            if self._running is None or self._running.poll() is not None:
                self._start()
            return self._ask({"sets": sets, "jobs": jobs}, self.limits.seconds, len(jobs))["texts"]

    def end(self) -> None:
        with self._lock:
            self._end()

    @property
    def pid(self) -> int | None:
        """Of the process, where one runs."""
        return self._running.pid if self._running else None

    def _start(self) -> None:
        self._end()
        self._running = subprocess.Popen(
            [sys.executable, "-I", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={name: os.environ[name] for name in KEPT if name in os.environ},
            start_new_session=True,  # Ctrl-C is for the program, which may want to render on until it has saved
        )
        os.set_blocking(self._running.stdin.fileno(), False)
        self._finalizer = weakref.finalize(self, _stop, self._running)
        first = {
            "path": [path for path in sys.path if os.path.isabs(path)],
            "memory": self.limits.memory,
            "characters": self.limits.characters,
            "seconds": self.limits.seconds,
        }
        self._ask(first, START, 1)
        try:
            said = self._ask({"source": self.source}, self.limits.seconds, 1)
        except InputError:
            self._end()
            raise
        self._about = About(tuple(said["strings"]), frozenset(said["names"]), said["generation"])

    def _end(self) -> None:
        if self._running is not None:
            self._finalizer()
            self._running = None

    def _ask(self, question: dict, seconds: float, answers: int) -> dict:
        """The worker's answer; whatever goes wrong, the worker is either ready for the next question or gone."""
        try:
            data = json.dumps(question, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InputError("A text has a lone surrogate, which is not text; decode its source again.") from error
        try:
            line = self._exchange(data + b"\n", seconds, (answers + 1) * BYTES * self.limits.characters + CHUNK)
        except BaseException:  # Ctrl-C too: an answer that nobody waits for would be taken for the next one
            self._end()
            raise
        said = json.loads(line)
        match said.get("error"):
            case None:
                return said
            case "missing":
                raise InputError("Chat templates need jinja2 3.1.6 or newer; pip install 'mmjax[data]'.")
            case "memory":
                self._end()
                raise InputError(
                    f"The chat template takes more than {self.limits.memory:,} bytes of memory; use one that can be "
                    f"trusted, or raise limits.memory."
                )
            case "long":
                raise InputError(
                    f"The chat template writes more than {self.limits.characters:,} characters; use one that can be "
                    f"trusted, or raise limits.characters."
                )
        message = " ".join(said["message"].split()).rstrip(".")
        shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        raise InputError(f"The chat template failed ({shown}); give it the messages and variables that it takes.")

    def _exchange(self, data: bytes, seconds: float, most: int) -> bytes:
        """Writes a line and reads one, within so many seconds and bytes."""
        until = time.monotonic() + seconds
        to, since = self._running.stdin.fileno(), self._running.stdout.fileno()
        rest, got = memoryview(data), bytearray()
        while not got.endswith(b"\n"):
            left = until - time.monotonic()
            # Not select: it takes no number above 1,023.
            poll = select.poll()
            poll.register(since, select.POLLIN)
            if rest:
                poll.register(to, select.POLLOUT)
            ready = dict(poll.poll(max(0, left * 1000)))
            if left <= 0 or not ready:
                raise InputError(
                    f"The chat template took more than {seconds:g} s; use one that can be trusted, or raise "
                    f"limits.seconds."
                )
            try:
                if to in ready:
                    rest = rest[os.write(to, rest[:CHUNK]) :]
                chunk = os.read(since, CHUNK) if since in ready else None
            except BrokenPipeError:
                chunk = b""
            if chunk == b"" or len(got) > most:
                raise InputError(
                    "The chat template ended the process that renders it, so it takes too much time or memory; use "
                    "one that can be trusted."
                )
            got += chunk or b""
        return bytes(got)


def _stop(running: subprocess.Popen) -> None:
    running.kill()
    running.wait()
    running.stdin.close()
    running.stdout.close()


_all: weakref.WeakSet[Process] = weakref.WeakSet()


def _leave() -> None:
    """In a forked process: the workers are the parent's, and must end with it, so their pipes may not stay open."""
    for process in list(_all):
        running = process._running
        if running is not None:
            process._finalizer.detach()
            running.stdin.close()
            running.stdout.close()
            running.returncode = 0  # or Popen would warn of a child that is not this process's
        process._forget()


os.register_at_fork(after_in_child=_leave)
