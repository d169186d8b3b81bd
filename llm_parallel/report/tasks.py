"""The section of a report about the tasks that runs scored while they trained (``evaluate.tasks``)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from llm_parallel.metrics.step_line import score_text
from llm_parallel.metrics.task_plots import TaskLine, draw_task, scored_tasks, task_lines
from llm_parallel.report.figures import Picture, new_figure
from llm_parallel.report.page import Section
from llm_parallel.report.runs import Run
from llm_parallel.report.text import count

HEAD = ("task", "metric", "documents", "first", "last", "change", "best")


def tasks_section(runs: Sequence[Run], pictures: list[Picture]) -> Section | None:
    """A curve for each task, and the first and last scores of each run; None if no run scored any. Figures are added to
    ``pictures``."""
    histories = [run.history for run in runs]
    tasks = scored_tasks(histories)
    if not tasks:
        return None
    section = Section("tasks", "Scores of tasks")
    drawn = []
    for number, task in enumerate(tasks):
        figure, axes = new_figure(3.6)
        figure.set_size_inches(6.4, 3.6)  # half as wide on a large page, with text of the same size
        draw_task(axes, histories, task)
        axes.set_xlabel("steps")
        figure.legend(frameon=False, loc="outside lower center", ncols=2, fontsize=9)
        drawn.append(Picture(f"task_{number}", f"{task} by step, with standard errors", figure, wide=False))
    section.charts(drawn)
    pictures += drawn
    for run in runs:
        lines = task_lines(run.history)
        if not lines:
            continue
        if len(runs) > 1:
            section.heading(run.name)
        section.table(HEAD, [_row(line) for line in lines], text_columns=(0, 1))
        section.text(
            f"{count(len(run.history.tasks), 'scoring')} of the same documents, the first after step "
            f"{run.history.tasks[0]['step']:,}, the last after step {run.history.tasks[-1]['step']:,}. Prompts and "
            "answers lie in the run's folder evaluations, a folder for each step; `llm-parallel evaluate --compare` of "
            "two of them names the documents whose answers changed.",
            "faint",
        )
    return section


def _row(line: TaskLine) -> tuple[str, ...]:
    first, last = float(line.values[0]), float(line.values[-1])
    change = f"{100 * (last - first):+.1f} points" if line.is_share else f"{last - first:+.4g}"
    best = int(line.values.argmax())
    return (
        *(line.task, line.metric, f"{line.documents:,}", _with_error(line, 0), _with_error(line, -1)),
        "" if len(line.values) == 1 else change,
        f"{score_text(float(line.values[best]))} after step {int(line.steps[best]):,}",
    )


def _with_error(line: TaskLine, place: int) -> str:
    error = float(line.errors[place])
    return score_text(float(line.values[place])) + (f" ± {score_text(error)}" if math.isfinite(error) else "")
