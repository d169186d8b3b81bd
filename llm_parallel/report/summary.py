"""The main numbers of runs: tiles for one run, a table for several; and what the models wrote."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from llm_parallel.metrics.history import short_layout
from llm_parallel.metrics.time_split import PART_COLOURS, TIME_PARTS
from llm_parallel.model.flops import CONVENTIONS
from llm_parallel.report.page import Answer, Bar, Part, Section, Tile
from llm_parallel.report.runs import Run, Summary, time_split
from llm_parallel.report.settings import settings, sources
from llm_parallel.report.text import big, changes, count, plural, span, time_text, written

MOST_ANSWERS = 12
"""Most answers of one run that are shown, the newest ones."""
MEMORY = "Memory: the largest peak of rank 0, on a CPU the resident set of the process."


def summary_section(runs: Sequence[Run], summaries: Sequence[Summary]) -> Section:
    """Tiles of one run, or a table of several."""
    section = Section("summary", "Summary")
    if len(runs) == 1:
        section.tiles(_tiles(runs[0], summaries[0]))
    else:
        section.table(("", *(run.name for run in runs)), _lines(summaries))
    section.text(
        "Losses are in nats per token; the last step's is what the console printed. Step time, tokens/s and MFU are"
        f" medians over all steps but the first after each start. {MEMORY}",
        "faint",
    )
    if any(math.isfinite(one.mfu) for one in summaries):
        section.text(
            f"MFU: {CONVENTIONS['model']}; divided by the peak that the run's configuration or chip has.", "faint"
        )
    return section


def _tiles(run: Run, one: Summary) -> list[Tile]:
    step = f"after step {one.steps:,}"
    tiles = [Tile("loss", written(one.last_loss, ".4f"), f"{step}; mean of the last twentieth {one.loss:.4f}")]
    if run.history.evals:
        lowest, at = one.best_eval
        best = "the lowest so far" if at == one.eval_step else f"lowest {lowest:.4f} after step {at:,}"
        ppl = f"perplexity {math.exp(min(one.eval_loss, 700.0)):.4g}; " if "eval/ppl" in run.history.evals[-1] else ""
        note = f"after step {one.eval_step:,}; {ppl}{best}"
        tiles.append(Tile("held-out loss", written(one.eval_loss, ".4f"), note))
    end = "" if one.total_steps is None else ("all done" if one.steps >= one.total_steps else "not all done")
    of = "" if one.total_steps is None else f"of {one.total_steps:,}, {end}"
    tiles.append(Tile("steps", f"{one.steps:,}", of))
    epochs = "" if one.trained_s is None else f"in {span(one.trained_s)} of steps"
    tiles.append(Tile("tokens", big(one.tokens), epochs))
    rate = written(one.tokens_per_s_per_gpu, ",.0f")
    tiles.append(Tile(f"tokens/s/{one.unit}", rate, f"on {count(one.sizes[-1], one.unit) if one.sizes else '—'}"))
    tiles.append(
        Tile(
            "step time",
            time_text(one.step_s),
            f"{time_text(one.step_low_s)} to {time_text(one.step_high_s)} (10 to 90 %)",
        )
    )
    if math.isfinite(one.mfu):
        tiles.append(Tile("MFU", written(one.mfu, ".1%"), "of the peak"))
    tiles.append(Tile("memory", written(one.memory_gib, ".2f", " GiB"), "peak of rank 0"))
    marks = run.history.marks()
    skipped = [mark.step for mark in marks if mark.kind == "skip"]
    tiles.append(Tile("skipped steps", str(one.skipped), f"the last one {skipped[-1]:,}" if skipped else ""))
    restarts = [mark for mark in marks if mark.kind != "skip"]
    changed = sum(mark.kind == "layout" for mark in restarts)
    note = f"{changed} with another layout, the last after step {restarts[-1].step:,}" if restarts else ""
    tiles.append(Tile("restarts", str(len(restarts)), note))
    tiles.append(Tile("layout", short_layout(one.layouts[-1]) if one.layouts else "—", one.device))
    return tiles


def _lines(summaries: Sequence[Summary]) -> list[tuple[str, ...]]:
    unit = summaries[0].unit
    lines = {
        "steps": [f"{one.steps:,}" for one in summaries],
        "tokens": [big(one.tokens) for one in summaries],
        "loss of the last step": [written(one.last_loss, ".4f") for one in summaries],
        "mean loss of the last twentieth": [written(one.loss, ".4f") for one in summaries],
        "held-out loss": [written(one.eval_loss, ".4f") for one in summaries],
        "device": [one.device or "—" for one in summaries],
        plural(unit): [changes(list(map(str, one.sizes))) for one in summaries],
        "layout": [changes(one.layouts) for one in summaries],
        "step time": [time_text(one.step_s) for one in summaries],
        "10 to 90 % of steps": [f"{time_text(one.step_low_s)} to {time_text(one.step_high_s)}" for one in summaries],
        f"tokens/s/{unit}": [written(one.tokens_per_s_per_gpu, ",.0f") for one in summaries],
        "MFU": [written(one.mfu, ".1%") for one in summaries],
        "memory": [written(one.memory_gib, ".2f", " GiB") for one in summaries],
        "skipped steps": [str(one.skipped) for one in summaries],
    }
    return [(name, *values) for name, values in lines.items() if set(values) != {"—"}]


def answers_section(runs: Sequence[Run]) -> Section | None:
    """What the models wrote; None if nothing is recorded."""
    section = Section("answers", "What the model wrote")
    for run in runs:
        answers = run.history.answers
        if not answers:
            continue
        if len(runs) > 1:
            section.heading(run.name)
        if len(answers) > MOST_ANSWERS:
            section.text(f"The last {MOST_ANSWERS} of {len(answers):,} recorded.", "faint")
        section.answers([_answer(record) for record in answers[: -MOST_ANSWERS - 1 : -1]])
    return section if section.blocks else None


def _answer(record: dict[str, object]) -> Answer:
    ending = "" if record.get("stopped", True) else ", cut at its longest length"
    prompt, answer = str(record.get("prompt")), str(record.get("answer"))
    # A text that was written on is shown as one; a question and its answer are two lines.
    between = "" if prompt[-1:].isspace() or answer[:1].isspace() else "\n"
    return Answer(prompt + between, answer, f"after step {record.get('step'):,}{ending}")


def split_section(runs: Sequence[Run]) -> Section:
    """Bars of where the time of a step goes, and the same as a table."""
    section = Section("time", "Where the time of a step goes")
    splits = [time_split(run.history) for run in runs]
    parts = [part for part in TIME_PARTS if any(split.get(part) for split in splits)]
    longest = max(sum(split.values()) for split in splits)
    legend = [(part, PART_COLOURS[part]) for part in parts]
    bars = []
    for run, split in zip(runs, splits):
        whole = sum(split.values())
        shares = {part: split[part] / whole for part in parts if split.get(part)}
        made = [Part(part, share, f"{share:.0%}", PART_COLOURS[part]) for part, share in shares.items()]
        label = f"{run.name}: {time_text(whole)} a step"
        bars.append(Bar(label, max(2.0, 100 * whole / longest), made, legend))
    section.bars("time_split", "Mean of a step: over all processes where the run recorded them, else of rank 0", bars)
    if len(runs) == 1:
        whole = sum(splits[0].values())
        rows = [(part, time_text(splits[0][part]), f"{splits[0][part] / whole:.1%}") for part in parts]
        section.table(("part", "time", "share"), rows)
    else:
        section.table(("run", *parts), [(run.name, *_shares(split, parts)) for run, split in zip(runs, splits)])
    return section


def _shares(split: Mapping[str, float], parts: Sequence[str]) -> list[str]:
    whole = sum(split.values())
    return [f"{time_text(split.get(part, 0.0))} ({split.get(part, 0.0) / whole:.0%})" for part in parts]


def settings_section(runs: Sequence[Run]) -> Section | None:
    """What each run was configured with: first what differs from the defaults, and its sources; None without
    configuration."""
    section = Section("configuration", "Configuration")
    for run in runs:
        if not run.config:
            continue
        if len(runs) > 1:
            section.heading(run.name)
        differing, every = settings(run)
        section.table(("differs from its default", "value", "default"), differing, text_columns=(0, 1, 2))
        section.details(f"All {len(every)} fields", ("field", "value"), every)
        head, rows, remark = sources(run)
        if rows:
            section.table(head, rows, text_columns=(0, 1))
        if remark:
            section.text(remark, "faint")
    return section if section.blocks else None
