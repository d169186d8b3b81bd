"""Scaling efficiency from a sweep, a CSV with one row per measurement. The rows of a series must be of the same
work."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llm_parallel.errors import UserError

REQUIRED = ("world_size", "global_batch_size", "step_time_s")
SAME_WORK = (
    *("model", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_kv_heads", "vocab_size"),
    *("seq_length_tokens", "precision", "device_name", "backend", "mfu_convention"),
)
"""Columns that must have the same value in all rows of a series, if they are present."""
LAYOUT = ("tp", "cp", "pp", "vpp", "dp", "micro_batch_size")
SUPERLINEAR = 0.02
NOISY = 0.02
"""Spread, relative to the median, that is never noisy."""
PART = "time_"
"""Prefix of the columns with parts of the step time, as in ``time_optimizer_s``."""
CAUSE = "time/"
"""Prefix of the columns with the step time by cause, as in ``time/bubble_s``; if present, they replace the parts."""
PREDICTED = "predicted/"
"""Prefix of the columns with the predicted step time by cause, whose names are the fields of
``planner.steptime.StepTime``."""


@dataclass(frozen=True)
class Point:
    """The measurements of one layout on one number of processes."""

    world_size: int
    layout: str
    batch: int
    """Samples of a step."""
    step_s: float
    """Median seconds of a step over the measurements."""
    spread: float | None
    """(largest - smallest) / median; None if there is one measurement without a range."""
    predicted_s: float | None
    parts_s: Mapping[str, float]
    """Seconds of each part of the step; empty if the sweep has none."""
    predicted_parts_s: Mapping[str, float] = field(default_factory=dict)
    """Predicted seconds of each part, under the planner's names."""
    tp: int | None = None
    pp: int | None = None
    config: str = ""
    """The run's whole configuration as JSON; empty if the sweep lacks it."""
    cluster: str = ""
    """Cluster that the planner predicted with."""

    @property
    def rate(self) -> float:
        """Samples per second and process."""
        return self.batch / self.step_s / self.world_size


