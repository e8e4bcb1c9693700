"""Watching a run from inside: what XLA compiles, and whether somebody asks it to stop."""

import os
import signal
from types import FrameType

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"


class Compiles:
    """Counts programs that XLA compiles (or loads from its cache) from now on, and the seconds it takes."""

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0
        if not _counters:
            jax.monitoring.register_event_duration_secs_listener(_on_event)
        _counters.append(self)


_counters: list[Compiles] = []  # JAX has no way to take a listener back: one serves them all


def _on_event(event: str, seconds: float, **_: object) -> None:
    if event == _COMPILED:
        for counter in _counters:
            counter.count += 1
            counter.seconds += seconds


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a request; the second ends the process at once, as it does without us.

    `status` is the exit status to end with (130 or 143), None while nobody asked.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)
    STATUSES = tuple(128 + s for s in SIGNALS)

    def __enter__(self) -> "StopRequest":
        self.status: int | None = None
        self.before = {s: signal.signal(s, self._handle) for s in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.status = 128 + number
        for s in self.SIGNALS:
            signal.signal(s, signal.SIG_DFL)
        # os.write, not print: a handler may run in the middle of a print.
        os.write(2, b"\nmmjax: stopping after this step, with a checkpoint; once more to stop at once\n")
