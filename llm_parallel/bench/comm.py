"""``llm-parallel bench comm``: collectives and point to point by size, with bandwidths as nccl-tests define them."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from llm_launch.local import available_cores, launch_local
from llm_launch.worker import WorkerEnv, worker_environment
from llm_parallel.bench.collectives import OPERATIONS, Sample, run_rank
from llm_parallel.bench.environment import crowded, environment
from llm_parallel.bench.gate import load_result, slower_than, write_result
from llm_parallel.bench.requests import CommRequest
from llm_parallel.errors import UserError
from llm_parallel.parallel.platform import resolve_device
from llm_parallel.screen import say_next, show

DEFAULT_SIZES = {"cpu": "8K:32M:8", "cuda": "8K:1G:4"}
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
SAMPLE_S = 0.02
"""Seconds of consecutive calls that are timed together, so that reading the clock does not matter."""


@dataclass(frozen=True)
class Fit:
    """A line through the times of one operation: ``latency_s + size / bytes_per_s``."""

    latency_s: float
    bytes_per_s: float
    mean_error: float
    """Mean of |fitted / measured - 1|."""


def comm_command(request: CommRequest) -> int:
    """Measures, prints a table, writes what was asked for. Exit status 1 if slower than the baseline allows.

    Under torchrun or srun this process is one of the ranks; else they are started here. Raises UserError.
    """
    place, load = worker_environment(), os.getloadavg()[0]
    device = resolve_device(request.device)
    plan = plan_of(request, device)
    if request.baseline:
        load_result(request.baseline)
    if place is not None:
        if place.world_size < 2:
            raise UserError("bench comm was started as 1 process; communication needs at least 2")
        samples = run_rank(plan, place)
        return 0 if place.rank else report(request, samples, place, device, load)
    processes = request.processes if request.processes is not None else max(2, torch.cuda.device_count())
    if processes < 2:
        raise UserError(f"--processes {processes} must be at least 2: one process has nobody to talk to")
    if device == "cuda" and processes > torch.cuda.device_count():
        raise UserError(f"--processes {processes} needs as many GPUs; this machine has {torch.cuda.device_count()}")
    folder = Path(
        tempfile.mkdtemp(prefix="llm_parallel_comm_")
    )  # kept after a failure, since the message names its logs
    (folder / "plan.json").write_text(json.dumps(plan))
    status = launch_local(
        processes, ["-m", "llm_parallel.bench.collectives", str(folder / "plan.json")], folder / "logs"
    )
    if status:
        return status
    samples = [Sample(**sample) for sample in json.loads((folder / "samples.json").read_text())]
    shutil.rmtree(folder)
    here = WorkerEnv(0, 0, processes, processes, "127.0.0.1", 0)
    return report(request, samples, here, device, load)


def plan_of(request: CommRequest, device: str) -> dict[str, Any]:
    """What the ranks measure. Raises UserError for an unknown operation, a bad size or no rounds."""
    unknown = [name for name in request.operations if name not in OPERATIONS]
    if unknown:
        raise UserError(f"--ops {unknown[0]} is unknown; take {', '.join(OPERATIONS)}")
    if request.rounds < 1:
        raise UserError(f"--rounds {request.rounds} must be at least 1")
    return {
        "operations": list(dict.fromkeys(request.operations)) or list(OPERATIONS),
        "sizes_bytes": parse_sizes(request.sizes or DEFAULT_SIZES[device]),
        "rounds": request.rounds,
        "device": device,
        "sample_s": SAMPLE_S,
    }


def parse_sizes(text: str) -> list[int]:
    """Bytes of "8K,1M" or "8K:64M:4" (from, to, factor), ascending. Raises UserError."""
    sizes: set[int] = set()
    for part in text.split(","):
        ends = part.split(":")
        if len(ends) not in (1, 3):
            raise UserError(f"--sizes {part} is neither a size as 8K nor a range as 8K:64M:4")
        first, last = _size(ends[0]), _size(ends[len(ends) // 2])
        factor = _size(ends[2]) if len(ends) == 3 else 2
        if factor < 2 or last < first:
            raise UserError(f"--sizes {part} must grow: a factor of at least 2, and the last size not below the first")
        while first <= last:
            sizes.add(first)
            first *= factor
    return sorted(sizes)


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)i?B?", text.strip(), re.IGNORECASE)
    if match is None or int(match.group(1)) == 0:
        raise UserError(f"--sizes {text!r} is not a size; write bytes, or as 8K, 32M, 1G")
    return int(match.group(1)) * UNITS[match.group(2).upper()]


def bus_factor(operation: str, num_ranks: int) -> float:
    """Bus bandwidth over algorithm bandwidth, as doc/PERFORMANCE.md of nccl-tests derives it. Bus bandwidth is
    comparable with the rate of the link for any number of ranks."""
    if operation == "all_reduce":
        return 2 * (num_ranks - 1) / num_ranks
    if operation in ("all_gather", "reduce_scatter", "all_to_all"):
        return (num_ranks - 1) / num_ranks
    assert operation in ("broadcast", "send_recv"), operation
    return 1.0


def fit_line(sizes_bytes: Sequence[float], seconds: Sequence[float]) -> Fit | None:
    """Fits a line by least squares of the relative error, with neither term below 0; None with fewer than two sizes.

    The error is relative, since otherwise the largest size alone would decide and the latency could be anything.
    """
    if len(set(sizes_bytes)) < 2:
        return None
    # Minimise sum (a x + b y - 1)^2 with x = 1/t, y = size/t.
    x = [1.0 / second for second in seconds]
    y = [size / second for size, second in zip(sizes_bytes, seconds)]
    xx, yy, xy = _dot(x, x), _dot(y, y), _dot(x, y)
    determinant = xx * yy - xy * xy
    latency = (sum(x) * yy - sum(y) * xy) / determinant
    per_byte = (sum(y) * xx - sum(x) * xy) / determinant
    if latency < 0:
        latency, per_byte = 0.0, sum(y) / yy
    elif per_byte < 0:
        latency, per_byte = sum(x) / xx, 0.0
    errors = [abs(latency * first + per_byte * second - 1) for first, second in zip(x, y)]
    return Fit(latency, 1 / per_byte if per_byte else math.inf, statistics.mean(errors))


def _dot(first: Sequence[float], second: Sequence[float]) -> float:
    return math.fsum(one * other for one, other in zip(first, second))


def report(request: CommRequest, samples: Sequence[Sample], place: WorkerEnv, device: str, load: float) -> int:
    """Prints and writes what was measured, and compares it with the baseline. ``load``: the machine's load average
    before."""
    backend = "nccl" if device == "cuda" else "gloo"
    rows = [as_row(sample, place.world_size, backend) for sample in samples]
    cores = available_cores()
    shared = backend == "gloo" and place.local_world_size > cores
    result: dict[str, Any] = {
        "environment": environment(),
        "command": request.command,
        "processes": place.world_size,
        "processes_per_machine": place.local_world_size,
        "backend": backend,
        "oversubscribed": f"{place.local_world_size} processes share {cores} cores" if shared else None,
        "crowded": crowded(place.local_world_size, cores, load),
        "definitions": "size and busbw as in nccl-tests; time of the slowest rank, mean of calls in a row, median over"
        " rounds in which every operation and size has its turn",
        "rows": rows,
        "fits": fits_of(rows),
    }
    show(table(result))
    if request.out:
        try:
            write_result(Path(request.out), result)
        except OSError as error:
            raise UserError(f"--out {request.out} cannot be written ({error.strerror})") from None
    status = slower_than(request.baseline, result, request.min_ratio) if request.baseline else 0
    say_next(
        f"llm-parallel plan --calibrate {quote(f'{request.out}.json')} --cluster-out my-cluster.yaml"
        if request.out
        else "llm-parallel bench comm --out runs/comm"
    )
    return status


def as_row(sample: Sample, num_ranks: int, backend: str) -> dict[str, Any]:
    """One row of the result, in the format that ``bench.gate`` compares. Bandwidths are in 10^9 bytes per second."""
    milliseconds = sorted(1e3 * seconds for seconds in sample.seconds)
    median = statistics.median(milliseconds)
    bandwidth = sample.size_bytes / median / 1e6
    return {
        "operator": sample.operation,
        "shape": f"{sample.size_bytes} B x {num_ranks} ranks",
        "dtype": "fp32",
        "mode": backend,
        "provider": "ours",
        "size_bytes": sample.size_bytes,
        "ranks": num_ranks,
        "median_ms": median,
        "min_ms": milliseconds[0],
        "max_ms": milliseconds[-1],
        "rounds": len(milliseconds),
        "calls": sample.calls,
        "algbw_gb_per_s": bandwidth,
        "busbw_gb_per_s": bandwidth * bus_factor(sample.operation, num_ranks),
        "milliseconds": milliseconds,
    }


def fits_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Latency and bandwidth of each operation with two or more sizes; the bus bandwidth is the limit for large
    messages."""
    found = {}
    for operation in dict.fromkeys(row["operator"] for row in rows):
        mine = [row for row in rows if row["operator"] == operation]
        fit = fit_line([row["size_bytes"] for row in mine], [row["median_ms"] / 1e3 for row in mine])
        if fit is not None and math.isfinite(fit.bytes_per_s):
            factor = bus_factor(operation, mine[0]["ranks"])
            found[operation] = {**asdict(fit), "busbw_gb_per_s": fit.bytes_per_s * factor / 1e9}
    return found


