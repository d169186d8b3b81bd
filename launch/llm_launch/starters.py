"""Starts agents: what every starter offers, and agents as processes of this machine. steps.py: those of a SLURM job."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from llm_launch.absence import Absence
from llm_launch.copy_files import run_folder
from llm_parallel.config.tree import RunConfig
from llm_parallel.errors import UserError

LOOPBACK = "127.0.0.1"
END_S = 10.0
MAX_BEATS_PER_S = 1000.0


class AgentStarter(Protocol):
    """Starts agents and ends them. secret: what they prove to know; host: where the controller listens."""

    config: RunConfig
    secret: str
    host: str

    @property
    def expected(self) -> dict[str, int]:
        """Devices of each node that will have an agent."""

    def begin(self, port: int) -> None:
        """Starts them all; the controller listens on ``port``."""

    def start(self, node: str) -> None:
        """Starts the agent of ``node`` again; returns at once."""

    def look(self) -> list[Absence]:
        """Agents that have ended since the last call, and nodes on which none can be started; with no reason where only
        a step that it shared with others has ended."""

    def condemn(self, node: str, reason: str) -> None:
        """No device of ``node`` will be used again; returns at once."""

    def end(self) -> None:
        """Waits for agents that were told to end, and ends those that do not."""


def copies_name(config: RunConfig) -> str:
    """Name of the folder of a run's memory copies. It is read once for a start: the file that it comes from may be
    deleted while the run goes on."""
    return run_folder(Path(config.elastic.replica_dir), Path(config.run_dir)).name


def agent_command(
    config: RunConfig, run_file: Path, controller: str, node: str, host: str, devices: Sequence[int], copies: str
) -> list[str]:
    """Command line of one agent; with ``auto`` for node and host it finds them out itself. ``copies``: name of the
    folder of memory copies."""
    elastic = config.elastic
    arguments = {
        "controller": controller,
        "node": node,
        "host": host,
        "devices": ",".join(map(str, devices)),
        "run-dir": config.run_dir,
        "run-file": str(run_file),
        "replica-dir": elastic.replica_dir,
        "copies": copies,
        "heartbeat-s": str(elastic.heartbeat_s),
        "lost-after-s": str(elastic.lost_after_s),
    }
    flags = [part for name, value in arguments.items() for part in (f"--{name}", value)]
    return [sys.executable, "-m", "llm_launch.agent", *flags]


@dataclass
class LocalStarter:
    """Starts agents on this machine: one, or several that stand for nodes. A dead agent is started again."""

    config: RunConfig
    run_file: Path
    devices: dict[str, list[int]]
    secret: str
    environment: Mapping[str, str]
    host: str = LOOPBACK
    port: int = 0
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    ended: bool = False
    known: set[str] = field(default_factory=set)
    """Nodes of which ``look`` has told that their agent has ended."""

    def __post_init__(self) -> None:
        self.copies = copies_name(self.config)

    @property
    def expected(self) -> dict[str, int]:
        """Devices of each node."""
        return {name: len(indices) for name, indices in self.devices.items()}

    def begin(self, port: int) -> None:
        """Starts them all."""
        self.port = port
        for node in self.devices:
            self.start(node)

    def start(self, node: str) -> None:
        """Starts the agent of ``node``; one that still runs, cut off, is ended first."""
        if self.ended:
            return
        old = self.processes.get(node)
        if old is not None:
            old.kill()
            old.wait()
        command = agent_command(
            self.config, self.run_file, f"{self.host}:{self.port}", node, self.host, self.devices[node], self.copies
        )
        self.processes[node] = subprocess.Popen(
            [*command, "--die-with-parent"],
            env={**self.environment, "LLM_PARALLEL_SECRET": self.secret},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.known.discard(node)

    def look(self) -> list[Absence]:
        """Agents that have ended since the last call."""
        ended = {name: process.returncode for name, process in self.processes.items()
                 if name not in self.known and process.poll() is not None}  # fmt: skip
        self.known.update(ended)
        return [Absence(name, f"its agent ended with {_how(how)}", how < 0, True) for name, how in ended.items()]

    def condemn(self, node: str, reason: str) -> None:
        """Nothing: no scheduler assigns this machine."""

    def end(self) -> None:
        """Waits for agents that were told to end, and ends those that do not."""
        self.ended = True
        for process in self.processes.values():
            try:
                process.wait(timeout=END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _how(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"status {status}; what it said is above"


def paced(config: RunConfig, nodes: int) -> RunConfig:
    """``config`` with at most a thousand heartbeats a second at the controller: above 250 nodes each node sends fewer
    than by default, and ``lost_after_s`` stays the same number of heartbeats."""
    elastic = config.elastic
    heartbeat_s = max(elastic.heartbeat_s, nodes / MAX_BEATS_PER_S)
    lost_after_s = max(elastic.lost_after_s, heartbeat_s * elastic.lost_after_s / elastic.heartbeat_s)
    changed = elastic.model_copy(update={"heartbeat_s": heartbeat_s, "lost_after_s": lost_after_s})
    return config.model_copy(update={"elastic": changed})


def local_nodes(num_devices: int, num_nodes: int) -> dict[str, list[int]]:
    """Devices of this machine dealt to ``num_nodes`` agents, as evenly as can be."""
    if num_nodes > num_devices:
        raise UserError(f"--nodes {num_nodes} is more than the {num_devices} devices; use at most {num_devices}")
    host = os.uname().nodename
    names = [host] if num_nodes == 1 else [f"{host}-{number}" for number in range(num_nodes)]
    dealt: dict[str, list[int]] = {name: [] for name in names}
    for index in range(num_devices):
        dealt[names[index * num_nodes // num_devices]].append(index)
    return dealt
