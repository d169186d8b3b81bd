"""A process that slows another one down, for drills: ``python -m llm_launch.throttle PID FACTOR``.

A process of its own, at the highest priority it may have: a thread of the process that reads the logs slowed nothing
down where tests kept both cores busy.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

SLICE_S = 0.002
"""Shorter than what a step computes between two collectives."""


def main() -> None:
    """Lets the process run one part in FACTOR of the time until it is gone. On a busy machine a slice lasts longer, and
    so does the pause after it."""
    pid, factor = int(sys.argv[1]), float(sys.argv[2])
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -20)
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.kill(pid, signal.SIGCONT)
            began = time.monotonic()
            time.sleep(SLICE_S)
            ran_s = time.monotonic() - began
            os.kill(pid, signal.SIGSTOP)
            time.sleep(ran_s * (factor - 1))


if __name__ == "__main__":
    main()
