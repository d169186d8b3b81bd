"""Listening where strangers can connect: how many connections may wait to authenticate, and what happens when this
process has no descriptor left."""

from __future__ import annotations

import contextlib
import resource
import socket
import threading
from collections import OrderedDict

WAITING = 256
"""Connections that may authenticate at once. One that belongs to the run takes a millisecond for it."""
PAUSE_S = 0.05
"""Pause after the system has refused a connection for want of descriptors."""
CROWDED_S = 0.01
"""Pause after each connection while strangers fill half of the places: a hundred of them a second are let in."""
FILES = 65536


def raise_file_limit() -> None:
    """Lets this process, and those that it starts, open as many files as the system allows, up to ``FILES``."""
    with contextlib.suppress(OSError, ValueError):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = FILES if hard == resource.RLIM_INFINITY else min(hard, FILES)
        if soft == resource.RLIM_INFINITY or soft >= most:
            return
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class Door:
    """Connections that have not authenticated yet. When there are too many, or no descriptor is left, the oldest is
    closed: a stranger who holds a thousand open holds up nobody."""

    def __init__(self, most: int = WAITING) -> None:
        self.most = most
        self._waiting: OrderedDict[int, socket.socket] = OrderedDict()
        self._lock = threading.Lock()
        self.turned_away = 0

    @property
    def crowded(self) -> bool:
        """Whether more than half of the places are taken."""
        return 2 * len(self._waiting) > self.most

    def enter(self, connection: socket.socket) -> int:
        """A new connection; its number."""
        with self._lock:
            number = id(connection)
            self._waiting[number] = connection
        while len(self._waiting) > self.most:
            self.make_room()
        return number

    def leave(self, number: int) -> None:
        """It has authenticated, or is closed."""
        with self._lock:
            self._waiting.pop(number, None)

    def make_room(self) -> None:
        """Turns the oldest away. Its own thread or task sees the end and closes it."""
        with self._lock:
            if not self._waiting:
                return
            _, oldest = self._waiting.popitem(last=False)
            self.turned_away += 1
        with contextlib.suppress(OSError):
            oldest.shutdown(socket.SHUT_RDWR)
