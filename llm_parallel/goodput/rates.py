"""How often a GPU fails, as published fleets report it, and the job whose goodput is asked for."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from importlib import resources

from llm_parallel.errors import UserError

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
MONTH_S = 365.25 / 12 * DAY_S
YEAR_S = 365.25 * DAY_S
POLICIES = ("restart", "shrink", "wait")
RANGES: dict[str, tuple[str, float, float, bool]] = {
    "num_gpus": ("--gpus", 1, 10_000_000, False),
    "spare_nodes": ("--spares", 0, 100_000, False),
    "gpus_per_node": ("--gpus-per-node", 1, 100_000, False),
    "rate_per_gpu_month": ("--rate-per-gpu-month", 1e-9, 1e4, True),
    "detect_s": ("--detect-s", 0.0, MONTH_S, False),
    "restart_s": ("--restart-s", 0.0, MONTH_S, False),
    "write_s": ("--checkpoint-write-s", 0.0, MONTH_S, False),
    "interval_s": ("--interval", 1e-3, YEAR_S, False),
    "repair_s": ("--repair-h", 1.0, 10 * YEAR_S, False),
    "hardware_share": ("--hardware-share", 0.0, 1.0, False),
}
"""Option, least and largest value of each field of ``Job``, in the field's unit, and whether the option is in percent
of it. Within them no sum overflows, and the number of states and of simulated events is bounded."""


@dataclass(frozen=True)
class Profile:
    """Failure rate of a published fleet."""

    name: str
    rate_per_gpu_month: float
    """Failures per GPU and month (of 365.25 / 12 days) that end a job, 0.01 for 1 %."""
    hardware_share: float
    """Share of them after which the node must leave for repair."""
    source: str


@dataclass(frozen=True)
class Job:
    """A job without an end on ``num_gpus``, and what interrupts it."""

    num_gpus: int
    rate_per_gpu_month: float
    """Failures per GPU and month."""
    hardware_share: float = 1.0
    """Share of failures that take a node out for ``repair_s``."""
    detect_s: float = 60.0
    """Seconds from a failure until it is known."""
    restart_s: float = 300.0
    """Seconds from there until training goes on from the last checkpoint."""
    write_s: float = 30.0
    """Seconds for which one checkpoint stops training."""
    interval_s: float = 1800.0
    """Seconds of training between two checkpoints."""
    policy: str = "restart"
    """What happens when no spare is left: ``restart`` goes on with the same nodes, so that none is ever missing;
    ``wait`` waits until a node comes back; ``shrink`` goes on with fewer model replicas."""
    spare_nodes: int = 0
    """Nodes that stand ready beside the job's own."""
    gpus_per_node: int = 8
    """GPUs of a node, which leave together."""
    replica_nodes: int = 1
    """Nodes of one model replica, of which ``shrink`` gives up whole ones."""
    repair_s: float = 24 * HOUR_S
    """Mean seconds until a node comes back."""

    def __post_init__(self) -> None:
        for field, (option, least, most, is_percent) in RANGES.items():
            value, unit = getattr(self, field), HOUR_S if field == "repair_s" else 0.01 if is_percent else 1.0
            if not least <= value <= most:  # nan too
                given = f"{value / unit:.6g}" if isinstance(value, float) else f"{value:,}"[:20]
                raise UserError(f"{option} {given} must be a number from {least / unit:,.6g} to {most / unit:,.10g}")
        if self.policy not in POLICIES:
            raise UserError(f"--policy {self.policy} is unknown; take {', '.join(POLICIES)}")
        if self.policy == "shrink" and (self.replica_nodes < 1 or self.num_nodes % self.replica_nodes):
            raise UserError(
                f"--replica-gpus {self.replica_nodes * self.gpus_per_node} does not divide --gpus {self.num_gpus}; to"
                " shrink, the job must be made of whole replicas"
            )

    @property
    def num_nodes(self) -> int:
        """Nodes that train; the last may have fewer GPUs."""
        return math.ceil(self.num_gpus / self.gpus_per_node)

    @property
    def failures_per_s(self) -> float:
        """Failures of the whole job per second."""
        return self.num_gpus * self.rate_per_gpu_month / MONTH_S

    @property
    def mtbf_s(self) -> float:
        """Mean time between failures of the whole job, seconds."""
        return 1.0 / self.failures_per_s

    @property
    def down_s(self) -> float:
        """Time from a failure until training goes on, seconds."""
        return self.detect_s + self.restart_s

    def nodes_at_work(self, nodes_out: int) -> int:
        """Nodes that train while ``nodes_out``, counted among the job's nodes and the spares, are in repair."""
        missing = max(0, nodes_out - self.spare_nodes)
        if missing == 0 or self.policy == "restart":
            return self.num_nodes
        if self.policy == "wait":
            return 0
        replicas = self.num_nodes // self.replica_nodes - math.ceil(missing / self.replica_nodes)
        return max(0, replicas) * self.replica_nodes

    def returns_to_grow(self, nodes_out: int) -> int:
        """Nodes that must come back before one more replica can train; 0 if all of the job trains."""
        missing = max(0, nodes_out - self.spare_nodes)
        return (missing - 1) % self.replica_nodes + 1 if missing else 0

    def capacity(self, nodes_out: int) -> float:
        """Speed relative to the full job, 0 to 1, while ``nodes_out`` are in repair."""
        return self.nodes_at_work(nodes_out) / self.num_nodes