def table(result: Mapping[str, Any]) -> str:
    """Rows and fits as Markdown, and what they were measured on."""
    where = result["environment"]
    lines = [
        f"\nmeasured on {result['processes']} processes, {result['processes_per_machine']} a machine, over"
        f" {result['backend']}; {where['chip']}, {where['date']}, commit {where['commit']}, load"
        f" {where['load_average_1_min']}",
        result["definitions"],
    ]
    if result["oversubscribed"]:
        lines.append(f"NOTE: {result['oversubscribed']}; the times hold waiting for a core")
    if result.get("crowded"):
        lines.append(f"NOTE: {result['crowded']}")
    lines += [
        "| operation | bytes | median ms | min to max ms | algbw GB/s | busbw GB/s |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['operator']} | {row['size_bytes']:,} | {row['median_ms']:.4g} | {row['min_ms']:.4g} to"
            f" {row['max_ms']:.4g} | {row['algbw_gb_per_s']:.3g} | {row['busbw_gb_per_s']:.3g} |"
        )
    for operation, fit in result["fits"].items():
        lines.append(
            f"{operation}: {1e6 * fit['latency_s']:.3g} µs + bytes / {fit['bytes_per_s'] / 1e9:.3g} GB/s (busbw"
            f" {fit['busbw_gb_per_s']:.3g} GB/s); mean error of this line {fit['mean_error']:.0%}"
        )
    return "\n".join(lines)
