"""Draws the report's figures with matplotlib and turns them into SVG for the page."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_parallel.metrics.time_split import PART_COLOURS, TIME_PARTS
from llm_parallel.report.charts import Chart, thin
from llm_parallel.report.efficiency import Series
from llm_parallel.report.pipeline_of_run import Schedule
from llm_parallel.report.recovery import Life
from llm_parallel.report.runs import Run, time_split

# Colours of Okabe and Ito, which colour-blind people can distinguish.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SPAN_COLOURS = {
    "starting": "#56B4E9",
    "training": "#009E73",
    "fault unseen": "#CC79A7",
    "recovering": "#D55E00",
    "waiting": "#E69F00",
    "stopped": "#DDDDDD",
}
MOST_POINTS = 400
"""Most points of a curve in a picture, which the page's script replaces by one with more points."""
INKS = {"#000000": "currentColor", "#222222": "currentColor", "#444444": "currentColor", "#b0b0b0": "var(--faint)"}
INKS |= {colour.lower(): f"var(--c{index})" for index, colour in enumerate(COLOURS)}
"""What matplotlib's colours become on a page that may be dark; white is left out where it is no text."""


@dataclass(frozen=True)
class Picture:
    """A figure with its name, for files, and its caption, which also describes it to readers who can't see it."""

    name: str
    caption: str
    figure: Any
    is_chart: bool = False
    """Whether the page's script draws it anew."""
    wide: bool = True
    """Whether it takes the whole width of a large page."""

    def svg(self) -> str:
        """The figure as an ``svg`` element as wide as the page, with text as text, and identifiers that no other figure
        has."""
        import matplotlib

        # Text that stays text can be searched and read aloud; with a fixed salt the same figure gives the same bytes.
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.name}):
            buffer = io.StringIO()
            self.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        text = buffer.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
        text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
        used = set(re.findall(r"#([\w.-]+)", text))
        text = re.sub(r' id="([\w.-]+)"', lambda match: match.group() if match.group(1) in used else "", text)
        # Figures on one page must not share the identifiers of their clip paths and markers.
        text = re.sub(r'id="([\w.-]+)"', rf'id="{self.name}-\1"', text)
        text = re.sub(r'(url\(#|href="#)([\w.-]+)', rf"\1{self.name}-\2", text)
        text = re.sub(
            r"(fill|stroke): (#[0-9a-f]{6})", lambda found: f"{found[1]}: {INKS.get(found[2], found[2])}", text
        )
        text = re.sub(r"(<path[^>]*style=\"[^\"]*fill: )#ffffff", r"\1none", text)
        return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(self.caption)}"', 1)

    def png(self) -> bytes:
        """The figure as a PNG file."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=130)
        return buffer.getvalue()


def new_figure(height: float = 3.6, panels: int = 1) -> tuple[Any, Any]:
    """A figure as wide as the page, and the axes of its panels: one, or an array."""
    from matplotlib.figure import Figure  # importing it takes 0.4 s

    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots(panels, 1)
    for panel in np.atleast_1d(axes):
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def chart_picture(chart: Chart, runs: Sequence[Run]) -> Picture:
    """Draws curves over steps, or over tokens if there are several runs."""
    figure, axes = new_figure(4.0 if chart.wide else 3.2)
    axis = "step" if len(runs) == 1 else "tokens"
    for curve in chart.curves:
        history = runs[curve.run].history
        steps = history.eval_column("step") if curve.kind == "dots" else history.column("step")
        kept = thin(len(steps), MOST_POINTS)
        x = steps if axis == "step" else history.tokens_at(steps)
        colour, style = _colour(curve.colour)
        style = style if len(runs) > 1 and curve.kind == "line" else "-"
        looks: dict[str, Any] = {"alpha": 0.3, "linewidth": 0.7}
        if curve.kind != "faint":
            looks = {"linewidth": 1.6, "label": curve.label} | ({"marker": "o"} if curve.kind == "dots" else {})
        axes.plot(x[kept], curve.values[kept], color=colour, linestyle=style, **looks)
    for limit, label in chart.limits:
        axes.axhline(limit, color="#555555", linestyle="-.", linewidth=1, label=label)
    for run in runs:
        for mark in run.history.marks():
            at, name = (mark.step if axis == "step" else mark.tokens), mark.kind
            if name == "skip":
                axes.plot([at], [0.02], "x", color="#CC0000", markersize=4, transform=axes.get_xaxis_transform())
            else:
                axes.axvline(at, color="#882255" if name == "layout" else "#555555", linestyle="--", linewidth=1)
    if chart.log:
        axes.set_yscale("log")
    elif chart.from_zero:
        axes.set_ylim(bottom=0)
    axes.set_xlabel("steps" if axis == "step" else "tokens")
    axes.set_ylabel(chart.unit)
    axes.xaxis.set_major_formatter(_engineering())
    if axes.get_legend_handles_labels()[1]:
        figure.legend(frameon=False, loc="outside lower center", ncols=3, fontsize=9)
    return Picture(chart.name, chart.title, figure, is_chart=True, wide=chart.wide)


def _colour(index: int) -> tuple[str, str]:
    """Colour and line style of the run of that number; different styles keep curves on top of each other visible."""
    return COLOURS[index % len(COLOURS)], ("-", "--", ":", "-.")[index % 4]


def split_picture(runs: Sequence[Run]) -> Picture:
    """Draws where the time of a step goes, a bar for each run."""
    figure, axes = new_figure(1.3 + 0.45 * len(runs))
    splits = [time_split(run.history) for run in runs]
    left = np.zeros(len(runs))
    for part in TIME_PARTS:
        widths = np.array([1e3 * split.get(part, 0.0) for split in splits])
        if not widths.any():
            continue
        bars = axes.barh(range(len(runs)), widths, left=left, color=PART_COLOURS[part], label=part, height=0.6)
        totals = [1e3 * sum(split.values()) for split in splits]
        shares = [f"{w / total:.0%}" if w > 0.06 * max(totals) else "" for w, total in zip(widths, totals)]
        axes.bar_label(bars, shares, label_type="center", fontsize=8)
        left = left + widths
    axes.set_yticks(range(len(runs)), [run.name for run in runs])
    axes.invert_yaxis()
    axes.set_xlabel("mean milliseconds of a step: over all processes where the run recorded them, else of rank 0")
    axes.grid(axis="y", visible=False)
    figure.legend(*axes.get_legend_handles_labels(), ncols=6, frameon=False, loc="outside upper center")
    return Picture("time_split", "Where the time of a step goes", figure)


def life_picture(run: Run, life: Life, number: int) -> Picture:
    """Draws the spans of an elastic run as a bar, its faults as marks, and below them the number of processes that
    trained."""
    from matplotlib.patches import Patch

    figure, (bar, processes) = new_figure(3.7, panels=2)
    bar.sharex(processes)
    for span in life.spans:
        width = span.end_s - span.begin_s
        bar.barh(0, width, left=span.begin_s, color=SPAN_COLOURS[span.kind], height=0.8, linewidth=0)
    for index, recovery in enumerate(life.recoveries, start=1):
        bar.annotate(str(index), (recovery.at_s, 0.45), ha="center", va="bottom", fontsize=8, color="#444444")
        bar.plot([recovery.at_s] * 2, [-0.45, 0.45], color="#222222", linewidth=0.8)
    bar.set_yticks([])
    bar.set_ylim(-0.5, 0.9)
    bar.spines["left"].set_visible(False)
    bar.grid(visible=False)
    bar.tick_params(labelbottom=False)
    edges = [edge for span in life.spans for edge in (span.begin_s, span.end_s)]
    counts = [count for span in life.spans for count in (span.processes, span.processes)]
    processes.fill_between(edges, counts, color="#009E73", alpha=0.3, linewidth=0)
    processes.plot(edges, counts, color="#009E73", linewidth=1.2)
    processes.set_ylim(0, 1.2 * max([1, *counts]))
    processes.yaxis.get_major_locator().set_params(integer=True)
    processes.set_ylabel("training\nprocesses")
    processes.set_xlabel("seconds since the start")
    kinds = dict.fromkeys(span.kind for span in life.spans)
    patches = [Patch(color=SPAN_COLOURS[kind], label=f"{kind} {life.seconds(kind):,.1f} s") for kind in kinds]
    figure.legend(handles=patches, ncols=3, frameon=False, loc="outside upper center")
    return Picture(f"life_{number}", f"Life of {run.name}: numbers are the faults of the table", figure)


def schedule_picture(run: Run, schedule: Schedule, number: int) -> Picture:
    """Draws forwards and backwards of every stage over one step, later model chunks darker."""
    figure, axes = new_figure(1.2 + 0.32 * schedule.stages)
    for event in schedule.timeline.events:
        light = 1.0 - 0.45 * event.chunk / max(1, schedule.chunks)
        colour = "#D9A441" if event.backward else "#56B4E9"
        span = [(1e3 * event.begin, 1e3 * (event.end - event.begin))]
        axes.broken_barh(
            span, (event.stage - 0.42, 0.84), facecolor=colour, alpha=light, edgecolor="white", linewidth=0.4
        )
    axes.set_yticks(range(schedule.stages), [f"stage {stage}" for stage in range(schedule.stages)])
    axes.invert_yaxis()
    axes.set_xlim(0, 1e3 * schedule.timeline.makespan)
    axes.set_xlabel("milliseconds")
    axes.grid(axis="y", visible=False)
    kind = "1F1B" if schedule.chunks == 1 else f"interleaved 1F1B with {schedule.chunks} chunks"
    caption = (
        f"Pipeline of {run.name}: {schedule.stages} stages, {schedule.micro_batches} micro batches, {kind}; forward"
        " blue, backward ochre. Simulated with equal stages and a backward of two forwards, scaled to the measured"
        f" {1e3 * schedule.timeline.makespan:.3g} ms of forward and backward; bubble {schedule.timeline.bubble:.1%}"
    )
    return Picture(f"schedule_{number}", caption, figure)


def scaling_pictures(series: Sequence[Series]) -> list[Picture]:
    """Draws measured and predicted efficiency of all series over the number of processes, and for each series the time
    lost by part. Series of a single number of processes have neither."""
    scaled = {index: one for index, one in enumerate(series) if one.mode != "layouts"}
    if not scaled:
        return []
    figure, axes = new_figure(4.0)
    for index, one in scaled.items():
        colour, _ = _colour(index)
        sizes = [point.world_size for point in one.best]
        measured = [one.efficiency(point) for point in one.best]
        noise = [measured[i] * (point.spread or 0.0) / 2 for i, point in enumerate(one.best)]
        label = f"{one.name}, measured" if one.mode in one.name else f"{one.name}: {one.mode}, measured"
        axes.errorbar(sizes, measured, noise, color=colour, marker="o", capsize=3, label=label)
        others = [point for point in one.points if point not in one.best]
        axes.plot(*([p.world_size for p in others], [one.efficiency(p) for p in others], "x"), color=colour, alpha=0.5)
        predicted = [one.predicted(point) for point in one.best]
        if any(value is not None for value in predicted):
            values = [np.nan if value is None else value for value in predicted]
            axes.plot(sizes, values, color=colour, linestyle=":", marker=".", label=f"{one.name}, predicted")
        for point in one.best:
            if any(flag.startswith(("superlinear", "noisy")) for flag in one.flags(point)):
                at = (point.world_size, one.efficiency(point))
                axes.annotate("?", at, xytext=(6, 6), textcoords="offset points", color=colour, fontsize=12)
    axes.axhline(1.0, color="#888888", linewidth=0.8)
    axes.set_xscale("log", base=2)
    sizes = sorted({point.world_size for one in scaled.values() for point in one.points})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_ylim(0, None)
    axes.set_xlabel("processes")
    axes.set_ylabel("speed per process / baseline's")
    axes.legend(frameon=False, loc="lower left")
    caption = "Scaling efficiency, fastest layout of each size; crosses are other layouts, ? is doubtful"
    return [Picture("scaling", caption, figure), *(_lost(one, n) for n, one in scaled.items() if _has_parts(one))]


def _has_parts(series: Series) -> bool:
    return len(series.best) > 1 and all(series.lost(point) for point in series.best[1:])


def _lost(series: Series, number: int) -> Picture:
    figure, axes = new_figure(3.2)
    names = list(dict.fromkeys(name for p in series.best for name, lost in series.lost(p).items() if abs(lost) > 1e-6))
    up, down = np.zeros(len(series.best)), np.zeros(len(series.best))
    for index, name in enumerate(names):
        values = np.array([1e3 * series.lost(point).get(name, 0.0) for point in series.best])
        base = np.where(values >= 0, up, down)
        axes.bar(range(len(values)), values, bottom=base, color=_colour(index)[0], label=name, width=0.6)
        up, down = up + np.maximum(values, 0), down + np.minimum(values, 0)
    axes.axhline(0, color="#888888", linewidth=0.8)
    axes.set_xticks(range(len(series.best)), [f"{point.world_size:,}" for point in series.best])
    axes.set_xlabel("processes")
    axes.set_ylabel("ms per step over ideal")
    axes.legend(frameon=False, loc="upper left")
    return Picture(
        f"lost_{number}", f"{series.name}: what each step takes over the ideally scaled baseline, by cause", figure
    )


def layout_map(series: Series, number: int) -> Picture | None:
    """Draws the speeds of the layouts on that number of processes that has most of them; None if none has three."""
    by_size: dict[int, list[Any]] = {}
    for point in series.points:
        by_size.setdefault(point.world_size, []).append(point)
    size, points = max(by_size.items(), key=lambda item: len(item[1]))
    if len(points) < 3:
        return None
    figure, axes = new_figure(1.2 + 0.3 * len(points))
    rates = [point.rate for point in points]
    bars = axes.barh(range(len(points)), rates, color=[COLOURS[0], *["#9ecae1"] * (len(points) - 1)], height=0.7)
    axes.bar_label(bars, [f"{rate / rates[0]:.0%}" for rate in rates], fontsize=8, padding=4)
    axes.margins(x=0.1)
    axes.set_yticks(range(len(points)), [point.layout or "layout not given" for point in points], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"samples/s per process on {size} processes")
    return Picture(f"layouts_{number}", f"{series.name}: layouts on {size} processes, fastest first", figure)


def _engineering() -> Any:
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")
