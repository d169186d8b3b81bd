"""Curves over the steps of runs, as data: drawn once by matplotlib, and by the page's script, which zooms."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

import numpy as np

from llm_parallel.metrics.history import History
from llm_parallel.metrics.plots import clip_limit, smoothed
from llm_parallel.report.runs import Run, steady

MOST_POINTS = 1200
"""Most points of a curve, so that a long run does not make a page of many megabytes."""
Kind = Literal["line", "faint", "dots"]


@dataclass(frozen=True)
class Curve:
    """One number of one run. ``kind``: ``line``, ``faint`` for unsmoothed values behind a line, ``dots`` for values of
    evaluations."""

    label: str
    run: int
    values: np.ndarray
    """float64, one for each step of the run, or for each evaluation if they are dots."""
    kind: Kind = "line"
    colour: int = 0


@dataclass(frozen=True)
class Chart:
    """Curves with one axis. ``form``: how a value is written (``loss``, ``share``, ``rate``, ``number``)."""

    name: str
    title: str
    unit: str
    curves: Sequence[Curve]
    form: Literal["loss", "share", "rate", "number"] = "number"
    from_zero: bool = False
    log: bool = False
    wide: bool = False
    """Whether it takes the whole width of a large page."""
    limits: Sequence[tuple[float, str]] = field(default_factory=tuple)
    """Horizontal lines with their labels."""


def charts_of(runs: Sequence[Run]) -> list[Chart]:
    """Loss, learning rate, gradient norm, throughput, MFU if it is known, step time, memory, and whatever numbers the
    runs' objectives recorded; each with all runs."""
    unit = runs[0].history.unit
    found = [_loss(runs), _one(runs, "lr", "Learning rate", "learning rate", "train/lr", from_zero=True)]
    found.append(_gradient_norm(runs))
    rates = [run.history.column("perf/tokens_per_s_per_gpu") for run in runs]
    text = f"tokens/s/{unit}"
    found.append(
        _one(runs, "throughput", f"Throughput, {text}", text, rates, form="rate", from_zero=True, steady_=True)
    )
    if any(np.isfinite(run.history.column("perf/mfu")).any() for run in runs):
        share = "share of the peak"
        found.append(_one(runs, "mfu", f"MFU, {share}", share, "perf/mfu", form="share", from_zero=True, steady_=True))
    found.append(_one(runs, "memory", "Memory, peak of rank 0", "GiB", "memory/allocated_gib", from_zero=True))
    return [*found, *_statistics(runs)]


def _loss(runs: Sequence[Run]) -> Chart:
    curves = []
    for index, run in enumerate(runs):
        loss, before = run.history.column("train/loss"), "" if len(runs) == 1 else f"{run.name}: "
        curves.append(Curve(f"{before}each step", index, loss, "faint", index))
        curves.append(Curve(f"{before}smoothed", index, smoothed(loss), "line", index))
        if run.history.evals:
            held_out = run.history.eval_column("eval/loss")
            curves.append(Curve(f"{before}held out", index, held_out, "dots", 1 if len(runs) == 1 else index))
    return Chart("loss", "Loss", "loss, nats per token", curves, "loss", wide=True)


def _one(
    runs: Sequence[Run],
    name: str,
    title: str,
    unit: str,
    column: str | Sequence[np.ndarray],
    *,
    form: Literal["loss", "share", "rate", "number"] = "number",
    from_zero: bool = False,
    steady_: bool = False,
) -> Chart:
    """A chart of one number of each run; ``steady_``: without the first step after each start, which warms up."""
    curves = []
    for index, run in enumerate(runs):
        values = run.history.column(column) if isinstance(column, str) else column[index]
        if steady_:
            values = np.where(steady(run.history), values, np.nan)
        if np.isfinite(values).any():
            curves.append(Curve(run.name if len(runs) > 1 else unit, index, values, "line", index))
    return Chart(name, title, unit, curves, form, from_zero)


