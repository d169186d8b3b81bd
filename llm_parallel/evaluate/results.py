"""What an evaluation leaves: results in lm-eval's form, one file of samples for each task, and a table."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_parallel.errors import UserError
from llm_parallel.evaluate.catalog import PUBLISHED
from llm_parallel.files import atomic_write
from llm_parallel.lines import note
from llm_parallel.screen import show_table

RESULTS = "results.json"
OURS = "llm_parallel"
"""Key of the results under which what lm-eval does not note stands: model, tokens, data, versions."""
HEADS = ("task", "shots", "documents", "metric", "value", "± standard error", "Llama 2 7B", "its setting")


def write_results(folder: Path, results: Mapping[str, Any]) -> Path:
    """Writes results and samples into a folder; returns the file of results. Raises UserError if it cannot."""
    whole = {key: value for key, value in results.items() if key != "samples"}
    samples: Mapping[str, Sequence[Mapping[str, Any]]] = results.get("samples") or {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for task, rows in samples.items():
            with atomic_write(samples_path(folder, task)) as handle:
                handle.writelines(dumped(row) + "\n" for row in rows)
        with atomic_write(folder / RESULTS) as handle:
            handle.write(dumped(whole, indent=2))
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error.strerror}; give another folder") from None
    return folder / RESULTS


def samples_path(folder: Path, task: str) -> Path:
    """The file of a task's samples."""
    return folder / f"samples_{task.replace('/', '_')}.jsonl"


def dumped(value: Any, indent: int | None = None) -> str:
    """A value as JSON; what has no form there as lm-eval writes it."""
    return json.dumps(value, indent=indent, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    item = getattr(value, "item", None)
    if callable(item):
        return item()
    return getattr(value, "__name__", None) or str(value)


def scores(values: Mapping[str, Any]) -> Iterable[tuple[str, float, float | None]]:
    """Metric, value and standard error of one task's results. The metric's name has its filter's, if it has one."""
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{filtered}")
        shown = metric if filtered in ("none", "remove_whitespace", "create_test") else f"{metric} ({filtered})"
        yield shown, float(value), float(error) if isinstance(error, int | float) else None


def table_rows(results: Mapping[str, Any], every: bool = False) -> list[tuple[str, ...]]:
    """Rows under ``HEADS``: groups, and tasks outside of them or all of them."""
    grouped = {name for members in results.get("group_subtasks", {}).values() for name in members}
    everything = {**results["results"], **results.get("groups", {})}
    rows: list[tuple[str, ...]] = []
    for task, values in everything.items():
        if task in grouped and not every:
            continue
        published = PUBLISHED.get(task)
        shots = _shots(results, task)
        count = results.get("n-samples", {}).get(task, {}).get("effective", values.get("sample_len", ""))
        for metric, value, error in scores(values):
            beside = published is not None and metric.split(" ")[0] == published.metric
            rows.append((
                task, str(shots), str(count), metric, _number(value), "" if error is None else _number(error),
                f"{published.llama2_7b:.1f}" if published and beside else "",
                published.setting if published and beside else "",
            ))  # fmt: skip
    return rows


def _shots(results: Mapping[str, Any], task: str) -> int | str:
    """Examples of a task, or of a group's tasks where they all have as many."""
    known: Mapping[str, int] = results.get("n-shot", {})
    if task in known:
        return known[task]
    members = results.get("group_subtasks", {}).get(task, ())
    found = {_shots(results, member) for member in members}
    return found.pop() if len(found) == 1 else ""


def _number(value: float) -> str:
    """A share in percent with one decimal, any other number with four digits."""
    if math.isnan(value):
        return "nan"
    return f"{100 * value:.1f}" if 0 <= value <= 1 else f"{value:.4g}"


def show_results(results: Mapping[str, Any]) -> None:
    """Prints the table, and which prompts were cut."""
    show_table("Results (shares in percent)", HEADS, table_rows(results))
    facts = results.get(OURS, {})
    for task, count in facts.get("truncated", {}).items():
        note(
            f"[{task}: {count} requests with their answers were longer than the model's context of "
            f"{facts.get('context')} tokens; the beginnings of these prompts were left out]"
        )


def read_results(path: Path) -> dict[str, Any]:
    """Results with their samples, of ours or of lm-eval. Raises UserError for a file that holds none."""
    path = _results_file(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; give the results.json of an evaluation") from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}; give the results.json of an evaluation") from None
    if not isinstance(found, dict) or "results" not in found or "configs" not in found:
        raise UserError(f"{path} holds no results of an evaluation; give the results.json of one")
    if not found.get("samples"):
        found["samples"] = {task: list(_samples(path, task)) for task in found["configs"]}
    return found


def _results_file(path: Path) -> Path:
    """The file of results that is meant by a path: of a folder ours, or the only one of lm-eval below it."""
    if not path.is_dir() or (path / RESULTS).exists():
        return path / RESULTS if path.is_dir() else path
    found = sorted(path.rglob("results_*.json"))
    if len(found) > 1:
        raise UserError(f"{path} holds {len(found)} results of lm-eval; give one of them, as {found[-1]}")
    return found[0] if found else path / RESULTS


def _samples(path: Path, task: str) -> Iterable[dict[str, Any]]:
    """Samples of a task that lie beside the results: ours, or those of lm-eval that have the date of the results."""
    dated = re.fullmatch(r"results_(\d{4}-.*)\.json", path.name)
    file = path.parent / f"samples_{task}_{dated[1]}.jsonl" if dated else samples_path(path.parent, task)
    if not file.exists():
        how = "with lm-eval's --log_samples, which writes them" if dated else "again, which writes them"
        raise UserError(f"{path} has no samples of {task} beside it ({file.name}); evaluate {how}")
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):  # texts may hold other line ends
        try:
            if line.strip():
                yield json.loads(line)
        except ValueError as error:
            raise UserError(f"line {number} of {file} is no JSON: {error}; evaluate again, which writes it") from None
