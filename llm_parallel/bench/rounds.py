"""Lets the jobs that ``bench step`` measures on a layout take turns, so that only one of them computes at a time.

The ranks of all jobs run at the same time and share one store. A job's turn begins when the previous turn has ended on
all ranks of its job; until then every rank waits for a key in the store, which takes no processor time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

LONGEST = timedelta(days=1)


def order_of_turns(names: Sequence[str], phases: int) -> list[tuple[int, str]]:
    """(phase, job) in the order of the turns; each phase begins with the next job."""
    found = []
    for phase in range(phases):
        first = phase % len(names)
        found += [(phase, name) for name in (*names[first:], *names[:first])]
    return found


class Turns:
    """The turns of one rank. ``phases``: number of steps of each phase, of which the first is the warm-up; ``barrier``:
    waits for all ranks of the job."""

    def __init__(self, store: Any, names: Sequence[str], name: str, phases: Sequence[int], first: bool) -> None:
        self._store, self._first = store, first
        turns = [number for number, turn in enumerate(order_of_turns(names, len(phases))) if turn[1] == name]
        self._waiting = list(zip(turns, phases))
        self._left, self._started, self._used = 0, 0.0, 0.0
        self.barrier: Callable[[], Any] = lambda: None
        self.seconds: list[float] = []
        """Mean wall seconds of a step for each finished phase, from when all ranks began until all had ended."""
        self.processor_seconds: list[float] = []
        """Mean processor seconds of a step on this rank for each finished phase; a busy machine changes them least."""

    def begin(self) -> None:
        """Waits for the next turn, if there is one."""
        if not self._waiting:
            return
        turn, self._left = self._waiting[0]
        if turn > 0:
            self._store.wait([f"turn {turn}"], LONGEST)
        self.barrier()
        self._started, self._used = time.perf_counter(), time.process_time()

    def step_done(self) -> None:
        """Counts a step; after the last step of a phase it lets the next job begin, and waits for this job's next
        turn."""
        self._left -= 1
        if self._left > 0:
            return
        self.barrier()
        turn, steps = self._waiting.pop(0)
        self.seconds.append((time.perf_counter() - self._started) / steps)
        self.processor_seconds.append((time.process_time() - self._used) / steps)
        if self._first:
            self._store.set(f"turn {turn + 1}", "")
        self.begin()


def leave_together(store: Any, processes: int, hosts_store: bool) -> None:
    """On the rank that hosts the store, returns once no process needs it; on the others at once."""
    if store.add("left", 1) == processes:
        store.set("all left", "")
    if hosts_store:
        store.wait(["all left"], LONGEST)
