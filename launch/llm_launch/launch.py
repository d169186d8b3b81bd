"""``llm-parallel launch``: a run that survives failures, on this machine or on the nodes of a SLURM job."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llm_launch import wire
from llm_launch.controller import Controller
from llm_parallel.config.tree import RunConfig
from llm_parallel.errors import UserError

LOOPBACK = "127.0.0.1"


@dataclass
class LocalAgents:
    """Agents on this machine: one, or several that play nodes. A dead one is started again."""

    config: RunConfig
    run_file: Path
    devices: dict[str, list[int]]
    secret: str
    environment: Mapping[str, str]
    port: int = 0
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    ended: bool = False

    def start(self, node: str) -> None:
        """Starts the agent of ``node``; one that still runs, cut off, is ended first."""
        if self.ended:
            return
        old = self.processes.get(node)
        if old is not None:
            old.kill()
            old.wait()
        elastic = self.config.elastic
        arguments = {
            "controller": f"{LOOPBACK}:{self.port}",
            "node": node,
            "host": LOOPBACK,
            "devices": ",".join(map(str, self.devices[node])),
            "run-dir": self.config.run_dir,
            "run-file": str(self.run_file),
            "replica-dir": elastic.replica_dir,
            "heartbeat-s": str(elastic.heartbeat_s),
            "lost-after-s": str(elastic.lost_after_s),
        }
        self.processes[node] = subprocess.Popen(
            [sys.executable, "-m", "llm_launch.agent", "--die-with-parent"]
            + [part for name, value in arguments.items() for part in (f"--{name}", value)],
            env={**self.environment, "LLM_PARALLEL_SECRET": self.secret},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def end(self) -> None:
        """Waits for agents that were told to end, and ends those that do not."""
        self.ended = True
        for process in self.processes.values():
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def launch_elastic(
    config: RunConfig,
    run_file: Path,
    devices: dict[str, list[int]],
    environment: Mapping[str, str],
    device: Literal["cpu", "cuda"],
) -> int:
    """Runs the training of ``run_file`` on the devices of each (local) node; the exit status.

    0: finished, or saved on SIGTERM or at the time limit; 2: a mistake of the user; 1: any other end.
    """
    if not devices or not all(devices.values()):
        raise UserError("there is no device to train on; give --processes 1 or more")
    secret = environment.get("LLM_PARALLEL_SECRET") or wire.new_secret()
    agents = LocalAgents(config, run_file, devices, secret, environment)
    expected = {name: len(indices) for name, indices in devices.items()}
    return asyncio.run(_control(config, agents, expected, device))


async def _control(
    config: RunConfig, agents: LocalAgents, expected: dict[str, int], device: Literal["cpu", "cuda"]
) -> int:
    controller = Controller(config, Path(config.run_dir), agents.secret, expected, agents.start, device)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            loop.add_signal_handler(number, controller.stop)
    agents.port = await controller.listen(LOOPBACK)
    try:
        for name in agents.devices:
            agents.start(name)
        return await controller.run()
    finally:
        await asyncio.to_thread(agents.end)


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
