"""Which memory copies the nodes hold, which of them a new generation starts from, and which are removed. At most two
generations' copies are in memory at once, however many recoveries fail in a row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_launch.fleet import Fleet
from llm_launch.journal import Journal
from llm_launch.placement import Placement, Trained, other_copies, recoverable_step
from llm_launch.states import Phase

ANSWER_S = 1.0
"""Time for the nodes to report which copies they hold."""


@dataclass(frozen=True)
class Restore:
    """A step that memory holds. holders: by rank of the generation that made it, a node and "own" or "kept"."""

    step: int
    trained: Trained
    holders: Mapping[int, tuple[str, str]]


class CopyCatalog:
    """What the controller knows of memory copies. ``model``: fingerprint of what the run trains, on what;
    ``disk_step``: newest step on disk; ``trained``: generations that made copies, those of an earlier start included,
    whose copies may have outlived it."""

    def __init__(self, fleet: Fleet, journal: Journal, model: dict[str, str], disk_step: int) -> None:
        self.fleet, self.journal, self.model, self.disk_step = fleet, journal, model, disk_step
        self.trained: list[Trained] = []
        self._ignored = False
        self._restored: Restore | None = None
        self._distrusted: set[tuple[str, str, int, int]] = set()
        """Node, kind, generation and rank of copies that are damaged or gone."""

    def remember(self, trained: list[Trained], model: Any) -> None:
        """Takes in what an earlier start has noted in the run folder, if it trained the same."""
        if trained and model != self.model:
            self._ignore(model)
            return
        self.trained = trained

    def _ignore(self, model: Any) -> None:
        if not self._ignored:
            self._ignored = True
            self.journal.event("copies_ignored", cause=other_copies(self.model, model))

    def origin(self, placement: Placement) -> dict[str, Any]:
        """What each copy of the present generation says of it. The run folder says it too, unless its disk was full."""
        return {"trained": Trained.of(self.fleet.generation, placement.layout).as_list(), "model": self.model}

    def _learn(self, held: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Takes in generations that nodes hold and the run folder does not name, until this start has formed one."""
        known = {trained.generation for trained in self.trained}
        ignored: Any = None
        for entry in (entry for entries in held.values() for entry in entries):
            self.fleet.generation = max(self.fleet.generation, entry["generation"])  # the next one writes files anew
            origin = entry.get("origin")
            if not origin or entry["generation"] in known:
                continue
            known.add(entry["generation"])
            if origin["model"] == self.model:
                self.trained.append(Trained.read(origin["trained"]))
            else:
                ignored = origin["model"]
        self.trained.sort(key=lambda trained: trained.generation)
        if ignored is not None and not self.trained:
            self._ignore(ignored)

    async def find(self) -> Restore | None:
        """The newest state that memory holds; None if it must come from disk."""
        first = self.fleet.placement is None
        if not first and not self.trained:
            return None
        for node in self.fleet.roster.alive():
            node.inventory = None
            node.send({"is": "inventory"})
        await self.fleet.until(lambda: all(node.inventory is not None for node in self.fleet.roster.alive()), ANSWER_S)
        held = {
            node.name: [entry for entry in node.inventory if self._is_trusted(node.name, entry)]
            for node in self.fleet.roster.alive()
            if node.inventory is not None
        }
        if first:
            self._learn(held)
        for trained in reversed(self.trained):
            found = recoverable_step(trained.world_size, trained.generation, held)
            if found is not None:
                newer = found[0] >= max(self.disk_step, self.fleet.saved_step)
                return Restore(found[0], trained, found[1]) if newer else None
        return None

    def distrust(self, copy: tuple[str, int] | None) -> None:
        """Never again reads a copy from which the last generation could not restore its state, by kind and rank; None:
        any that it was to read."""
        restored = self._restored
        if restored is None:
            return
        for rank, (node, kind) in restored.holders.items():
            if copy is None or copy == (kind, rank):
                self._distrusted.add((node, kind, restored.trained.generation, rank))

    def go_on_from(self, restore: Restore | None) -> None:
        """Fixes what the next generation starts from; all other copies are removed to make room for its own."""
        self._restored = restore
        self._forget_all_but([restore.trained] if restore else [])

    def _is_trusted(self, node: str, entry: Mapping[str, Any]) -> bool:
        return (node, entry["kind"], entry["generation"], entry["rank"]) not in self._distrusted

    def sources(self, restore: Restore | None, placement: Placement) -> list[str | None]:
        """Where each rank of ``placement`` reads its state, as JSON that all ranks with the same part of the model
        share: step, generation, and ``[rank, kind, host, port]`` of every share that it may need."""
        if restore is None:
            return [None] * len(placement.devices)
        groups, needed = restore.trained.needed_by(placement.layout)
        texts = [
            json.dumps(
                {
                    "step": restore.step,
                    "generation": restore.trained.generation,
                    "sources": [self._source(restore.holders[rank], rank) for rank in ranks],
                },
                separators=(",", ":"),
            )
            for ranks in groups
        ]
        return [texts[number] for number in needed]

    def _source(self, holder: tuple[str, str], rank: int) -> Sequence[Any]:
        name, kind = holder
        return [rank, kind, *self.fleet.roster.nodes[name].copies_address]

    def begin(self, placement: Placement) -> None:
        """Notes that the present generation makes copies."""
        self.trained.append(Trained.of(self.fleet.generation, placement.layout))

    def forget_older(self) -> None:
        """Removes copies of older generations when every worker has made a step of the present one and copied it, or
        the disk holds as much."""
        mine = self.trained and self.trained[-1].generation == self.fleet.generation
        if self.fleet.phase is Phase.TRAINING and mine and len(self.trained) > 1:
            workers = self.fleet.workers()
            first = min((worker.step for worker in workers), default=0)
            saved = self.fleet.saved_step > self.journal.resumed_step
            if first > self.journal.resumed_step + 1 and (saved or all(worker.copies for worker in workers)):
                self._forget_all_but(self.trained[-1:])

    def _forget_all_but(self, kept: list[Trained]) -> None:
        self.trained = kept
        for node in self.fleet.roster.alive():
            node.send({"is": "forget", "keep": [trained.generation for trained in kept]})
