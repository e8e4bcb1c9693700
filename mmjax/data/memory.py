"""A budget of bytes that threads share, so that large pictures are not decoded side by side until nothing is left."""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from mmjax.core.errors import InputError


class Memory:
    """So many bytes. Who wants some waits until they are free, in the order of asking; so large wants are not starved.

    A thread must not ask for more while it holds some: two of them could wait for each other.
    """

    def __init__(self, size: int = 2**30):
        if size < 1:
            raise InputError(f"A memory budget of {size} bytes holds nothing; give at least 1.")
        self.size, self.taken = size, 0
        self._changed, self._waiting = threading.Condition(), deque()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """So many bytes are the caller's inside. InputError if there are not as many in all."""
        if size > self.size:
            raise InputError(
                f"it takes {size / 2**20:,.0f} MiB to decode, over the budget of {self.size / 2**20:,.0f} MiB; shrink "
                f"it or raise the budget (--packing.memory)."
            )
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                self._changed.wait_for(lambda: self._waiting[0] is ticket and self.taken + size <= self.size)
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
            self.taken += size
        try:
            yield
        finally:
            with self._changed:
                self.taken -= size
                self._changed.notify_all()
