"""Starts agents: as processes of this machine, or as a step of a SLURM job."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from llm_launch.agent_step import AgentStep
from llm_launch.copy_files import run_folder
from llm_launch.slurm import WORKING_STATES, SlurmError, SlurmJob
from llm_parallel.config.tree import RunConfig
from llm_parallel.errors import UserError

LOOPBACK = "127.0.0.1"
RETRY_S = 10.0
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


@dataclass
class SlurmStarter:
    """One agent on each node of a SLURM job, as a step that outlives the loss of any of them. An agent that is gone is
    started again by a step of its own, as soon as SLURM lets it: at once where only the agent died, when the node is
    back where it crashed."""

    config: RunConfig
    run_file: Path
    job: SlurmJob
    names: list[str]
    devices: list[int]
    secret: str
    host: str
    port: int = 0
    step: AgentStep = field(default_factory=AgentStep)
    steps: list[subprocess.Popen[bytes]] = field(default_factory=list)
    condemned: dict[str, str] = field(default_factory=dict)
    _ended: threading.Event = field(default_factory=threading.Event)
    _waiting: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.copies = copies_name(self.config)

    @property
    def expected(self) -> dict[str, int]:
        """Devices of each node."""
        return {name: len(self.devices) for name in self.names}

    def begin(self, port: int) -> None:
        """Starts one step with an agent on each node."""
        self.port = port
        self._start(self.names)

    def _start(self, names: Sequence[str]) -> subprocess.Popen[bytes]:
        controller = f"{self.host}:{self.port}"
        argv = agent_command(self.config, self.run_file, controller, "auto", "auto", self.devices, self.copies)
        job = SlurmJob(
            self.job.job_id,
            self.job.restart_count,
            self.job.node,
            {**self.job.environment, "LLM_PARALLEL_SECRET": self.secret},
        )
        step = job.start_agents(self.step.command([*argv, "--rescue"]), names, self.step.srun)
        self.steps.append(step)
        return step

    def start(self, node: str) -> None:
        """Starts the agent of ``node`` again, in the background, for as long as SLURM has the node."""
        if node not in self._waiting and node not in self.condemned and not self._ended.is_set():
            self._waiting.add(node)
            threading.Thread(target=self._keep_starting, args=(node,), daemon=True).start()

    def _keep_starting(self, node: str) -> None:
        while not self._ended.is_set():
            began = time.monotonic()
            # SLURM misses a crashed node after half a minute; until then a step on it fails.
            with contextlib.suppress(SlurmError, subprocess.TimeoutExpired):
                if self._usable(node):
                    self._start([node]).wait(RETRY_S)
            if time.monotonic() - began >= RETRY_S:
                break  # the agent runs
            self._ended.wait(RETRY_S - (time.monotonic() - began))
        self._waiting.discard(node)

    def _usable(self, node: str) -> bool:
        return self.job.node_states().get(node, "") in WORKING_STATES

    def condemn(self, node: str, reason: str) -> None:
        """Drains the node, in the background; where that is not permitted it is kept out when the job is requeued."""
        if node not in self.condemned:
            self.condemned[node] = reason
            threading.Thread(target=self.job.drain, args=(node, f"llm-parallel: {reason}"), daemon=True).start()

    def end(self) -> None:
        """Waits for the steps to end, and ends those that do not."""
        self._ended.set()
        deadline = time.monotonic() + END_S
        for step in self.steps:
            try:
                step.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                step.kill()
                step.wait()


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
