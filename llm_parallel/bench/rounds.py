"""Turns of the jobs that ``bench step`` measures on a layout, so that only one of them computes at a time.

All ranks of all jobs live at once and share one store. A round of a job begins when the one before has ended on all its
ranks; until then every rank waits for a key of the store, which takes no processor time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

LONGEST = timedelta(days=1)


def order_of_turns(names: Sequence[str], phases: int) -> list[tuple[int, str]]:
    """(phase, job) one after the other; each phase begins with another job than the one before."""
    found = []
    for phase in range(phases):
        first = phase % len(names)
        found += [(phase, name) for name in (*names[first:], *names[:first])]
    return found


class Turns:
    """One rank's view. phases: steps of each, the first is the warm-up; barrier: of the job's ranks."""

    def __init__(self, store: Any, names: Sequence[str], name: str, phases: Sequence[int], first: bool) -> None:
        self._store, self._first = store, first
        turns = [number for number, turn in enumerate(order_of_turns(names, len(phases))) if turn[1] == name]
        self._waiting = list(zip(turns, phases))
        self._left, self._started, self._used = 0, 0.0, 0.0
        self.barrier: Callable[[], Any] = lambda: None
        self.seconds: list[float] = []
        """Wall time of a step, mean of each phase that is over, from when all ranks began until all had ended."""
        self.processor_seconds: list[float] = []
        """Processor time of a step on this rank, mean of each phase: what a busy machine changes least."""

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
        """Counts a step; after the last of a phase the next job has its turn, and this one waits for its own."""
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
    """Returns when nobody needs the store any more, on the rank that hosts it; at once on the others."""
    if store.add("left", 1) == processes:
        store.set("all left", "")
    if hosts_store:
        store.wait(["all left"], LONGEST)
