"""Notices that a process makes no progress, as where a collective or a device hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Watchdog:
    """Calls ``expired`` once, in a thread of its own, when ``tick`` has not been called for ``limit_s`` seconds. It
    watches inside a ``with``."""

    def __init__(
        self, limit_s: float, expired: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limit_s, self._expired, self._clock = limit_s, expired, clock
        self._last = clock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def tick(self) -> None:
        """Says that there is progress."""
        self._last = self._clock()

    def left_s(self) -> float:
        """Seconds until it expires."""
        return self._last + self.limit_s - self._clock()

    def __enter__(self) -> Watchdog:
        self.tick()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while (left := self.left_s()) > 0:
            if self._ended.wait(left):
                return
        if not self._ended.is_set():
            self._expired()
