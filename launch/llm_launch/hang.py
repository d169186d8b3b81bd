"""Who hangs when all wait, and which device is slow: pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from llm_launch.blame import Device, Evidence, Kind
from llm_launch.members import Worker

CONSECUTIVE = 3


def find_hung(members: Sequence[Device], looks: Mapping[Device, Mapping[str, Any]]) -> dict[Device, str]:
    """Devices that hold the others up, with the reason.

    looks: answers of their control threads: stack of the main thread, and collectives entered so far by group. A
    process that does not answer is stopped as a whole. Of those that answer, one that has entered fewer collectives of
    a group than its peers is missing in the next one.
    """
    silent = [device for device in members if device not in looks]
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
    # Who waits inside a collective for somebody else may itself be missing elsewhere; who does not wait is the cause.
    causes = {device: why for device, why in behind.items() if not _waits(looks[device]["stack"])}
    return causes or behind or dict.fromkeys(members, "makes no progress, as all others")


def _waits(stack: str) -> bool:
    return any(name in stack for name in ("distributed_c10d.py", "_wait", "work.wait", "p2p_communication"))


def find_slow(members: Sequence[Worker], slow: dict[Device, int], ratio: float, world_size: int) -> list[Evidence]:
    """Devices whose probe took ``ratio`` times the median of all, several times in a row. ``slow`` counts.

    A device is only given up if the others alone are faster: with n devices that wait for one which takes r times as
    long, that is r > n / (n - 1).
    """
    probes = {worker.device: worker.probe_s for worker in members if worker.probe_s > 0}
    if len(probes) < max(2, len(members)) or len(members) < world_size:
        return []
    median = statistics.median(probes.values())
    found = []
    for worker in members:
        if worker.probe_s == worker.judged_probe_s:
            continue
        worker.judged_probe_s = worker.probe_s
        if worker.probe_s > ratio * median and worker.probe_s / median > world_size / (world_size - 1):
            slow[worker.device] = slow.get(worker.device, 0) + 1
        else:
            slow.pop(worker.device, None)
        if slow.get(worker.device, 0) >= CONSECUTIVE:
            del slow[worker.device]
            text = f"its probe takes {worker.probe_s / median:.1f} times the median of {len(probes)} devices"
            found.append(Evidence(Kind.SLOW, worker.device.node, worker.device, message=text))
    return found
