"""``llm-parallel evaluate RUN --curve``: the same tasks for every checkpoint of a run, as a table and a picture.

What an earlier call has evaluated is not computed again, so the command can be repeated while the run goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

from llm_launch.worker import EXIT_CRASH
from llm_parallel.checkpoint.folders import complete_checkpoints, is_complete, step_of
from llm_parallel.errors import UserError
from llm_parallel.evaluate.request import EvaluateRequest
from llm_parallel.evaluate.results import OURS, RESULTS, dumped, read_results, scores
from llm_parallel.files import atomic_write
from llm_parallel.lines import note, say
from llm_parallel.metrics.task_plots import widen
from llm_parallel.screen import say_next, show_table

FOLDER, POINTS, PICTURE = "evaluations", "curve.jsonl", "curve.png"
SAME = (
    "limit", "seed", "new_tokens", "chat", "system", "data_fingerprint", "precision", "weights", "begin", "template",
    "context",
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A value of a metric at a step of the run, with its standard error if there is one."""

    step: int
    task: str
    metric: str
    value: float
    error: float | None


def checkpoints_of(run: Path) -> list[Path]:
    """The complete checkpoints of a run or of its folder of checkpoints, by their steps. Raises UserError."""
    found = [*complete_checkpoints(run), *complete_checkpoints(run / "checkpoints")]
    if not found:
        raise UserError(f"--curve is given and {run} holds no complete checkpoint; give the folder of a run")
    return sorted(found, key=lambda folder: step_of(folder) or 0)


def curve_command(request: EvaluateRequest, evaluate: Callable[[EvaluateRequest], int]) -> int:
    """Evaluates every checkpoint by ``evaluate`` and shows the curve; returns the exit status. Checkpoints that the run
    removes meanwhile are left out; those that an earlier call evaluated with the same settings stay in the curve.
    Raises UserError."""
    run = Path(request.model)
    out = request.out or run / FOLDER
    folders = checkpoints_of(run)
    found: dict[str, dict[str, Any]] = {}
    for place, folder in enumerate(folders, 1):
        note(f"[checkpoint {place} of {len(folders)}: {folder.name}]")
        try:
            status = evaluate(replace(request, model=str(folder), out=out / folder.name, curve=False))
        except Exception:  # whatever reading half a folder leads to
            if is_complete(folder):
                raise
            status = EXIT_CRASH
        if status and not is_complete(folder):
            note(f"[{folder.name} was removed by the run meanwhile and is left out]")
            continue
        if status:
            return status
        found[folder.name] = read_results(out / folder.name)
    if not found:
        raise UserError(f"every checkpoint of {run} was removed by the run while it was read; run the command again")
    known = {**earlier(out, found), **found}
    names = sorted(known)
    show_curve([point for name in names for point in points_of(step_of(Path(name)) or 0, known[name])], out)
    say_next(f"llm-parallel evaluate --compare {quote(str(out / names[0]))} {quote(str(out / names[-1]))}")
    return 0


def earlier(out: Path, found: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Results of checkpoints that do not exist any longer, by their names; those of other settings are said."""
    wanted = settings_of(next(iter(found.values())))
    alike, others = dict[str, dict[str, Any]](), list[str]()
    for file in sorted(out.glob(f"iter_*/{RESULTS}")):
        name = file.parent.name
        if name in found:
            continue
        results = read_results(file)
        if settings_of(results) == wanted:
            alike[name] = results
        else:
            others.append(name)
    if others:
        note(f"[not in the curve, since they were evaluated with other settings: {', '.join(others)}]")
    return alike


def settings_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be the same for values of two checkpoints to stand in one curve."""
    facts = results.get(OURS, {})
    return {name: facts.get(name) for name in SAME} | {
        "tasks": results.get("versions"),
        "n-shot": results.get("n-shot"),
    }


def points_of(step: int, results: Mapping[str, Any]) -> list[Point]:
    """The values of one evaluation: of groups, and of tasks that are in none."""
    grouped = {name for members in results.get("group_subtasks", {}).values() for name in members}
    named = {**results["results"], **results.get("groups", {})}
    return [
        Point(step, task, metric, value, error)
        for task, values in named.items()
        if task not in grouped
        for metric, value, error in scores(values)
    ]


def show_curve(points: Sequence[Point], out: Path) -> None:
    """Prints the values by step, and writes them and a picture of them."""
    lines: dict[tuple[str, str], dict[int, Point]] = {}
    for point in points:
        lines.setdefault((point.task, point.metric), {})[point.step] = point
    steps = sorted({point.step for point in points})
    rows = [
        (task, metric, *(f"{100 * of[step].value:.1f}" if step in of else "" for step in steps))
        for (task, metric), of in lines.items()
    ]
    show_table("By step (shares in percent)", ("task", "metric", *(f"step {step}" for step in steps)), rows)
    with atomic_write(out / POINTS) as handle:
        handle.writelines(dumped(vars(point)) + "\n" for point in points)
    draw_curve(lines, out / PICTURE)
    say(f"The values are in {out / POINTS}, and drawn in {out / PICTURE}.")


def draw_curve(lines: Mapping[tuple[str, str], Mapping[int, Point]], path: Path) -> None:
    """Draws a line for each task and metric, with standard errors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for (task, metric), of in lines.items():
        steps = sorted(of)
        errors = [100 * (of[step].error or 0.0) for step in steps]
        values = [100 * of[step].value for step in steps]
        axes.errorbar(steps, values, errors, marker="o", markersize=3, linewidth=1, capsize=2, label=f"{task} {metric}")
    widen(axes)
    axes.set_xlabel("step")
    axes.set_ylabel("percent")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", ncols=2)
    with atomic_write(path, "wb") as handle:
        figure.savefig(handle, format="png", dpi=130)
