"""A limit on the time that a function of the user may take."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TimedOut(BaseException):
    """The time is over. It is no ``Exception``, so that a function which catches those does not go on for ever."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises TimedOut in the block after so many seconds of wall time, also while it sleeps or waits for a network. The
    signal SIGALRM does it, which only the main thread can get: in another thread there is no limit. What a library
    computes without returning to Python is interrupted when it returns."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(number: int, frame: FrameType | None) -> None:
        raise TimedOut

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
