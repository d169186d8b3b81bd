"""Writes the sections of the report."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from llm_parallel.report.charts import charts_of, page_data
from llm_parallel.report.figures import (
    Picture,
    chart_picture,
    life_picture,
    schedule_picture,
    split_picture,
)
from llm_parallel.report.page import Section
from llm_parallel.report.pipeline_of_run import bubble_of, schedule_of
from llm_parallel.report.recovery import Life, Recovery, life_of
from llm_parallel.report.rounds import rounds_section
from llm_parallel.report.runs import Run, Summary, different_work, differing_fields, loss_at, summarize
from llm_parallel.report.summary import answers_section, settings_section, split_section, summary_section
from llm_parallel.report.tasks import tasks_section
from llm_parallel.report.text import count, unbroken, written


def runs_sections(runs: Sequence[Run], pictures: list[Picture]) -> tuple[list[Section], str]:
    """Summary, curves, answers, time, configuration, comparison and recoveries of the runs, and the data of the page's
    script; figures are added to ``pictures``."""
    summaries = [summarize(run) for run in runs]
    charts = charts_of(runs)
    curves = Section("curves", "Curves")
    drawn = [chart_picture(chart, runs) for chart in charts]
    curves.charts(drawn)
    pictures += [*drawn, split_picture(runs)]
    pipelines = Section("pipeline", "Pipeline schedule")
    for number, run in enumerate(runs):
        schedule = schedule_of(run)
        if schedule is not None:
            picture = schedule_picture(run, schedule, number)
            pictures.append(picture)
            pipelines.picture(picture)
            pipelines.text(bubble_of(run, schedule).describe(schedule.timeline.makespan))
    lives = [(run, life_of(run.events, run.step_times)) for run in runs]
    recovery = Section("recovery", "Failures and recovery")
    for number, (run, life) in enumerate(lives):
        if life is not None:
            _life(recovery, run, life, number, pictures)
    sections = [
        summary_section(runs, summaries),
        curves,
        tasks_section(runs, pictures),
        rounds_section(runs, pictures),
        answers_section(runs),
        split_section(runs),
        pipelines if pipelines.blocks else None,
        _comparison(runs, summaries) if len(runs) > 1 else None,
        recovery if recovery.blocks else None,
        settings_section(runs),
    ]
    return [section for section in sections if section is not None], page_data(runs, charts)


def _comparison(runs: Sequence[Run], summaries: Sequence[Summary]) -> Section:
    section = Section("comparison", "Comparison")
    base, first = runs[0], summaries[0]
    section.text(f"Baseline: {base.name}. A speed is compared only where a step is the same work.")
    rows, refused = [], []
    for run, one in zip(runs[1:], summaries[1:]):
        differing = different_work(base, run)
        if differing:
            refused.append(f"{run.name} is not compared in speed: {', '.join(differing[:6])} differ from {base.name}'s")
            continue
        rows.append(
            (
                *(run.name, f"{first.step_s / one.step_s:.3f}"),
                f"{one.tokens_per_s_per_gpu / first.tokens_per_s_per_gpu:.3f}",
                *(written(one.memory_gib / first.memory_gib, ".3f"), _loss_difference(base, run)),
                "yes" if _ranges_overlap(first, one) else "no",
            )
        )
    if rows:
        head = ("run", "speed", f"speed per {first.unit}", "memory", "loss", "10 to 90 % ranges of step time overlap")
        section.table(head, rows)
        section.text(
            "Ratios to the baseline, over 1 is faster or more. Loss is the difference at the last token count that both"
            " reached.",
            "faint",
        )
    section.list(refused, "flag")
    fields = differing_fields(runs)
    if fields:
        section.heading("Configuration that differs")
        section.table(
            ("field", *(run.name for run in runs)),
            [(name, *values) for name, values in fields],
            text_columns=range(len(runs) + 1),
        )
    return section


def _loss_difference(base: Run, run: Run) -> str:
    tokens = min(float(one.history.column("train/tokens")[-1]) for one in (base, run))
    return written(loss_at(run, tokens) - loss_at(base, tokens), "+.4f")


def _ranges_overlap(first: Summary, second: Summary) -> bool:
    return first.step_low_s <= second.step_high_s and second.step_low_s <= first.step_high_s


def _life(section: Section, run: Run, life: Life, number: int, pictures: list[Picture]) -> None:
    section.heading(run.name)
    done = [recovery for recovery in life.recoveries if recovery.seconds is not None]
    text = f"Trained {life.goodput:.1%} of the time from its first event to its last, stops left out"
    if life.recoveries:
        text += f"; {count(len(life.recoveries), 'fault')}, {len(done)} recovered from"
    if done:
        seconds = [recovery.seconds or 0.0 for recovery in done]
        lost = sum(recovery.lost_steps or 0 for recovery in done)
        text += f" in {statistics.median(seconds):.1f} s (median), {max(seconds):.1f} s at most"
        text += f"; {count(lost, 'step')} made again"
    section.text(text + ".")
    picture = life_picture(run, life, number)
    pictures.append(picture)
    section.picture(picture)
    if life.recoveries:
        head = ("#", "at", "step", "fault", "cause", "removed", "recovered in", "steps again", "goes on with")
        rows = [_recovery_row(index, recovery) for index, recovery in enumerate(life.recoveries, start=1)]
        section.table(head, rows, text_columns=(3, 4, 5, 8))


def _recovery_row(index: int, recovery: Recovery) -> tuple[str, ...]:
    seconds = recovery.seconds
    return (
        *(str(index), f"{recovery.at_s:.1f} s", str(recovery.step), recovery.fault, _short(recovery.cause)),
        *(", ".join(recovery.removed), "not recovered" if seconds is None else f"{seconds:.2f} s"),
        *("" if recovery.lost_steps is None else str(recovery.lost_steps), unbroken(recovery.layout)),
    )


def _short(text: str, most: int = 160) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
