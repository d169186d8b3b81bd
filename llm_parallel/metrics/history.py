"""Reads back what a run wrote into its folder: the records of metrics.jsonl and the merged configuration."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from llm_parallel.errors import UserError
from llm_parallel.jsonlines import read_jsonlines
from llm_parallel.metrics.record import EVAL_NAMES, STEP_NAMES, TASKS, is_of_round


@dataclass(frozen=True)
class Mark:
    """Something that happened to a run and that its curves show."""

    kind: Literal["restart", "layout", "skip"]
    """``restart``: the run went on in the same layout; ``layout``: it went on in another one; ``skip``: a step was not
    applied."""
    step: int
    tokens: float
    text: str


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
    answers: tuple[dict[str, Any], ...] = ()
    """What the model wrote, as records with step, prompt, answer and stopped, in the order of writing."""
    folder: Path = Path()
    """The run's folder."""
    tasks: tuple[dict[str, Any], ...] = ()
    """Scores of ``evaluate.tasks``."""
    config: dict[str, Any] = field(default_factory=dict)
    """Merged configuration by field, ``{"model.num_layers": 2, …}``; empty if the folder has none."""

    @property
    def unit(self) -> str:
        """What rates are given per: "GPU" or "process"."""
        return "GPU" if any(start.get("is_cuda") for start in self.starts) else "process"

    @property
    def shown_folder(self) -> str:
        """The folder as a title shows it: relative to the working folder, or its last two parts."""
        try:
            text = str(self.folder.relative_to(Path.cwd()))
        except ValueError:
            text = str(Path(*self.folder.parts[-2:]))
        return text if text != "." else self.name

    def column(self, name: str) -> np.ndarray:
        """Training values ``name``, float64 [number of steps]; NaN where a record lacks the value or it is not
        finite."""
        return _column(self.steps, name)

    def eval_column(self, name: str) -> np.ndarray:
        """Evaluation values ``name``, float64 [number of evaluations]; NaN where missing."""
        return _column(self.evals, name)

    def tokens_at(self, steps: np.ndarray) -> np.ndarray:
        """Tokens trained on after ``steps``, float64 like ``steps``, interpolated between the recorded steps."""
        return np.interp(
            steps, np.append(0.0, self.column("step")), np.append(self._first_tokens(), self.column("train/tokens"))
        )

    def _first_tokens(self) -> float:
        """Tokens before the first recorded step, as if that step were as large as the next."""
        tokens, steps = self.column("train/tokens"), self.column("step")
        if len(tokens) < 2:
            return 0.0
        return max(0.0, float(tokens[0] - (tokens[1] - tokens[0]) / (steps[1] - steps[0]) * steps[0]))

    def marks(self) -> list[Mark]:
        """Restarts, changes of the layout, and skipped steps, each kind by ascending step."""
        found = []
        for before, start in zip(self.starts, self.starts[1:]):
            step, old, new = start["step"], short_layout(before.get("layout")), short_layout(start.get("layout"))
            kind: Literal["restart", "layout"] = "restart" if old == new else "layout"
            text = f"restart after step {step:,}" + (f": {old} → {new}" if kind == "layout" else "")
            found.append(Mark(kind, step, self._tokens(step), text))
        for record in self.steps:
            if record.get("train/skipped"):
                found.append(
                    Mark("skip", record["step"], self._tokens(record["step"]), f"step {record['step']:,} skipped")
                )
        return found

    def _tokens(self, step: int) -> float:
        return float(self.tokens_at(np.array([step]))[0])

    def statistics(self) -> dict[str, list[str]]:
        """The numbers that a run's objective and evaluations recorded beside loss, rates and memory: columns by figure.

        Numbers of one kind share a figure: ``train/loss/alpaca`` and ``train/loss/code`` are in "loss", and a number
        has one figure for training (``train/…``) and evaluation (``eval/…``). The count of tokens only grows and has
        none; numbers of rounds have figures over rounds (``rounds.py``).
        """
        names = _numbers_of(self.steps, "train/", {**STEP_NAMES, "train/num_tokens": ""}) | _numbers_of(
            self.evals, "eval/", EVAL_NAMES
        )
        figures: dict[str, list[str]] = {}
        for name in filter(lambda name: not is_of_round(name), names):
            bare = name.partition("/")[2]
            share = re.search("accurac", bare)  # between 0 and 1, so it has a scale of its own
            figures.setdefault(bare if share or "/" not in bare else bare.rpartition("/")[0], []).append(name)
        return figures


def _numbers_of(records: tuple[dict[str, Any], ...], prefix: str, known: dict[str, str]) -> dict[str, None]:
    """Names of numbers that begin with ``prefix`` and are not ``known``, in the order of their appearance."""
    return {
        name: None
        for record in records
        for name, value in record.items()
        if name.startswith(prefix) and name not in known and isinstance(value, (int, float))
    }


def short_layout(layout: str | None) -> str:
    """A layout without what stands in parentheses, as "TP 2 + SP x PP 2 x DP 1"."""
    return re.sub(r" ?\([^)]*\)", "", layout or "an unknown layout")


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted names; lists stay whole."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def read_history(run_dir: str | Path) -> History:
    """The history of the run in ``run_dir``.

    Where a process resumed the run from step k, records of later steps that an earlier process wrote are left out, and
    so are lines that a kill cut short. Raises UserError if there is no metrics.jsonl, or config.yaml cannot be read.
    """
    folder = Path(run_dir).resolve()
    steps: dict[int, dict[str, Any]] = {}
    evals: dict[int, dict[str, Any]] = {}
    tasks: dict[int, dict[str, Any]] = {}
    starts: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    for record in read_jsonlines(folder / "metrics.jsonl"):
        if not isinstance(record.get("step"), int):
            continue
        if record.get("event") == "run_start":
            starts.append(record)
            for kept in (steps, evals, tasks):
                for step in [step for step in kept if step > record["step"]]:
                    del kept[step]
            answers = [answer for answer in answers if answer["step"] <= record["step"]]
        elif record.get("event") == "answer":
            answers.append(record)
        elif "train/loss" in record:
            steps[record["step"]] = record
        elif "eval/loss" in record:
            evals[record["step"]] = record
        elif f"{TASKS}seconds" in record:
            tasks[record["step"]] = record
    found = _in_order(steps), _in_order(evals), tuple(starts), tuple(answers)
    return History(folder.name, *found, folder, _in_order(tasks), _config(folder))


def scored_steps(run_dir: str | Path) -> set[int]:
    """Steps after which a run has scored its tasks, without those that it has forgotten since it went on from an
    earlier step."""
    found: set[int] = set()
    try:
        for record in read_jsonlines(Path(run_dir) / "metrics.jsonl"):
            if record.get("event") == "run_start":
                found = {step for step in found if step <= record["step"]}
            elif f"{TASKS}seconds" in record:
                found.add(record["step"])
    except UserError:
        pass  # a run without metrics has scored nothing
    return found


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    try:
        return flat(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}); mend or remove it") from None


def _in_order(records: dict[int, dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    return tuple(records[step] for step in sorted(records))


def _column(records: tuple[dict[str, Any], ...], name: str) -> np.ndarray:
    values = [record.get(name) for record in records]
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
