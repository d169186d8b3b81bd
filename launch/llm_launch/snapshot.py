"""What elastic.json holds: the state of a run as the controller sees it."""

from __future__ import annotations

import time
from typing import Any

from llm_launch.blame import Device
from llm_launch.fleet import Fleet
from llm_launch.ledger import Ledger
from llm_launch.placement import crowded
from llm_parallel.config.tree import RunConfig


def snapshot(fleet: Fleet, ledger: Ledger, started_s: float, config: RunConfig) -> dict[str, Any]:
    """Phase, step, layout, nodes, what is excluded, and what a layout smaller than the run file's means for memory.
    ``started_s``: monotonic time of the launcher's start."""
    placement, missing = fleet.placement, fleet.attendance.missing
    active = {device.node for device in placement.devices} if placement else set()
    return {
        "state": fleet.phase.value,
        "generation": fleet.generation,
        "step": fleet.step,
        "world_size": placement.layout.world_size if placement else 0,
        "single_copies": sum(worker.copies and worker.partner is None for worker in fleet.workers())
        if placement and len(active) > 1 and fleet.elastic.replicate_every_steps
        else 0,
        "crowded": crowded(config, placement.layout) if placement else None,
        "layout": placement.layout.describe() if placement else "",
        "nodes": [
            {
                "name": node.name,
                "state": "lost" if node.channel is None else ("active" if node.name in active else "spare"),
                "devices": list(node.devices),
                "agent_pid": node.pid,
                "workers": {str(index): worker.pid for index, worker in node.workers.items()},
            }
            for node in fleet.roster.nodes.values()
        ]
        + [
            {"name": name, "state": "not joined", "devices": [], "agent_pid": 0, "workers": {}}
            for name in sorted(missing.keys() - fleet.roster.nodes.keys())
        ],
        "missing": {name: item.absence.reason for name, item in sorted(missing.items())},
        "unfit": [[device.node, device.number, reason] for device, reason in sorted(fleet.unfit.items())],
        "excluded": [
            {"node": device.node, "device": device.number, "reason": reason, "permanent": True}
            for device, reason in ledger.removed.items()
        ],
        "ranks": [list(device) for device in placement.devices] if placement else [],
        "controller": fleet.address,
        "elapsed_s": time.monotonic() - started_s,
    }


def used_up(fleet: Fleet, ledger: Ledger) -> dict[str, str]:
    """Nodes whose every device was removed, with the reason of the first: they are of no more use to anybody."""
    found = {}
    for node in fleet.roster.nodes.values():
        reasons = [ledger.removed.get(Device(node.name, index)) for index in node.devices]
        if all(reasons):
            found[node.name] = str(reasons[0])
    return found
