"""Whether the processes of a run grow while faults go on: memory, open files and threads, by what a process is."""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from llm_launch.copy_files import run_folder
from llm_launch.live_run import LiveRun
from llm_parallel.config.tree import ElasticConfig

EVERY_S = 5.0
"""Time between looks: reading the memory maps of a dozen processes takes tens of milliseconds."""
FIRST, LAST = (0.1, 0.3), (0.8, 1.0)
"""Windows of a soak's time whose medians are compared; before the first one caches fill."""
FEWEST = 5
"""Looks in each window without which nothing is said."""
MORE_MEMORY, MORE_MIB = 0.10, 16.0
MORE_COUNTED = 4.0
FORKED = {"agent", "zygote", "worker"}
AMOUNTS = ("pss_mib", "uss_mib", "files", "threads")


@dataclass(frozen=True)
class Look:
    """What one kind of process had at one moment: means over its processes."""

    at_s: float
    """Seconds since the soak began."""
    role: str
    processes: int
    pss_mib: float
    uss_mib: float
    files: float
    threads: float


@dataclass(frozen=True)
class Change:
    """One amount of one kind of process in the first window and in the last."""

    role: str
    amount: str
    first: float
    last: float

    @property
    def bound(self) -> float:
        """The most that the last may be: a tenth and 16 MiB of memory more, four files, threads or processes more."""
        if self.amount.endswith("_mib"):
            return self.first * (1.0 + MORE_MEMORY) + MORE_MIB
        return self.first + MORE_COUNTED

    def __str__(self) -> str:
        return f"{self.role} {self.amount} {self.first:.1f} -> {self.last:.1f} (at most {self.bound:.1f})"


def changes(looks: Sequence[Look], seconds: float) -> list[Change]:
    """Medians over the first window and the last of ``seconds``; nothing for a role that was seen too seldom.

    Memory, files and threads are compared between moments in which all processes were there: pages that a zygote shares
    with its workers are its own alone while they are missing, and a worker has connections to those that are there.
    """
    whole, found = _whole(looks), list[Change]()
    for role in dict.fromkeys(look.role for look in looks):
        for amount in ("processes", *AMOUNTS):
            counted = [look for look in looks if look.role == role and (amount == "processes" or look.at_s in whole)]
            first, last = (
                [getattr(look, amount) for look in counted if low * seconds <= look.at_s <= high * seconds]
                for low, high in (FIRST, LAST)
            )
            if min(len(first), len(last)) >= FEWEST:
                found.append(Change(role, amount, statistics.median(first), statistics.median(last)))
    return found


def _whole(looks: Sequence[Look]) -> set[float]:
    """Moments in which as many agents, zygotes and workers were there as ever."""
    most: dict[str, int] = {}
    for look in looks:
        most[look.role] = max(most.get(look.role, 0), look.processes)
    missing = {look.at_s for look in looks if look.role in FORKED and look.processes < most[look.role]}
    here: dict[float, set[str]] = {}
    for look in looks:
        here.setdefault(look.at_s, set()).add(look.role)
    return {at for at, roles in here.items() if roles >= FORKED & most.keys()} - missing


class GrowthWatch:
    """Looks at the processes of a run every ``EVERY_S``, and keeps what it sees in the run folder's growth.jsonl."""

    def __init__(self, run: LiveRun) -> None:
        self.run, self.looks = run, list[Look]()
        self._began_s = self._last_s = time.monotonic()

    def look_if_due(self) -> None:
        """Looks once if the last time is long enough ago."""
        now = time.monotonic()
        if now - self._last_s < EVERY_S:
            return
        self._last_s = now
        found = look_at(self.run, now - self._began_s)
        self.looks += found
        with contextlib.suppress(OSError), (self.run.run_dir / "growth.jsonl").open("a") as file:
            file.writelines(json.dumps(asdict(look)) + "\n" for look in found)


def look_at(run: LiveRun, at_s: float) -> list[Look]:
    """The launcher, its agents, their zygotes, the workers and whatever else belongs to the run, and its copies."""
    by_role: dict[str, list[tuple[float, ...]]] = {}
    with contextlib.suppress(psutil.Error):
        launcher = psutil.Process(run.process.pid)
        level, depth = [launcher], 0
        while level:
            role = ("launcher", "agent", "zygote", "worker")[depth] if depth < 4 else "below a worker"
            for process in level:
                with contextlib.suppress(psutil.Error, OSError, ValueError, KeyError):  # it has ended
                    amounts = _amounts(process.pid)
                    by_role.setdefault(role, []).append(amounts)
            level, depth = [child for process in level for child in _children(process)], depth + 1
    looks = [
        Look(at_s, role, len(rows), *(statistics.mean(column) for column in zip(*rows, strict=True)))
        for role, rows in by_role.items()
    ]
    sizes = _sizes(run_folder(Path(ElasticConfig().replica_dir), run.run_dir))
    return [*looks, Look(at_s, "memory copies", 0, sum(sizes) / 2**20, 0.0, float(len(sizes)), 0.0)]


def _children(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return process.children()
    return []


def _sizes(folder: Path) -> list[int]:
    found = []
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            found.append(path.lstat().st_size)
    return found


def _amounts(pid: int) -> tuple[float, float, float, float]:
    """PSS and USS in MiB, open files, threads. Raises OSError or ValueError if the process ends meanwhile."""
    kib: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, value = line.partition(":")
        kib[name] = int(value.split()[0])
    uss = kib["Private_Clean"] + kib["Private_Dirty"]
    files, threads = (sum(1 for _ in Path(f"/proc/{pid}/{kind}").iterdir()) for kind in ("fd", "task"))
    return kib["Pss"] / 1024, uss / 1024, float(files), float(threads)
