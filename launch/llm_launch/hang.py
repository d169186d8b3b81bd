"""Finds the worker that all others wait for, and devices that are slow, from what workers report (pure)."""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llm_launch.blame import Device, Evidence, Kind
from llm_launch.roster import Worker

CONSECUTIVE = 3
FILE_CODE = tuple(
    f"/llm_parallel/{name}" for name in ("jsonlines.py", "metrics/", "data/loader.py", "checkpoint/store.py")
)
"""Modules in which the main thread waits for nothing but files."""


def find_hung(devices: Sequence[Device], looks: Mapping[Device, Mapping[str, Any]]) -> dict[Device, str]:
    """Devices that hold the others up, with the reason.

    looks: answers of their control threads: stack of the main thread, and collectives entered so far by group. A
    process that does not answer is stopped as a whole. Of those that answer, one that has entered fewer collectives of
    a group than its peers is missing in the next one.
    """
    silent = [device for device in devices if device not in looks]
    if silent:
        return dict.fromkeys(silent, "does not answer, and makes no progress")
    behind: dict[Device, str] = {}
    groups = {name for look in looks.values() for name in look["collectives"]}
    for name in sorted(groups):
        counts = {device: look["collectives"][name] for device, look in looks.items() if name in look["collectives"]}
        most = max(counts.values())
        for device, count in counts.items():
            if count < most:
                behind.setdefault(device, f"is missing in collective {most} of group {name}, having entered {count}")
    # A worker that waits in one collective may be missing in another; the cause is one that does not wait.
    causes = {device: why for device, why in behind.items() if not _waits(looks[device]["stack"])}
    return causes or behind or dict.fromkeys(devices, "makes no progress, as all others")


def kind_of_hang(look: Mapping[str, Any]) -> Kind:
    """Whether a process that holds the others up tells of its device, by the last look at it.

    It does not where the process was stopped from outside, by a signal or a debugger, and where it answers that its
    device has done all that it was given: then it is the program that stands still. Who does not answer may do so
    because its device's driver does not.
    """
    return Kind.STALL if look.get("state") in ("T", "t") or look.get("idle") else Kind.HANG


def waits_for_files(looks: Iterable[tuple[Device, Mapping[str, Any]]]) -> list[Device]:
    """Devices whose process stands in reading or writing files at some look, while the others wait for it: a shared
    file system that stalls is no device's fault, and another process would wait as long."""
    found = [device for device, look in looks if any(name in look.get("stack", "") for name in FILE_CODE)]
    return list(dict.fromkeys(found))


def _waits(stack: str) -> bool:
    return any(name in stack for name in ("distributed_c10d.py", "_wait", "work.wait", "p2p_communication"))


def find_slow(workers: Sequence[Worker], slow: dict[Device, int], ratio: float, whole_replicas: bool) -> list[Evidence]:
    """Devices that were slow several times in a row: their probe took ``ratio`` times the median of all, or their part
    of a step that of the others. ``slow`` counts.

    A step's own part tells of what a short probe misses: a throttled process, slow reading, a busy host. It is compared
    where each device is a whole replica (``whole_replicas``): others wait for each other inside theirs, too. A device
    is only given up if the others alone are faster: with n devices that wait for one which takes r times as long, that
    is r > n / (n - 1).
    """
    probes = {worker.device: worker.probe_s for worker in workers if worker.probe_s > 0}
    if len(probes) < max(2, len(workers)):
        return []
    own = sorted(worker.own_s for worker in workers if worker.own_s > 0) if whole_replicas else []
    median, worth = statistics.median(probes.values()), len(workers) / (len(workers) - 1)
    found = []
    for worker in workers:
        if worker.probe_s == worker.judged_probe_s:
            continue
        worker.judged_probe_s = worker.probe_s
        by_probe = worker.probe_s / median
        by_steps = worker.own_s / _median_of_others(own, worker.own_s) if len(own) > 1 else 0.0
        if max(by_probe, by_steps) > max(ratio, worth):
            slow[worker.device] = slow.get(worker.device, 0) + 1
        else:
            slow.pop(worker.device, None)
        if slow.get(worker.device, 0) >= CONSECUTIVE:
            del slow[worker.device]
            text = f"its probe takes {by_probe:.1f} times the median of {len(probes)} devices"
            if by_steps > by_probe:
                text = f"its part of a step takes {by_steps:.1f} times that of {len(own) - 1} other replicas"
            found.append(Evidence(Kind.SLOW, worker.device.node, worker.device, message=text))
    return found


def _median_of_others(ordered: Sequence[float], value: float) -> float:
    """Median of sorted numbers without one that is ``value``; sorting again for each of thousands would be slow."""
    if not value:
        return statistics.median(ordered)
    at, count = bisect_left(ordered, value), len(ordered) - 1
    low, high = (ordered[k + (k >= at)] for k in ((count - 1) // 2, count // 2))
    return (low + high) / 2
