"""Draws the scores of tasks over the steps of runs: panels that ``plot`` puts into one picture, and the report shows
each alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_parallel.metrics.history import History
from llm_parallel.metrics.record import TASKS

# Colours of Okabe and Ito, which colour-blind people can distinguish.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
ERROR = "_stderr"


@dataclass(frozen=True)
class TaskLine:
    """One metric of one task in one run: float64 [scorings] each. ``errors`` are NaN where there is none."""

    task: str
    metric: str
    steps: np.ndarray
    values: np.ndarray
    errors: np.ndarray
    documents: int

    @property
    def is_share(self) -> bool:
        """Whether all values are between 0 and 1, and shown in percent."""
        return bool(((self.values >= 0) & (self.values <= 1)).all())


def task_lines(history: History) -> list[TaskLine]:
    """All metrics that a run has scored, in the order of their appearance."""
    named: dict[str, dict[int, float]] = {}
    for record in history.tasks:
        for name, value in record.items():
            if name.startswith(TASKS) and isinstance(value, int | float):
                named.setdefault(name, {})[record["step"]] = float(value)
    found = []
    for name, values in named.items():
        task, stroke, metric = name.removeprefix(TASKS).partition("/")
        if not stroke or metric == "documents" or metric.endswith(ERROR):
            continue
        steps = sorted(values)
        errors = named.get(name + ERROR, {})
        documents = named.get(f"{TASKS}{task}/documents", {})
        found.append(
            TaskLine(
                *(task, metric, np.array(steps, np.float64), np.array([values[step] for step in steps])),
                np.array([errors.get(step, np.nan) for step in steps]),
                int(documents.get(steps[-1], 0)),
            )
        )
    return found


def scored_tasks(runs: Sequence[History]) -> list[str]:
    """The tasks that at least one run has scored."""
    return list(dict.fromkeys(line.task for run in runs for line in task_lines(run)))


def draw_task(axes: Any, runs: Sequence[History], task: str) -> None:
    """The metrics of a task by step, with their standard errors as bands."""
    found = [(run, line) for run in runs for line in task_lines(run) if line.task == task]
    in_percent = all(line.is_share for _, line in found)
    factor = 100.0 if in_percent else 1.0
    for (run, line), colour in zip(found, COLOURS * len(found)):
        label = line.metric if len(runs) == 1 else f"{run.name}: {line.metric}"
        values, errors = factor * line.values, factor * np.nan_to_num(line.errors)
        axes.fill_between(line.steps, values - errors, values + errors, color=colour, alpha=0.15, linewidth=0)
        axes.plot(line.steps, values, "o-", color=colour, markersize=4, linewidth=1.2, label=label)
    documents = max((line.documents for _, line in found), default=0)
    if in_percent:
        widen(axes)
    axes.set_ylabel(f"{task}{', percent' if in_percent else ''}\n({documents:,} documents)")


def widen(axes: Any) -> None:
    """Shows two points of a share in percent at least, so that values that are all alike do not seem to differ."""
    low, high = axes.get_ylim()
    if high - low < 2.0:
        bottom = max((low + high) / 2 - 1.0, -0.1)
        axes.set_ylim(bottom, bottom + 2.0)
