"""The layout of a run on the devices that are left, and the rank of each device: pure, for any number of devices."""

from __future__ import annotations

import hashlib
import json
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

from pydantic import BaseModel

from llm_launch.blame import Device
from llm_parallel.config.problem import divisors
from llm_parallel.config.rules import find_problems
from llm_parallel.config.tree import ParallelConfig, RunConfig
from llm_parallel.parallel.layout import Layout
from llm_parallel.planner.memory import memory
from llm_parallel.planner.shapes import shape_of, strategy_of


@dataclass(frozen=True)
class Placement:
    """A layout and the device of every rank."""

    layout: Layout
    devices: tuple[Device, ...]
    overrides: tuple[str, ...]
    """Fields of the configuration that make the layout."""

    @cached_property
    def ranks(self) -> dict[Device, int]:
        """Rank of every device."""
        return {device: rank for rank, device in enumerate(self.devices)}


@dataclass(frozen=True)
class Trained:
    """A generation whose workers made memory copies. cut: how the model was divided, TP, CP, PP, VPP and the layers of
    the chunks, without the number of replicas."""

    generation: int
    world_size: int
    cut: tuple[int, ...]

    @classmethod
    def of(cls, generation: int, layout: Layout) -> Trained:
        """For a layout."""
        cut = (layout.tp, layout.cp, layout.pp, layout.vpp, *layout.stage_layers)
        return cls(generation, layout.world_size, cut)

    @classmethod
    def read(cls, item: Sequence[Any]) -> Trained:
        """From ``as_list``."""
        return cls(int(item[0]), int(item[1]), tuple(int(size) for size in item[2]))

    def as_list(self) -> list[Any]:
        """For JSON."""
        return [self.generation, self.world_size, list(self.cut)]

    def needed_by(self, layout: Layout) -> tuple[list[list[int]], list[int]]:
        """Groups of ranks of this generation, and for each rank of ``layout`` the number of the group whose copies it
        reads. Where the model is divided as before, those that held the same part of it, so that nobody asks the whole
        job; else all."""
        if Trained.of(0, layout).cut != self.cut:
            return [list(range(self.world_size))], [0] * layout.world_size
        before = replace(layout, dp=self.world_size // (layout.tp * layout.cp * layout.pp))
        groups: list[list[int]] = [[] for _ in range(layout.tp * layout.pp)]
        for rank in range(self.world_size):
            at = before.coordinates(rank)
            groups[at.pp * layout.tp + at.tp].append(rank)
        places = (layout.coordinates(rank) for rank in range(layout.world_size))
        return groups, [at.pp * layout.tp + at.tp for at in places]


def fingerprint(config: RunConfig) -> dict[str, str]:
    """Hashes of model, data and seed: memory copies are restored only into a run with the same ones."""
    dump = partial(BaseModel.model_dump, mode="json")
    parts = {"section model": dump(config.model), "section data": dump(config.data), "seed": config.seed}
    return {name: _hash(part) for name, part in parts.items()}


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=12).hexdigest()


def other_copies(now: Mapping[str, str], then: Any) -> str:
    """Why copies in memory, which were made by a run with the fingerprint ``then``, are not used."""
    differs = [name for name in now if isinstance(then, dict) and then.get(name) != now[name]]
    return (
        f"copies in memory are not used, because the run file has another {' and another '.join(differs) or 'content'} "
        "than when they were made; training goes on from the last checkpoint"
    )


def best_layout(config: RunConfig, num_devices: int, device: Literal["cpu", "cuda"]) -> ParallelConfig | None:
    """The ``parallel`` section to run with on at most ``num_devices``; None if nothing fits.

    Tensor, context and pipeline sizes stay as they are as long as one replica fits, with as many replicas as the run
    file asks for, or fewer. If not even one fits, the legal sizes with the least ``slowest_device_work`` are taken.
    """
    kept = _with_most_replicas(config, config.parallel, num_devices, device)
    if kept is not None:
        return kept
    found = [
        fitting
        for parallel in _other_sizes(config, num_devices)
        if (fitting := _with_most_replicas(config, parallel, num_devices, device)) is not None
    ]
    return min(found, key=lambda parallel: slowest_device_work(config, parallel), default=None)


