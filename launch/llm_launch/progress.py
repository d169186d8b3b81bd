"""Progress of every worker of a node, in one page of shared memory that workers write and the agent reads.

Writing costs a worker well under a microsecond and no system call, so it happens at every step and micro batch. A
worker that stops writing hangs, wherever that is.
"""

from __future__ import annotations

import mmap
import os
import statistics
import struct
import time
from collections import deque
from dataclasses import dataclass, field

RECORD = struct.Struct("<QQQddddd")
"""generation, step, marks, time of the last mark (CLOCK_MONOTONIC, one for all processes of a machine), seconds of the
last step, seconds of the device probe, time of the last step's end (negative: busy with something longer), seconds of a
micro batch without waiting for other replicas."""
SLOT_BYTES = 64


@dataclass(frozen=True)
class Progress:
    """What one worker wrote last. ``marks`` counts whatever shows that it is alive; ``step`` finished steps."""

    generation: int = 0
    step: int = 0
    marks: int = 0
    marked_s: float = 0.0
    step_s: float = 0.0
    probe_s: float = 0.0
    stepped_s: float = 0.0
    own_s: float = 0.0


class ProgressPage:
    """The page of one node, with a slot for each worker that may exist at once."""

    def __init__(self, fd: int | None = None, slots: int = 64) -> None:
        self.slots = slots
        self.fd = os.memfd_create("progress") if fd is None else fd
        if fd is None:
            os.ftruncate(self.fd, slots * SLOT_BYTES)
        os.set_inheritable(self.fd, True)
        self._page = mmap.mmap(self.fd, slots * SLOT_BYTES)

    def read(self, slot: int) -> Progress:
        """What the worker of ``slot`` wrote last."""
        return Progress(*RECORD.unpack_from(self._page, slot * SLOT_BYTES))

    def write(self, slot: int, progress: Progress) -> None:
        """Replaces the record of ``slot``."""
        RECORD.pack_into(
            self._page,
            slot * SLOT_BYTES,
            progress.generation,
            progress.step,
            progress.marks,
            progress.marked_s,
            progress.step_s,
            progress.probe_s,
            progress.stepped_s,
            progress.own_s,
        )


@dataclass
class Marker:
    """Writes one worker's slot."""

    page: ProgressPage
    slot: int
    generation: int = 0
    step: int = 0
    marks: int = 0
    step_s: float = 0.0
    probe_s: float = 0.0
    stepped_s: float = 0.0
    own_s: float = 0.0

    def begin(self, generation: int, step: int) -> None:
        """A new generation goes on from ``step``."""
        self.generation, self.step, self.step_s, self.stepped_s = generation, step, 0.0, time.monotonic()
        self.mark()

    def mark(self) -> None:
        """Shows that the worker is alive."""
        self.marks += 1
        now = time.monotonic()
        seen = (self.generation, self.step, self.marks, now, self.step_s, self.probe_s, self.stepped_s, self.own_s)
        self.page.write(self.slot, Progress(*seen))

    def busy(self, busy: bool) -> None:
        """Something longer than a step begins or ends; no hang is looked for in between."""
        self.stepped_s = -1.0 if busy else time.monotonic()
        self.mark()

    def stepped(self, step: int) -> None:
        """A step is over."""
        now = time.monotonic()
        self.step, self.step_s, self.stepped_s = step, now - self.stepped_s, now
        self.mark()


@dataclass
class Pace:
    """How long steps take, by robust statistics, and after how long a step without progress is a hang.

    A step may take the median plus ``deviations`` times 1.4826 MAD (Hampel 1974), and at least ``factor`` medians, plus
    ``floor_s``; the first steps after forming, which compile and allocate, get ``first_s``.
    """

    deviations: float = 8.0
    factor: float = 3.0
    floor_s: float = 0.5
    first_s: float = 600.0
    usual_s: float = 0.0
    """Seconds of a step of the layout before, or 0."""
    times_s: deque[float] = field(default_factory=lambda: deque(maxlen=64))

    def add(self, seconds: float) -> None:
        """Takes in the time of one step."""
        self.times_s.append(seconds)

    def median_s(self) -> float:
        """Seconds of a step, before the first one as under the layout before; 0 if nothing is known."""
        return statistics.median(self.times_s) if self.times_s else self.usual_s

    def limit_s(self) -> float:
        """Seconds without progress after which a step counts as hung."""
        if not self.times_s:
            return self.first_s
        if len(self.times_s) < 3:
            return 10 * max(self.times_s) + 2 * self.floor_s
        median = self.median_s()
        spread = 1.4826 * statistics.median(abs(x - median) for x in self.times_s)
        return max(median + self.deviations * spread, self.factor * median) + self.floor_s