def published_rows() -> list[dict[str, str]]:
    """The table of published failure rates, recovery times and goodput; each row names its source."""
    table = resources.files("llm_parallel.goodput") / "data" / "published_reliability.csv"
    return list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))


def published(system: str, metric: str, gpus: int | None = None) -> dict[str, str]:
    """The one published row of a system and metric."""
    rows = [
        row
        for row in published_rows()
        if row["system"] == system and row["metric"] == metric and (gpus is None or row["scale_gpus"] == str(gpus))
    ]
    assert len(rows) == 1, (system, metric, gpus, len(rows))
    return rows[0]


def profiles() -> dict[str, Profile]:
    """Published fleets by name."""
    llama = int(published("Llama 3 405B", "interruptions_unexpected")["value"])
    window_s = float(published("Llama 3 405B", "window")["value"]) * DAY_S
    # 35 manual and about 70 automatic restarts; over 100 hosts were taken out, so nearly every failure cost a host.
    opt_restarts, opt_gpus, opt_months = 35 + 70, 992, 2
    found = [
        Profile(
            *("llama3", llama / 16384 / window_s * MONTH_S, 0.78),
            "Llama 3 405B on 16,384 H100: 419 unexpected interruptions in 54 days, 78 % hardware (arXiv 2407.21783)",
        ),
        _node_days("rsc1", "Meta RSC-1"),
        _node_days("rsc2", "Meta RSC-2"),
        Profile(
            *("opt175b", opt_restarts / opt_gpus / opt_months, 1.0),
            "OPT-175B on 992 A100: about 105 restarts in two months (arXiv 2205.01068)",
        ),
        Profile("deck", 0.08, 1.0, "the often heard claim that 8 % of A100s fail in a month; no fleet published it"),
    ]
    return {profile.name: profile for profile in found}


def _node_days(name: str, system: str) -> Profile:
    row = published(system, "node_failure_rate")
    fleet = f"{system}, ~{int(row['scale_gpus']) // 1000}K A100"
    per_gpu_s = float(row["value"]) / 1000 / DAY_S / 8
    return Profile(
        *(name, per_gpu_s * MONTH_S, 1.0),
        f"{fleet}: {row['value']} failures per 1000 node-days (arXiv 2410.21680)",
    )


def find_profile(name: str) -> Profile:
    """A published fleet. Raises UserError if there is none of that name."""
    known = profiles()
    if name not in known:
        raise UserError(f"--profile {name} is unknown; take {', '.join(known)}, or give --rate-per-gpu-month")
    return known[name]


def llama3_causes() -> list[tuple[str, int]]:
    """Causes of Llama 3's unexpected interruptions with their counts, the most frequent first."""
    return [
        (row["metric"].removeprefix("cause: "), int(row["value"]))
        for row in published_rows()
        if row["metric"].startswith("cause: ")
    ]
