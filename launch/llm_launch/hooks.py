"""``elastic.on_event``: the user's command, run for one event after the other, whatever it does.

A command that hangs must not pile up, and one that fails must not be silent.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable
from typing import Any

LIMIT_S = 30.0
"""Time for one event; then the command is killed, and whatever it has started."""
MOST = 256
"""Events that wait; further ones are left out."""
CLOSE_S = 10.0


class Hooks:
    """Runs the command in a thread, with the event as JSON on its standard input. say: for people."""

    def __init__(self, command: str, say: Callable[[str], None]) -> None:
        self._command, self._say = command, say
        self._waiting: queue.Queue[dict[str, Any] | None] = queue.Queue(MOST)
        self._troubled = False
        self._left_out = False
        self._thread = threading.Thread(target=self._run, name="on_event", daemon=True)
        self._thread.start()

    def put(self, record: dict[str, Any]) -> None:
        """An event."""
        try:
            self._waiting.put_nowait(record)
        except queue.Full:
            if not self._left_out:
                self._left_out = True
                self._say(f"elastic.on_event is slower than events come; {MOST} wait, and further ones are left out")

    def close(self) -> None:
        """Waits for the events so far, but not for ever."""
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(None)
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while (record := self._waiting.get()) is not None:
            self._left_out = self._left_out and self._waiting.full()
            trouble = self._tell(record)
            if trouble and not self._troubled:
                self._say(f"elastic.on_event {trouble}; the run goes on")
            self._troubled = bool(trouble)

    def _tell(self, record: dict[str, Any]) -> str:
        """What went wrong; empty if nothing did."""
        try:
            process = subprocess.Popen(self._command, shell=True, stdin=subprocess.PIPE, start_new_session=True)
        except OSError as error:
            return f"cannot be started ({error.strerror})"
        try:
            process.communicate(json.dumps(record).encode(), timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return f"took longer than {LIMIT_S:g} s for the event {record['event']!r} and was ended"
        return f"ended with status {process.returncode}" if process.returncode else ""
