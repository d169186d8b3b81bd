"""What an agent is told on its command line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_launch.network import own_address
from llm_launch.variables import number_in
from llm_launch.zygote import die_with_parent
from llm_parallel.errors import UserError


@dataclass(frozen=True)
class AgentSettings:
    """What an agent is told on its command line."""

    node: str
    host: str
    """Address of this node for the others."""
    controllers: tuple[tuple[str, int], ...]
    devices: tuple[int, ...]
    run_dir: Path
    run_file: str
    copies_root: Path
    copies_name: str
    """Name of the run's folder in ``copies_root``."""
    heartbeat_s: float
    lost_after_s: float
    secret: str
    rescue: bool = False
    """Whether to put the SLURM job back into the queue when the node of its batch script is dead."""

    @property
    def copies_dir(self) -> Path:
        """This node's folder for memory copies; nodes that share a memory file system have one each."""
        return self.copies_root / self.copies_name / self.node

    @classmethod
    def parse(cls, arguments: Sequence[str] | None = None) -> AgentSettings:
        """From the command line; the run's secret from the environment. With ``--die-with-parent`` the kernel is asked
        to end this process when its parent dies. Raises UserError if there is no secret."""
        parser = argparse.ArgumentParser(prog="llm_launch.agent", description="One agent of a run on this node.")
        for name in ("controller", "node", "host", "devices", "run-dir", "run-file", "replica-dir", "copies"):
            parser.add_argument(f"--{name}", required=True)
        parser.add_argument("--heartbeat-s", type=float, required=True)
        parser.add_argument("--lost-after-s", type=float, required=True)
        parser.add_argument("--die-with-parent", action="store_true")
        parser.add_argument("--rescue", action="store_true")
        told = parser.parse_args(arguments)
        if told.die_with_parent:
            die_with_parent(os.getppid())
        secret = os.environ.get("LLM_PARALLEL_SECRET")
        if not secret:
            raise UserError(
                "LLM_PARALLEL_SECRET is not in this agent's environment; srun must pass the environment on"
                " (--export=ALL)"
            )
        controllers = []
        for text in told.controller.split(","):
            host, _, port = text.rpartition(":")
            controllers.append((host.strip("[]"), int(port)))
        node = told.node
        if node == "auto":
            node = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
        return cls(
            node=node,
            host=own_address(controllers[0]) if told.host == "auto" else told.host,
            controllers=tuple(controllers),
            devices=devices_here([int(device) for device in told.devices.split(",")], os.environ),
            run_dir=Path(told.run_dir),
            run_file=told.run_file,
            copies_root=Path(told.replica_dir),
            copies_name=told.copies,
            heartbeat_s=told.heartbeat_s,
            lost_after_s=told.lost_after_s,
            secret=secret,
            rescue=told.rescue,
        )


def devices_here(devices: Sequence[int], environment: Mapping[str, str]) -> tuple[int, ...]:
    """Those of ``devices`` that this node has: SLURM may have given it fewer GPUs than the node of the batch script."""
    gpus = number_in(environment, "SLURM_GPUS_ON_NODE", 0) if "SLURM_STEP_ID" in environment else 0
    return tuple(device for device in devices if device < gpus) or tuple(devices) if gpus else tuple(devices)
