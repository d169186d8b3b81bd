"""What the controller knows of nodes and workers."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from llm_launch import wire
from llm_launch.blame import Device
from llm_launch.states import Outcome


@dataclass
class Worker:
    """One process that is ready for work, or at it."""

    device: Device
    pid: int
    number: int = 0
    """The agent's number of the process: a device may have a new one by the time that a message arrives."""
    generation: int = -1
    outcome: Outcome | None = None
    training: bool = False
    killed: bool = False
    copies: bool = True
    """Whether it makes memory copies."""
    partner: str | None = None
    """Node that keeps its second copy; None if there is none."""
    refused: set[str] = field(default_factory=set)
    """Nodes that did not take its second copy."""
    step: int = 0
    age_s: float = 0.0
    probe_s: float = 0.0
    judged_probe_s: float = 0.0
    own_s: float = 0.0

    def begin(self, generation: int) -> None:
        """It has an assignment."""
        assert not self.killed, "a worker whose end is on its way gets no assignment"
        self.generation, self.outcome, self.training, self.copies = generation, None, False, True
        self.partner, self.refused = None, set()
        self.step, self.age_s, self.probe_s, self.own_s = 0, 0.0, 0.0, 0.0


@dataclass
class Node:
    """One agent. ``channel`` is None while it is gone."""

    name: str
    host: str
    devices: tuple[int, ...]
    copies_address: tuple[str, int]
    channel: wire.Channel | None
    pid: int = 0
    heard_s: float = field(default_factory=time.monotonic)
    workers: dict[int, Worker] = field(default_factory=dict)
    warm: bool = False
    """Whether it has had a worker: from then on another is forked in milliseconds; before, it imports for seconds."""
    inventory: list[dict[str, Any]] | None = None
    switches: str = ""
    """Network switches above it from the top down, with points between them, as SLURM knows them."""

    def ready(self) -> dict[int, Worker]:
        """Its workers that can have an assignment, by device. One that the controller had killed cannot, even while
        its agent has not yet reported its end: that would count as a second fault of its device."""
        return {number: worker for number, worker in self.workers.items() if not worker.killed}

    def send(self, message: wire.Message) -> None:
        """To its agent, if it is there."""
        if self.channel is not None:
            self.channel.send(message)


@dataclass
class Roster:
    """All nodes, in the order in which they first joined. ``order``: the names of the nodes that will join, as the
    list of hosts has them."""

    nodes: dict[str, Node] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)

    def join(self, hello: wire.Message, channel: wire.Channel) -> Node:
        """An agent is there, or there again."""
        name = hello["node"]
        old = self.nodes.get(name)
        if old is not None and old.channel is not None:
            old.channel.close()
        node = Node(name, hello["host"], tuple(hello["devices"]), tuple(hello["copies"]), channel, hello["pid"])
        node.switches = hello.get("switches", "")
        self.nodes[name] = node
        return node

    def alive(self) -> list[Node]:
        """Nodes whose agent is connected, those of a switch side by side, in the order of the list of hosts: neighbours
        in it are neighbours in the network more often than those that happen to join one after the other."""
        place = {name: number for number, name in enumerate(self.order)}
        nodes = sorted(self.nodes.values(), key=lambda node: place.get(node.name, len(place)))
        return [node for node in by_switch(nodes) if node.channel is not None]

    def warm(self) -> list[Node]:
        """Those of them whose missing workers will be there in milliseconds."""
        return [node for node in self.alive() if node.warm]

    def worker(self, device: Device) -> Worker | None:
        """The process on a device, if there is one."""
        node = self.nodes.get(device.node)
        return node.workers.get(device.number) if node is not None else None


def by_switch(nodes: list[Node]) -> list[Node]:
    """The nodes with those of a switch side by side, on every level of the network; else in the order given."""
    first: dict[str, int] = {}
    for number, node in enumerate(nodes):
        for above in _levels(node):
            first.setdefault(above, number)
    return sorted(nodes, key=lambda node: [first[above] for above in _levels(node)])


def _levels(node: Node) -> list[str]:
    """The switches above a node, each with those above it: a.b for b."""
    parts = node.switches.split(".") if node.switches else []
    return [".".join(parts[: end + 1]) for end in range(len(parts))]
