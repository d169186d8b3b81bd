"""Profiles with Nsight Compute the memory-bound operator that is furthest from the copy bandwidth."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.gpu import machine
from benchmarks.gpu.plan import Job
from benchmarks.gpu.processes import run

# Names that ncu has had since 2020; one it does not know leaves that column out.
METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy",
    "launch__registers_per_thread": "registers",
    "launch__shared_mem_per_block": "shared memory",
    "launch__grid_size": "blocks",
    "launch__block_size": "threads",
}
LAUNCHES = 6
DEFAULT = ("rms_norm", "llama3-8b")


def counters(job: Job) -> dict[str, Any]:
    """Profiles forward and backward of the worst operator on its shape."""
    machine.device(job.rehearse)
    program = machine.profiler(job.rehearse)
    if program is None:
        return {"note": "ncu is not installed"}
    operator, shape = worst(job.results.get("operators", {}).get("rows", []))
    command = [
        *program, "--clock-control", "none", "--csv", "--metrics", ",".join(METRICS), "--kernel-name",
        "regex:^_.*_kernel$", "--launch-count", str(LAUNCHES), *machine.module(job.rehearse, "one_call"),
        operator, shape,
    ]  # fmt: skip
    ended = run(command, job.work / "details" / "ncu.log", job.left() - 3)
    kernels = parse(ended.output)
    found: dict[str, Any] = {"operator": operator, "shape": shape, "kernels": kernels}
    if not kernels:
        found["problem"] = f"ncu ended with {ended.exit} and no kernel: {ended.tail(1500)}"
    return found


def worst(rows: Iterable[Mapping[str, Any]]) -> tuple[str, str]:
    """Operator and shape of our row that is furthest below the copy bandwidth."""
    ours = [
        row for row in rows
        if row["provider"] == "ours" and row.get("fraction") and row["bound"] == "memory" and row["mode"] != "both"
    ]  # fmt: skip
    found = min(ours, key=lambda row: row["fraction"], default=None)
    return (found["operator"], found["shape"]) if found else DEFAULT


def parse(output: str) -> list[dict[str, str]]:
    """Kernels from ncu's CSV, which has a line for each metric and stands among the program's output; with our names of
    the metrics."""
    lines = output.splitlines()
    heads = [number for number, line in enumerate(lines) if '"Metric Name"' in line]
    if not heads:
        return []
    table = "\n".join(line for line in lines[heads[0] :] if line.startswith('"'))
    found: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(io.StringIO(table)):
        kernel = found.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        title = METRICS.get(row["Metric Name"])
        if title:
            kernel[title] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return list(found.values())
