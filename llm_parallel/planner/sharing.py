"""Simulates, event by event, processes that share the cores of one machine.

While k processes can run on c cores, each gets min(1, c / k) of a core, as from a fair scheduler. A process that waits
for another frees its core, so with more stages than cores other stages use the time of a pipeline's bubble.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Op:
    """One operation in a process's program."""

    work_s: float
    """Seconds that it takes on a core that works alone."""
    kind: str
    """What its time is counted as."""
    group: tuple[int, ...] = ()
    """Ranks that begin and end it together; empty if it is of this process alone."""
    needs: Hashable = None
    """It begins only after this has been given; None: at once."""
    gives: Hashable = None
    """What is given at its end."""


@dataclass
class _Process:
    program: Sequence[Op]
    at: int = 0
    left_s: float = 0.0
    running: bool = False
    spent: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def op(self) -> Op | None:
        """The operation that is next or running; None after the last."""
        return self.program[self.at] if self.at < len(self.program) else None


IDLE = "idle"
"""The kind that counts waiting for another process's ``gives``, and for the end of the step."""


def share_cores(programs: Sequence[Sequence[Op]], cores: int, crowded: float = 1.0) -> tuple[float, dict[str, float]]:
    """Seconds until all programs have ended, and how they divide by kind: the mean over processes of the time spent in
    operations of that kind, including the wait for a core or for other members of the group.

    ``crowded``: speed of a core while all of them work, relative to one that works alone, since caches and memory
    bandwidth are shared."""
    processes = [_Process(program) for program in programs]
    given: set[Hashable] = {None}
    now = 0.0
    while any(process.op is not None for process in processes):
        _start(processes, given)
        running = [process for process in processes if process.running]
        assert running, "every process waits for another"
        rate = min(1.0, cores / len(running))
        if len(running) >= cores > 1:
            rate *= crowded
        passed = min(process.left_s for process in running) / rate
        for process in processes:
            op = process.op
            waits = op is None or (not process.running and op.needs not in given)
            process.spent[IDLE if op is None or waits else op.kind] += passed
            if process.running:
                process.left_s -= passed * rate
        now += passed
        _finish(processes, given)
    kinds = {kind for process in processes for kind in process.spent}
    return now, {kind: sum(process.spent[kind] for process in processes) / len(processes) for kind in kinds}


def _start(processes: Sequence[_Process], given: set[Hashable]) -> None:
    """Starts every operation that need not wait."""
    for process in processes:
        op = process.op
        if op is None or process.running or process.left_s < 0 or op.needs not in given:
            continue
        if all(_arrived(processes[rank], op, given) for rank in op.group):
            for member in [processes[rank] for rank in op.group] or [process]:
                assert member.op is not None
                member.running, member.left_s = True, member.op.work_s


def _arrived(process: _Process, op: Op, given: set[Hashable]) -> bool:
    there = process.op
    return there is not None and there.group == op.group and there.needs in given and not process.running


def _finish(processes: Sequence[_Process], given: set[Hashable]) -> None:
    """Ends every operation without work left; the members of a group end theirs together."""
    for process in processes:
        if process.running and process.left_s <= 1e-12:
            process.running, process.left_s = False, -1.0
    for process in processes:
        op = process.op
        if op is None or process.left_s >= 0:
            continue
        members = [processes[rank] for rank in op.group] or [process]
        if all(member.left_s < 0 for member in members):
            for member in members:
                assert member.op is not None
                given.add(member.op.gives)
                member.at += 1
                member.left_s = 0.0
