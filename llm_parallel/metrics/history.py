"""Reads back what a run wrote to metrics.jsonl."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_parallel.jsonlines import read_jsonlines


@dataclass(frozen=True)
class History:
    """Records of one run in the order of their steps, with one record for each step."""

    name: str
    """Name of the run's folder."""
    steps: tuple[dict[str, Any], ...]
    """Training records."""
    evals: tuple[dict[str, Any], ...]
    """Evaluations."""
    starts: tuple[dict[str, Any], ...]
    """A record for every start or resume of the run."""

    @property
    def unit(self) -> str:
        """What rates are given per: "GPU" or "process"."""
        return "GPU" if any(start.get("is_cuda") for start in self.starts) else "process"

    def column(self, name: str) -> np.ndarray:
        """Training values ``name``, float64 [number of steps]; NaN where a record lacks the value or it is not
        finite."""
        return _column(self.steps, name)

    def eval_column(self, name: str) -> np.ndarray:
        """Evaluation values ``name``, float64 [number of evaluations]; NaN where missing."""
        return _column(self.evals, name)


def read_history(run_dir: str | Path) -> History:
    """The history of the run in ``run_dir``.

    Where a process resumed the run from step k, records of later steps that an earlier process wrote are left out, and
    so are lines that a kill cut short. Raises UserError if there is no metrics.jsonl.
    """
    run_dir = Path(run_dir)
    steps: dict[int, dict[str, Any]] = {}
    evals: dict[int, dict[str, Any]] = {}
    starts = []
    for record in read_jsonlines(run_dir / "metrics.jsonl"):
        if not isinstance(record.get("step"), int):
            continue
        if record.get("event") == "run_start":
            starts.append(record)
            for kept in (steps, evals):
                for step in [step for step in kept if step > record["step"]]:
                    del kept[step]
        elif "train/loss" in record:
            steps[record["step"]] = record
        elif "eval/loss" in record:
            evals[record["step"]] = record
    return History(run_dir.resolve().name, _in_order(steps), _in_order(evals), tuple(starts))


def _in_order(records: dict[int, dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    return tuple(records[step] for step in sorted(records))


def _column(records: tuple[dict[str, Any], ...], name: str) -> np.ndarray:
    values = [record.get(name) for record in records]
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