def _gradient_norm(runs: Sequence[Run]) -> Chart:
    columns = [run.history.column("train/grad_norm") for run in runs]
    values = np.concatenate(columns)
    values = values[np.isfinite(values) & (values > 0)]
    log = bool(len(values)) and bool(values.max() > 20 * values.min())
    limits = sorted({limit for run in runs if (limit := clip_limit(run.history))})
    base = _one(runs, "grad_norm", "Gradient norm before clipping", "gradient norm", columns)
    named = [(limit, f"clipped over {limit:g}") for limit in limits]
    return Chart(base.name, base.title, base.unit, base.curves, log=log, limits=named)


def _statistics(runs: Sequence[Run]) -> list[Chart]:
    """A chart for each kind of number beside loss, rates and memory."""
    found = []
    kinds = dict.fromkeys(kind for run in runs for kind in run.history.statistics())
    for number, kind in enumerate(kinds):
        curves: list[Curve] = []
        colours: dict[tuple[int, str], int] = {}
        for index, run in enumerate(runs):
            for name in run.history.statistics().get(kind, ()):
                bare = name.partition("/")[2]
                label = bare.removeprefix(f"{kind}/")
                label = label if len(runs) == 1 else f"{run.name}: {label}"
                colour = colours.setdefault((index, bare), len(colours))
                if name.startswith("eval/"):
                    curves.append(Curve(f"{label}, held out", index, run.history.eval_column(name), "dots", colour))
                    continue
                values = run.history.column(name)
                curves.append(Curve(f"{label}, each step", index, values, "faint", colour))
                curves.append(Curve(label, index, smoothed(values), "line", colour))
        title = "Loss by part" if kind == "loss" else kind[:1].upper() + kind[1:].replace("_", " ")
        found.append(Chart(f"statistic_{number}", title, kind, curves))
    return found


def thin(count: int, most: int = MOST_POINTS) -> np.ndarray:
    """Indices of about ``most`` of ``count`` points, including the last one."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int))


def page_data(runs: Sequence[Run], charts: Sequence[Chart]) -> str:
    """Everything that the page's script draws, as JSON that may stand in a ``script`` element."""
    data = {
        "axis": "step" if len(runs) == 1 else "tokens",
        "runs": [_axes(run) for run in runs],
        "charts": {chart.name: _chart(chart, runs) for chart in charts},
    }
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _axes(run: Run) -> dict[str, Any]:
    history = run.history
    kept = thin(len(history.steps))
    steps, evals = history.column("step")[kept], history.eval_column("step")
    seconds = _seconds(history)
    marks = history.marks()
    at = np.array([mark.step for mark in marks], float)

    def axes(where: np.ndarray) -> dict[str, list[float | None]]:
        found = {"step": _numbers(where), "tokens": _numbers(history.tokens_at(where))}
        if seconds is not None:
            found["seconds"] = _numbers(np.interp(where, history.column("step"), seconds))
        return found

    named = [{"kind": mark.kind, "text": mark.text} for mark in marks]
    return {"name": run.name, "steps": axes(steps), "evals": axes(evals), "marks": named, "at": axes(at)}


def _seconds(history: History) -> np.ndarray | None:
    """Seconds of wall time from the first recorded step to each step, stops included; None if times are missing."""
    try:
        times = np.array([datetime.fromisoformat(record["time"]).timestamp() for record in history.steps])
    except (KeyError, TypeError, ValueError):
        return None
    return np.maximum.accumulate(times) - times[0]


def _chart(chart: Chart, runs: Sequence[Run]) -> dict[str, Any]:
    curves = []
    for curve in chart.curves:
        values = curve.values
        if curve.kind != "dots":
            values = values[thin(len(runs[curve.run].history.steps))]
        curves.append(
            {"label": curve.label, "run": curve.run, "kind": curve.kind, "colour": curve.colour, "y": _numbers(values)}
        )
    return {
        "unit": chart.unit,
        "form": chart.form,
        "zero": chart.from_zero,
        "log": chart.log,
        "curves": curves,
        "limits": [{"y": y, "label": label} for y, label in chart.limits],
    }


def _numbers(values: np.ndarray) -> list[float | None]:
    """The values with six significant digits; whole numbers whole."""
    found: list[float | None] = []
    for value in values.tolist():
        if not math.isfinite(value):
            found.append(None)
        else:
            found.append(int(value) if value == int(value) else float(f"{value:.6g}"))
    return found
