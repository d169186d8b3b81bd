"""What ``llm-parallel goodput`` is asked; each field's docstring is the help of its option."""

from __future__ import annotations

from dataclasses import dataclass

from llm_parallel.options import option


@dataclass(frozen=True)
class GoodputRequest:
    """The job, what a failure costs it, and the failure rate."""

    gpus: int | None = None
    """GPUs of the job; without it only the table of sizes."""
    profile: str | None = None
    """Fleet whose failure rate is taken: llama3, rsc1, rsc2, opt175b or deck."""
    rate_per_gpu_month: float | None = None
    """Or: failures per GPU and month, in %."""
    detect_s: float = 60.0
    """Seconds until a failure is known."""
    restart_s: float = 300.0
    """Seconds from there until training goes on."""
    write_s: float = option(30.0, name="--checkpoint-write-s")
    """Seconds for which a checkpoint stops training."""
    interval: str = "auto"
    """Seconds between checkpoints, or auto for the best."""
    spares: int | None = None
    """Spare nodes; the best number if not given."""
    policy: str = "restart"
    """Without a spare: restart on the same nodes, wait for repair, or shrink."""
    repair_h: float = 24.0
    """Mean hours until a broken node is back."""
    hardware_share: float | None = None
    """Share of failures that take a node out; the profile's if not given."""
    gpus_per_node: int = 8
    """GPUs of a node."""
    replica_gpus: int | None = None
    """GPUs of one model replica, for shrink; one node's."""
    seed: int = 0
    """Seed of the simulation."""
    out: str | None = None
    """Prefix of the JSON and PNG files."""
    step_s: float = 10.0
    """Seconds of a step, which an elastic job loses at most."""
    claims: bool = option(False, flag=True)
    """Recompute well-known claims about failing GPUs."""
    validate: bool = option(False, flag=True)
    """Hold the formulas against published figures."""
