"""Run folders and sweeps as the product writes them, with numbers that a test knows."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import yaml

from llm_parallel.metrics.record import Basis, StepMeasurement, derive, scalars

START = datetime(2026, 1, 1, tzinfo=timezone.utc)
CONFIG: dict[str, Any] = {
    "model": {"num_layers": 2, "hidden_size": 64, "preset": "debug"},
    "data": {"seq_length_tokens": 64},
    "parallel": {"tp": 1, "dp": 4},
    "train": {"global_batch_size": 8, "precision": "fp32"},
}
PIPELINE: dict[str, Any] = {
    "parallel": {"tp": 2, "cp": 1, "pp": 2, "vpp": 1},
    "train": {"global_batch_size": 8, "micro_batch_size": 1, "precision": "fp32"},
}
"""Two stages and eight micro batches on the four processes of ``write_run``."""


def at(seconds: float) -> str:
    """The time of writing, ``seconds`` after the start, as JsonLines writes it."""
    return (START + timedelta(seconds=seconds)).isoformat(timespec="milliseconds")


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """A file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_run(
    folder: Path,
    *,
    step_s: Sequence[float] = (1.0, *[0.1] * 39),
    peak_tflops: float | None = None,
    config: Mapping[str, Any] = CONFIG,
    events: Sequence[Mapping[str, Any]] = (),
    split: Mapping[str, float] | None = None,
) -> Path:
    """A run of one step for each of ``step_s``: loss 6 - step/20, 70 % forward and backward, 20 % optimizer, 5 % data
    and held-out loss 4.25. split: shares of a step by part, as log.comm_time has them recorded."""
    basis = Basis(4, 64, 1_000_000, peak_tflops, len(step_s))
    records: list[Mapping[str, Any]] = [
        {
            "event": "run_start",
            "step": 0,
            "size": 4,
            "layout": "TP 1 x PP 1 x DP 4",
            "device_name": "CPU",
            "time": at(0),
        }
    ]
    for step, seconds in enumerate(step_s, start=1):
        measured = StepMeasurement(
            *(step, 8 * step, 8, 6.0 - step / 20, 1.0, 1e-3, seconds, 0.05 * seconds, 0.7 * seconds, 0.2 * seconds),
            memory_allocated_gib=0.5 + step / 100,
            split_s={name: share * seconds for name, share in (split or {}).items()},
        )
        records.append({"step": step, **scalars(derive(measured, basis)), "time": at(12 + step)})
    records.append({"step": len(step_s), "eval/loss": 4.25, "time": at(100)})
    write_lines(folder / "metrics.jsonl", records)
    if events:
        write_lines(folder / "events.jsonl", events)
    (folder / "config.yaml").write_text(yaml.safe_dump({"run_dir": str(folder), **config}))
    return folder


EVENTS = (
    {"event": "join", "node": "n0", "generation": 0, "time": at(0)},
    {"event": "form", "generation": 1, "world_size": 4, "layout": "TP 1 x PP 1 x DP 4", "time": at(8)},
    {"event": "resume", "generation": 1, "step": 0, "world_size": 4, "time": at(10)},
    {"event": "detect", "generation": 1, "step": 16, "cause": "n2/2: silent", "time": at(20)},
    {"event": "blame", "fault": "device", "cause": "n2/2 hangs in all_reduce", "seconds": 0.2, "time": at(20.2)},
    {"event": "remove", "node": "n2", "device": 2, "cause": "n2/2 hangs", "time": at(20.2)},
    {"event": "wait", "cause": "3 devices are left", "time": at(20.5)},
    {"event": "form", "generation": 2, "world_size": 3, "layout": "TP 1 x PP 1 x DP 3", "time": at(23)},
    {"event": "resume", "generation": 2, "step": 14, "world_size": 3, "time": at(24)},
    {"event": "end", "step": 40, "time": at(44)},
    {"event": "join", "node": "n0", "generation": 2, "time": at(100)},
    {"event": "form", "generation": 3, "world_size": 4, "layout": "TP 1 x PP 1 x DP 4", "time": at(101)},
    {"event": "resume", "generation": 3, "step": 40, "world_size": 4, "time": at(102)},
    {"event": "detect", "generation": 3, "step": 45, "cause": "n1 <lost>", "time": at(110)},
    {"event": "fail", "fault": "user", "cause": "x", "time": at(111)},
)
"""Trained 10 to 20 s, 24 to 44 s and 102 to 110 s; one fault recovered from in 4 s with 2 steps made again, one not."""

SWEEP = [
    {"world_size": n, "tp": tp, "dp": n // tp, "global_batch_size": 8 * n}
    | {"step_time_s": t, "time_dp_s": d, "time_other_s": o}
    for n, tp, t, d, o in (
        (1, 1, 1.0, 0.0, 1.0),
        (2, 1, 8 / 7.2, 0.1, 1.01),
        (4, 1, 8 / 6, 0.3, 1.03),
        (4, 2, 2.0, 0.2, 1.8),
        (4, 4, 4.0, 0.0, 4.0),
    )
]
"""Weak scaling at 8, 7.2 and 6 samples/s per process, and two slower layouts on 4 processes."""


def write_sweep(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A CSV of the rows with the columns of all of them."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path