@dataclass
class Series:
    """Points of the same work, by ascending number of processes; of each number the fastest layout comes first."""

    name: str
    mode: str
    """``weak``: the batch grows with the processes; ``strong``: the batch stays the same; ``layouts``: there is one
    number of processes alone, so that layouts are compared and no scaling is."""
    work: dict[str, str]
    points: list[Point]
    best: list[Point] = field(default_factory=list)
    """The fastest point of each number of processes."""

    @property
    def baseline(self) -> Point:
        """The fastest layout on the fewest processes."""
        return self.best[0]

    def efficiency(self, point: Point) -> float:
        """Rate per process relative to the baseline's; 1 is linear scaling."""
        return point.rate / self.baseline.rate

    def predicted(self, point: Point) -> float | None:
        """Efficiency by the predicted step times of this point and the baseline; None without predictions."""
        if point.predicted_s is None or self.baseline.predicted_s is None:
            return None
        own = point.batch / point.predicted_s / point.world_size
        return own / (self.baseline.batch / self.baseline.predicted_s / self.baseline.world_size)

    @property
    def layouts(self) -> list[list[Point]]:
        """The points of each number of processes on which several layouts were measured, the fastest first."""
        groups = [[point for point in self.points if point.world_size == one.world_size] for one in self.best]
        return [group for group in groups if len(group) > 1]

    def effect(self, point: Point) -> float:
        """What is said of a point, as a share of the speed: the difference to the baseline, or of the baseline the
        largest difference to it. Of layouts, which are compared on one number of processes, to the fastest."""
        others = self.points if self.mode == "layouts" else self.best
        compared = [one for one in others if one is not point] if point is self.baseline else [point]
        return max((abs(self.efficiency(one) - 1.0) for one in compared), default=0.0)

    def flags(self, point: Point) -> list[str]:
        """Reasons to doubt a point."""
        found = []
        excess = self.efficiency(point) - 1.0
        if point is not self.baseline and excess > max(SUPERLINEAR, (point.spread or 0.0) / 2):
            found.append(
                f"superlinear by {excess:.0%}: doubt the baseline (slow layout, memory pressure) before this point"
            )
        effect = self.effect(point)
        if point.spread is not None and point.spread > max(effect, NOISY):
            found.append(
                f"noisy: its measurements spread over {point.spread:.0%} of their median, more than the {effect:.1%} "
                "that they are to show"
            )
        if point.spread is None:
            found.append("measured once: its noise is not known")
        return found

    def lost(self, point: Point) -> dict[str, float]:
        """Seconds per step by part that the point takes more than ideal scaling of the baseline; empty without parts.

        Ideally a part stays the same under weak scaling, and is divided by the growth in processes under strong
        scaling."""
        return self._lost(point, self.baseline.parts_s, point.parts_s)

    def predicted_lost(self, point: Point) -> dict[str, float]:
        """The same as ``lost`` for the planner's predictions."""
        return self._lost(point, self.baseline.predicted_parts_s, point.predicted_parts_s)

    def _lost(self, point: Point, before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
        growth = 1.0 if self.mode == "weak" else point.world_size / self.baseline.world_size
        if not before or not now:
            return {}
        return {name: now.get(name, 0.0) - before.get(name, 0.0) / growth for name in dict.fromkeys([*before, *now])}


def read_sweep(path: str | Path) -> list[Series]:
    """The series of a sweep, one for each value of the column ``series``, or a single one without that column.

    Raises UserError for a missing file or column, a value that is no number, an empty sweep, and rows of one series
    whose work differs.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8") as handle:
            reader = csv.DictReader(handle)
            rows = [{key: (value or "").strip() for key, value in row.items() if key} for row in reader]
            columns = reader.fieldnames or []
    except (OSError, ValueError) as error:
        raise UserError(f"--csv {path} cannot be read ({type(error).__name__}); give the CSV of a sweep") from None
    missing = [name for name in REQUIRED if name not in columns]
    if missing:
        raise UserError(f"--csv {path} lacks the column {missing[0]}; a sweep needs {', '.join(REQUIRED)}")
    if not rows:
        raise UserError(f"--csv {path} is an empty sweep: it has columns and no row")
    groups: dict[str, list[tuple[int, dict[str, str]]]] = {}
    for line, row in enumerate(rows, start=2):
        groups.setdefault(row.get("series", ""), []).append((line, row))
    return [_series(str(path), name, group) for name, group in groups.items()]


def _series(path: str, name: str, rows: Sequence[tuple[int, dict[str, str]]]) -> Series:
    title = name or Path(path).stem
    first_line, first = rows[0]
    for line, row in rows[1:]:
        for column in SAME_WORK:
            if row.get(column) != first.get(column):
                raise UserError(
                    f"--csv {path}: {column} is {first.get(column)} in line {first_line} and {row.get(column)} in line"
                    f" {line}; efficiency compares the same work only, so put them into different values of a column"
                    " named series"
                )
    measured: dict[tuple[int, str, int], list[tuple[int, dict[str, str]]]] = {}
    for line, row in rows:
        size, batch = _whole(path, line, row, "world_size"), _whole(path, line, row, "global_batch_size")
        measured.setdefault((size, _layout(row), batch), []).append((line, row))
    points = [_point(path, *key, group) for key, group in measured.items()]
    points.sort(key=lambda point: (point.world_size, -point.rate))
    mode = _mode(path, points)
    best = [next(point for point in points if point.world_size == size) for size in _sizes(points)]
    work = {column: first[column] for column in SAME_WORK if first.get(column)}
    return Series(title, mode, work, points, best)


def _sizes(points: Sequence[Point]) -> list[int]:
    return list(dict.fromkeys(point.world_size for point in points))


def _mode(path: str, points: Sequence[Point]) -> str:
    """Whether the batch grows with the processes or stays, or there is one number of processes alone. Raises UserError
    if it does neither."""
    if len(_sizes(points)) < 2:
        return "layouts"
    if len({point.batch for point in points}) == 1:
        return "strong"
    shares = {point.batch / point.world_size for point in points}
    if max(shares) - min(shares) < 1e-9 * max(shares):
        return "weak"
    odd = next(point for point in points if point.batch * points[0].world_size != points[0].batch * point.world_size)
    raise UserError(
        f"--csv {path}: global_batch_size is {points[0].batch} on {points[0].world_size} processes and {odd.batch} on"
        f" {odd.world_size}; in one series it must stay (strong scaling) or grow with world_size (weak scaling)"
    )


def _point(path: str, size: int, layout: str, batch: int, rows: Sequence[tuple[int, dict[str, str]]]) -> Point:
    times = [_number(path, line, row, "step_time_s") for line, row in rows]
    median = statistics.median(times)
    low, high = min(times), max(times)
    ranged = len(times) > 1
    for line, row in rows:
        if row.get("step_time_min_s") and row.get("step_time_max_s"):
            low = min(low, _number(path, line, row, "step_time_min_s"))
            high = max(high, _number(path, line, row, "step_time_max_s"))
            ranged = True
    line, row = rows[0]
    predicted = _number(path, line, row, "predicted_step_time_s") if row.get("predicted_step_time_s") else None
    parts = _parts(path, rows, CAUSE) or _parts(path, rows, PART)
    spread = (high - low) / median if ranged else None
    tp, pp = (_whole(path, line, row, name) if row.get(name) else None for name in ("tp", "pp"))
    return Point(
        size, layout, batch, median, spread, predicted, parts, _parts(path, rows, PREDICTED), tp, pp,
        row.get("config", ""), row.get("cluster", ""),
    )  # fmt: skip


def _parts(path: str, rows: Sequence[tuple[int, dict[str, str]]], prefix: str) -> dict[str, float]:
    """Median seconds of the columns with a prefix that every row has."""
    names = [name for name in rows[0][1] if name.startswith(prefix) and name.endswith("_s")]
    return {
        name.removeprefix(prefix).removesuffix("_s").replace("_", " "): statistics.median(
            _number(path, number, values, name, least=0.0) for number, values in rows
        )
        for name in names
        if all(values.get(name) for _, values in rows)
    }


def _layout(row: Mapping[str, str]) -> str:
    return " x ".join(
        f"{name.upper() if len(name) < 4 else 'micro batch'} {row[name]}" for name in LAYOUT if row.get(name)
    )


def _number(path: str, line: int, row: Mapping[str, str], column: str, least: float | None = None) -> float:
    """Reads a number over 0, or of at least ``least`` if that is given."""
    try:
        value = float(row[column])
        if math.isfinite(value) and (value > 0 if least is None else value >= least):
            return value
    except (ValueError, KeyError):
        pass
    bound = "over 0" if least is None else f"of at least {least:g}"
    raise UserError(f"--csv {path} line {line}: {column} {row.get(column)!r} is not a number {bound}")


def _whole(path: str, line: int, row: Mapping[str, str], column: str) -> int:
    value = _number(path, line, row, column)
    if value != int(value):
        raise UserError(f"--csv {path} line {line}: {column} {row[column]} is not a whole number")
    return int(value)


def sentence(series: Series) -> str:
    """A sentence with the efficiency on the most processes, and its baseline; of a single number of processes, with its
    layouts."""
    base, last = series.baseline, series.best[-1]
    if series.mode == "layouts":
        return _sentence_of_layouts(series)
    growth = last.world_size / base.world_size
    prefix = "" if series.name == series.mode else f"{series.name}: "
    number = f"{base.world_size} process{'' if base.world_size == 1 else 'es'}"
    return (
        f"{prefix}{series.mode} scaling from {base.world_size} to {last.world_size} processes keeps"
        f" {series.efficiency(last):.1%} of the baseline's speed per process, a speed-up of"
        f" {series.efficiency(last) * growth:.2f} on {growth:g} times the processes. Baseline: {number}"
        f"{', ' + base.layout if base.layout else ''}, {base.step_s:.4g} s per step of {base.batch} samples."
    )


def _sentence_of_layouts(series: Series) -> str:
    base, slowest = series.baseline, series.points[-1]
    on = f"{series.name}: {base.world_size} process{'' if base.world_size == 1 else 'es'} alone, so no scaling is shown"
    fastest = f"{base.layout or 'the layout'} takes {base.step_s:.4g} s per step of {base.batch} samples"
    if len(series.points) == 1:
        return f"{on}; {fastest}."
    return (
        f"{on}; of {len(series.points)} layouts the fastest, {fastest}, and the slowest, "
        f"{slowest.layout or 'another'}, has {series.efficiency(slowest):.1%} of its speed."
    )
