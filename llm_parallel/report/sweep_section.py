"""Writes the section on sweeps: scaling efficiency, layouts compared, and what explains them."""

from __future__ import annotations

from collections.abc import Sequence

from llm_parallel.report.efficiency import Point, Series, sentence
from llm_parallel.report.figures import Picture, layout_map, scaling_pictures
from llm_parallel.report.gap import causes_of, explained, largest
from llm_parallel.report.heatmap import heat_map
from llm_parallel.report.page import Section
from llm_parallel.report.text import count, time_text, unbroken


def scaling_section(sweeps: Sequence[Series], pictures: list[Picture]) -> Section:
    """Scaling efficiency with its baseline, doubtful points, and the time lost by cause; and layouts, where several
    were measured on a number of processes."""
    scales = [series for series in sweeps if series.mode != "layouts"]
    section = Section("scaling", "Scaling efficiency" if scales else "Layouts")
    drawn = scaling_pictures(sweeps)
    for picture in drawn[:1] if scales else ():
        section.picture(picture)
    pictures += drawn
    lost = {picture.name: picture for picture in drawn[bool(scales) :]}
    for number, series in enumerate(sweeps):
        section.heading(series.name)
        section.text(sentence(series))
        if series.work:
            section.text("Work: " + ", ".join(f"{name} {value}" for name, value in series.work.items()) + ".", "faint")
        if series.mode != "layouts":
            section.table(*_scaling_table(series), text_columns=(1,))
        doubted = series.points if series.mode == "layouts" else series.best
        flags = [f"{count(point.world_size, 'process')}: {flag}" for point in doubted for flag in series.flags(point)]
        section.list(flags, "flag")
        if f"lost_{number}" in lost:
            section.picture(lost[f"lost_{number}"])
            section.text(_largest_loss(series))
        if series.mode != "layouts":
            _gap(section, series)
        for points in series.layouts:
            _compared(section, points)
        heat = heat_map(series, number)
        if heat is not None:
            pictures.append(heat)
            section.picture(heat)
        layouts = layout_map(series, number)
        if layouts is not None:
            pictures.append(layouts)
            section.picture(layouts)
    return section


def _scaling_table(series: Series) -> tuple[Sequence[str], list[Sequence[str]]]:
    head = ("processes", "layout", "step", "spread", "samples/s", "speed-up", "efficiency", "predicted", "gap")
    rows: list[Sequence[str]] = []
    for point in series.best:
        efficiency, predicted = series.efficiency(point), series.predicted(point)
        rows.append(
            (
                *(f"{point.world_size:,}", unbroken(point.layout) or "—", time_text(point.step_s)),
                *("—" if point.spread is None else f"{point.spread:.1%}", f"{point.batch / point.step_s:,.4g}"),
                *(f"{efficiency * point.world_size / series.baseline.world_size:.2f}", f"{efficiency:.1%}"),
                "—" if predicted is None else f"{predicted:.1%}",
                "—" if predicted is None else f"{100 * (efficiency - predicted):+.1f} points",
            )
        )
    return head, rows


def _gap(section: Section, series: Series) -> None:
    """Adds a table of measured and predicted losses by cause on the most processes, if the sweep has predictions by
    cause."""
    last = series.best[-1]
    causes = causes_of(series, last)
    if not causes:
        return
    section.table(
        (f"lost per step on {count(last.world_size, 'process')}", "predicted", "measured", "gap"),
        [
            (
                *(cause.name, "—" if cause.predicted_s is None else time_text(cause.predicted_s)),
                "not measured" if cause.measured_s is None else time_text(cause.measured_s),
                "—" if cause.gap_s is None else time_text(cause.gap_s),
            )
            for cause in causes
        ],
    )
    section.text(explained(causes))


def _largest_loss(series: Series) -> str:
    last, base = series.best[-1], series.baseline
    growth = 1.0 if series.mode == "weak" else last.world_size / base.world_size
    whole = last.step_s - base.step_s / growth
    text = (
        f"On {count(last.world_size, 'process')} a step takes {time_text(abs(whole))}"
        f" {'more' if whole >= 0 else 'less'} than the ideally scaled baseline"
    )
    name, seconds = largest(series.lost(last), whole >= 0)
    if not name:
        return f"{text}; no part {'grew' if whole >= 0 else 'became shorter'}."
    return f"{text}; the largest part is {name} with {time_text(abs(seconds))} {'more' if whole >= 0 else 'less'}."


def _compared(section: Section, points: Sequence[Point]) -> None:
    """Adds a table of the layouts on one number of processes: each beside the fastest, and in what it is slower."""
    fastest = points[0]
    section.table(
        (f"layout on {count(fastest.world_size, 'process')}", "step", "spread", "speed", "predicted speed", "why"),
        [
            (
                *(unbroken(point.layout) or "—", time_text(point.step_s)),
                *("—" if point.spread is None else f"{point.spread:.1%}", f"{point.rate / fastest.rate:.1%}"),
                *(_predicted_speed(point, fastest), "the fastest" if point is fastest else slower_by(point, fastest)),
            )
            for point in points
        ],
        text_columns=(0, 5),
    )
    order = ranked(points)
    if order:
        section.text(order)


def _predicted_speed(point: Point, fastest: Point) -> str:
    if point.predicted_s is None or fastest.predicted_s is None:
        return "—"
    return f"{point.batch / point.predicted_s / (fastest.batch / fastest.predicted_s):.1%}"


def slower_by(point: Point, fastest: Point) -> str:
    """In what a layout is slower than the fastest one: the part of the step, for the fastest one's samples, that takes
    most time more. A difference within the spreads of both is none."""
    scale = fastest.batch / point.batch
    whole = scale * point.step_s - fastest.step_s
    spread = max(point.spread or 0.0, fastest.spread or 0.0) * fastest.step_s
    if whole <= spread:
        return f"not distinguishable: {time_text(whole)} slower, measurements spread over {time_text(spread)}"
    names = dict.fromkeys([*fastest.parts_s, *point.parts_s]) if fastest.parts_s and point.parts_s else {}
    more = {name: scale * point.parts_s.get(name, 0.0) - fastest.parts_s.get(name, 0.0) for name in names}
    name, seconds = largest(more, True)
    return f"{time_text(whole)} slower" + (f", most in {name} with {time_text(seconds)} more" if name else "")


def ranked(points: Sequence[Point]) -> str:
    """A sentence on whether the planner orders the layouts as they were measured; empty without predictions."""
    rates = [(point.rate, point.batch / point.predicted_s) for point in points if point.predicted_s]
    pairs = [(one, other) for index, one in enumerate(rates) for other in rates[index + 1 :]]
    if len(rates) < len(points) or not pairs:
        return ""
    right = sum(one[1] > other[1] for one, other in pairs)
    best = max(points, key=lambda point: point.batch / (point.predicted_s or 1.0))
    text = f"The planner orders {right} of {len(pairs)} pairs of layouts as they were measured"
    if best is points[0]:
        return f"{text}, and its fastest is the fastest."
    return f"{text}; its fastest, {best.layout}, has {best.rate / points[0].rate:.1%} of the fastest one's speed."
