"""What each worker of a generation is told: its rank, its layout, and where its state comes from."""

from __future__ import annotations

from collections.abc import Sequence

from llm_launch.copy_catalog import CopyCatalog, Restore
from llm_launch.fleet import Fleet


def assign(
    fleet: Fleet, copies: CopyCatalog, restore: Restore | None, elapsed_s: float, believe: Sequence[int]
) -> None:
    """Sends the assignments of the generation that ``fleet`` has begun. restore: where memory copies of its state are;
    elapsed_s: seconds since the launcher's start; believe: steps whose loss is not finite on any device."""
    placement = fleet.placement
    assert placement is not None
    names = list(dict.fromkeys(device.node for device in placement.devices))
    after = {name: fleet.roster.nodes[following] for name, following in zip(names, names[1:] + names[:1])}
    sources = copies.sources(restore, placement)
    for rank, device in enumerate(placement.devices):
        node = fleet.roster.nodes[device.node]
        worker = node.workers[device.number]
        worker.begin(fleet.generation)
        worker.partner = after[device.node].name if len(names) > 1 else None
        node.send(
            {
                "is": "assign",
                "device": device.number,
                "number": worker.number,
                "generation": fleet.generation,
                "rank": rank,
                "world_size": placement.layout.world_size,
                "local_rank": device.number,
                "overrides": list(placement.overrides),
                "restore": sources[rank],
                "here": list(node.copies_address),
                "partner": list(after[device.node].copies_address) if len(names) > 1 else None,
                "elapsed_s": elapsed_s,
                "origin": copies.origin(placement),
                "believe": list(believe),
            }
        )