def _with_most_replicas(
    config: RunConfig, parallel: ParallelConfig, num_devices: int, device: Literal["cpu", "cuda"]
) -> ParallelConfig | None:
    size = parallel.tp * parallel.cp * parallel.pp
    most = min(num_devices // size, config.parallel.dp or num_devices)
    for dp in range(most, 0, -1):
        tried = parallel.model_copy(update={"dp": dp})
        if not find_problems(config.model_copy(update={"parallel": tried}), dp * size, device, uneven=True):
            return tried
    return None


def _other_sizes(config: RunConfig, num_devices: int) -> Iterator[ParallelConfig]:
    layers, heads = config.model.num_layers, config.model.num_attention_heads
    for tp in divisors(heads):
        for pp in range(1, min(layers, num_devices // tp) + 1):
            for cp in divisors(config.parallel.cp):
                if tp * pp * cp <= num_devices:
                    yield config.parallel.model_copy(
                        update={
                            "tp": tp,
                            "pp": pp,
                            "cp": cp,
                            "vpp": 1,
                            "stage_layers": None if layers % pp == 0 else _spread(layers, pp),
                            "sequence_parallel": config.parallel.sequence_parallel if tp > 1 else None,
                        }
                    )


def _spread(layers: int, pp: int) -> tuple[int, ...]:
    """Layers of each stage; where they do not divide evenly, the first stages have one more."""
    return tuple(layers // pp + (stage < layers % pp) for stage in range(pp))


def slowest_device_work(config: RunConfig, parallel: ParallelConfig) -> float:
    """Work per step of the busiest device, in units of one micro batch through the whole model.

    This is a rule for ordering layouts, not a model of step time: planner/steptime.py needs the rates of a chip and of
    its links, which a run file does not name and a launcher does not measure. The rule counts the micro batches of the
    replica with the most, the pipeline's fill and drain, and the layers of the largest stage; each doubling of TP or CP
    adds a tenth for communication.
    """
    layers = config.model.num_layers
    batches = math.ceil(config.train.global_batch_size / config.train.micro_batch_size / (parallel.dp or 1))
    stages = parallel.stage_layers or _spread(layers, parallel.pp)
    fullest = max(stages) / layers
    work = fullest / (parallel.tp * parallel.cp) * (1 + 0.1 * math.log2(parallel.tp * parallel.cp))
    return (batches + parallel.pp - 1) * work


def crowded(config: RunConfig, layout: Layout) -> str | None:
    """What it means for memory that not one replica of the run file's layout fits on the devices that are left; None if
    one does, or the model is divided as finely as it asks for."""
    asked = config.parallel
    parts = asked.tp * asked.pp
    if layout.tp * layout.pp >= parts:
        return None
    return (
        f"no replica of TP {asked.tp} x PP {asked.pp} fits on the devices that are left, so that each holds "
        f"{parts / (layout.tp * layout.pp):.3g} times as much of the model{_predicted(config, layout)}; what fits as "
        f"before are {parts * asked.cp} devices, and elastic.min_devices={parts * asked.cp} lets the run wait for them"
    )


def _predicted(config: RunConfig, layout: Layout) -> str:
    """What a process holds of tensors in the layout and in the run file's, as the planner predicts it."""
    if config.model.vocab_size is None:
        return ""
    asked = strategy_of(config, config.parallel.tp * config.parallel.pp * config.parallel.cp)
    now = replace(
        asked,
        gpus=layout.world_size,
        tp=layout.tp,
        pp=layout.pp,
        cp=layout.cp,
        vpp=layout.vpp,
        stage_layers=layout.stage_layers,
        sequence_parallel=layout.sequence_parallel and layout.tp > 1,
    )
    gib = [memory(shape_of(config.model), strategy).total / 2**30 for strategy in (now, asked)]
    return f", by prediction {gib[0]:.3g} GiB of tensors instead of {gib[1]:.3g} GiB"


def as_overrides(parallel: ParallelConfig, before: ParallelConfig) -> tuple[str, ...]:
    """Overrides, as ``section.field=value``, that change ``before`` into ``parallel``."""
    changed = []
    for name in ("dp", "tp", "pp", "vpp", "cp", "sequence_parallel", "stage_layers"):
        value: Any = getattr(parallel, name)
        if value != getattr(before, name):
            text = "null" if value is None else str(list(value) if isinstance(value, tuple) else value)
            changed.append(f"parallel.{name}={text.lower() if isinstance(value, bool) else text}")
    return tuple(changed)


def place(
    config: RunConfig,
    devices: Sequence[Device],
    device: Literal["cpu", "cuda"],
    before: Placement | None = None,
    turn: bool = False,
) -> Placement | None:
    """Layout and ranks for the devices that are left, in the order of their nodes; None if nothing fits.

    Every tensor-parallel group lies in one node where nodes are large enough. Where the layout stays, so do the
    survivors' ranks. ``turn`` moves every tensor-parallel group's work to other devices, to see whether a fault follows
    the device or the work.
    """
    parallel = best_layout(config, len(devices), device)
    if parallel is None:
        return None
    size = parallel.tp * parallel.cp * parallel.pp * (parallel.dp or 1)
    layout = Layout.from_config(config.model_copy(update={"parallel": parallel}), size)
    kept = before.ranks if before is not None and before.layout == layout else {}
    groups = _tensor_groups(layout, devices, kept)
    if turn:
        groups = groups[1:] + groups[:1]
    placed = tuple(item for group in groups for item in group)
    return Placement(layout, placed, as_overrides(parallel, config.parallel))


def _tensor_groups(layout: Layout, devices: Sequence[Device], kept: Mapping[Device, int]) -> list[tuple[Device, ...]]:
    tp = layout.tp
    free: dict[str, list[Device]] = {}
    for item in devices:
        free.setdefault(item.node, []).append(item)
    groups: list[tuple[Device, ...] | None] = [None] * (layout.world_size // tp)
    here_now = set(devices)
    by_rank = {rank: item for item, rank in kept.items() if item in here_now}
    for number in range(len(groups)):
        ranked = [by_rank.get(rank) for rank in range(number * tp, (number + 1) * tp)]
        whole = tuple(item for item in ranked if item is not None)
        if len(whole) == tp:
            groups[number] = whole
            for item in whole:
                free[item.node].remove(item)
    whole_groups = deque(
        tuple(here[start : start + tp]) for here in free.values() for start in range(0, len(here) - tp + 1, tp)
    )
    for number in range(len(groups)):
        if groups[number] is None and whole_groups:
            groups[number] = whole_groups.popleft()
            for item in groups[number] or ():
                free[item.node].remove(item)
    rest = [item for here in free.values() for item in here]
    for number in range(len(groups)):
        if groups[number] is None:  # no node has enough left: this group spans nodes
            groups[number], rest = tuple(rest[:tp]), rest[tp:]
    return [group for group in groups if group is not None]


def recoverable_step(
    world_size: int, generation: int, inventories: Mapping[str, Sequence[Mapping[str, Any]]]
) -> tuple[int, dict[int, tuple[str, str]]] | None:
    """The newest step of which every rank's share is in some living node's memory, and for each rank (node, "own" or
    "kept"). ``inventories``: by node, what ``copy_files.inventory`` found. None if there is no such step."""
    holders: dict[int, dict[int, tuple[str, str]]] = {}
    for node, entries in inventories.items():
        for entry in entries:
            if entry["generation"] != generation or entry["rank"] >= world_size:
                continue
            for step in entry["steps"]:
                at = holders.setdefault(step, {})
                if entry["kind"] == "own" or entry["rank"] not in at:
                    at[entry["rank"]] = (node, entry["kind"])
    whole = [step for step, at in holders.items() if len(at) == world_size]
    return (max(whole), holders[max(whole)]) if whole else None
