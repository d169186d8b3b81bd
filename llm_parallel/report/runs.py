"""Reads run folders, summarises runs in numbers, and finds in which settings runs differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_parallel.errors import UserError
from llm_parallel.jsonlines import read_jsonlines
from llm_parallel.metrics.history import History, read_history
from llm_parallel.metrics.time_split import split_by_step

WORK = (
    "model",
    "data.seq_length_tokens",
    "train.global_batch_size",
    "train.precision",
)
"""Parts of the configuration that decide the work of a step; speeds are compared only where they are the same."""
UNWORK = ("model.init_std", "model.preset", "model.norm_epsilon", "model.rope_base", "model.max_seq_length_tokens")
"""Fields of these parts that do not change the work of a step."""


@dataclass(frozen=True)
class Run:
    """What was read from a run folder."""

    name: str
    folder: Path
    history: History
    config: dict[str, Any]
    """Merged configuration by field, ``{"model.num_layers": 2, …}``; empty if the folder has none."""
    events: tuple[dict[str, Any], ...]
    """Lines of events.jsonl, oldest first; empty if there are none."""
    step_times: tuple[str, ...] = ()
    """When each step was finished, in ISO 8601, including steps that were trained again."""


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """The runs in ``folders``. Raises UserError where one has no metrics, no step, or is given twice."""
    resolved = [Path(folder).resolve() for folder in folders]
    for folder in resolved:
        if resolved.count(folder) > 1:
            raise UserError(f"run {folder} is given twice; name each run once")
    bare = [folder.name for folder in resolved]
    return [
        _read_run(folder, folder.name if bare.count(folder.name) == 1 else f"{folder.parent.name}/{folder.name}")
        for folder in resolved
    ]


def _read_run(folder: Path, name: str) -> Run:
    history = read_history(folder)
    if not history.steps:
        raise UserError(f"run {folder} has made no step yet; its metrics.jsonl holds none")
    events = tuple(read_jsonlines(folder / "events.jsonl")) if (folder / "events.jsonl").is_file() else ()
    records = read_jsonlines(folder / "metrics.jsonl")
    times = tuple(record["time"] for record in records if "train/loss" in record and "time" in record)
    return Run(name, folder, history, history.config, events, times)


@dataclass(frozen=True)
class Summary:
    """One run in numbers; NaN or empty where the run did not record them."""

    steps: int
    tokens: float
    last_loss: float
    """Loss of the last step, as the console printed it, nats per token."""
    loss: float
    """Mean over the last twentieth of the steps."""
    eval_loss: float
    """Of the last evaluation."""
    eval_step: int | None
    """After which step that was."""
    best_eval: tuple[float, int | None]
    """Lowest held-out loss and its step."""
    total_steps: int | None
    """Steps that the last start was to reach."""
    trained_s: float | None
    """Sum of the recorded steps' times; None if not every step was recorded."""
    sizes: tuple[int, ...]
    """Numbers of processes that it ran on, one after the other."""
    layouts: tuple[str, ...]
    device: str
    unit: str
    step_s: float
    """Median seconds of a step, without the first step after each start, as for the following fields."""
    step_low_s: float
    """10th percentile of the step time."""
    step_high_s: float
    """90th percentile of the step time."""
    tokens_per_s_per_gpu: float
    mfu: float
    memory_gib: float
    """Largest value of any step."""
    skipped: int


def steady(history: History) -> np.ndarray:
    """Which steps are not the first after a start, as bool [number of steps]; the first ones allocate and warm up."""
    steps = history.column("step")
    if len(steps) == 1:
        return np.ones(1, bool)
    firsts = {start["step"] + 1 for start in history.starts} | {steps[0]}
    kept = ~np.isin(steps, list(firsts))
    return kept if kept.any() else np.ones(len(steps), bool)


def summarize(run: Run) -> Summary:
    """Summarises a run in numbers."""
    history, kept = run.history, steady(run.history)
    step_s = history.column("perf/step_time")[kept]
    starts = history.starts
    every, losses = history.column("perf/step_time"), history.column("train/loss")
    whole = len(history.steps) == history.steps[-1]["step"] and np.isfinite(every).all()
    held_out = [(record["eval/loss"], record["step"]) for record in history.evals if record["eval/loss"] is not None]
    return Summary(
        steps=int(history.steps[-1]["step"]),
        tokens=float(history.column("train/tokens")[-1]),
        last_loss=float(losses[-1]),
        loss=loss_at(run, math.inf),
        eval_loss=float(history.eval_column("eval/loss")[-1]) if history.evals else float("nan"),
        eval_step=history.evals[-1]["step"] if history.evals else None,
        best_eval=min(held_out) if held_out else (math.nan, None),
        total_steps=starts[-1].get("total_steps") if starts else None,
        trained_s=float(every.sum()) if whole else None,
        sizes=tuple(_in_turn([start.get("size") for start in starts])),
        layouts=tuple(_in_turn([start.get("layout") for start in starts])),
        device=str(starts[-1].get("device_name", "")) if starts else "",
        unit=history.unit,
        step_s=_quantile(step_s, 0.5),
        step_low_s=_quantile(step_s, 0.1),
        step_high_s=_quantile(step_s, 0.9),
        tokens_per_s_per_gpu=_quantile(history.column("perf/tokens_per_s_per_gpu")[kept], 0.5),
        mfu=_quantile(history.column("perf/mfu")[kept], 0.5),
        memory_gib=_quantile(history.column("memory/allocated_gib"), 1.0),
        skipped=int(np.nansum(history.column("train/skipped"))),
    )


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _quantile(values: np.ndarray, share: float) -> float:
    finite = values[np.isfinite(values)]
    return float(np.quantile(finite, share)) if len(finite) else float("nan")


def _in_turn(values: Sequence[Any]) -> list[Any]:
    """The values without None and without consecutive repetitions."""
    found: list[Any] = []
    for value in values:
        if value is not None and found[-1:] != [value]:
            found.append(value)
    return found


def loss_at(run: Run, tokens: float) -> float:
    """Loss after ``tokens`` tokens: the mean over the last twentieth of the steps up to there."""
    loss = run.history.column("train/loss")[run.history.column("train/tokens") <= tokens]
    return _mean(loss[-max(1, len(loss) // 20) :])


def time_split(history: History) -> dict[str, float]:
    """Mean seconds by part of steps that are not the first after a start; they add up to the mean step time. They are
    means over all processes if the run recorded those, else of rank 0."""
    kept = steady(history)
    return {part: float(seconds[kept].mean()) for part, seconds in split_by_step(history).items()}


def differing_fields(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Configuration fields that differ between the runs, with the value of each run."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    return [
        (name, [str(run.config.get(name, "—")) for run in runs])
        for name in names
        if len({str(run.config.get(name)) for run in runs}) > 1 and name != "run_dir"
    ]


def different_work(first: Run, second: Run) -> list[str]:
    """Fields of the work of a step in which two runs differ, so that their speeds can't be compared."""
    if not first.config or not second.config:
        return ["config.yaml is missing"]
    return [
        name
        for name, _ in differing_fields([first, second])
        if name not in UNWORK and any(name == part or name.startswith(part + ".") for part in WORK)
    ]
