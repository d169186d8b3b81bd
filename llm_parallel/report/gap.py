"""Explains, cause by cause, why measured scaling differs from predicted scaling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llm_parallel.report.efficiency import Point, Series

CAUSES: Mapping[str, tuple[str, ...]] = {
    "compute": ("compute", "elementwise", "recompute", "host"),
    "pipeline bubble": ("bubble",),
    "tensor parallel": ("tp",),
    "context parallel": ("cp",),
    "pipeline sends": ("pp",),
    "data parallel": ("dp",),
    "optimizer": ("optimizer",),
    "data": ("data",),
    "other": ("other", "waiting"),
}
"""Parts of measured and predicted step times that belong to each cause."""
_WITHIN_FORWARD_BACKWARD = tuple(
    part
    for cause in (
        "compute",
        "pipeline bubble",
        "tensor parallel",
        "context parallel",
        "pipeline sends",
        "data parallel",
    )
    for part in CAUSES[cause]
)


@dataclass(frozen=True)
class Cause:
    """Seconds of a step that a point loses to one cause, compared with ideal scaling of the baseline."""

    name: str
    """Name of the cause."""
    predicted_s: float | None
    """None if the prediction lacks it."""
    measured_s: float | None
    """None if it was not measured."""

    @property
    def gap_s(self) -> float | None:
        """Measured minus predicted seconds."""
        if self.predicted_s is None or self.measured_s is None:
            return None
        return self.measured_s - self.predicted_s


def causes_of(series: Series, point: Point) -> list[Cause]:
    """What ``point`` loses by cause, and in all; empty without a prediction by cause.

    Where the sweep measured forward and backward as one, they are one cause and its parts are not measured."""
    predicted, measured = series.predicted_lost(point), series.lost(point)
    if not predicted:
        return []
    found = []
    if "forward backward" in measured:
        inside = sum(predicted.get(part, 0.0) for part in _WITHIN_FORWARD_BACKWARD)
        found.append(Cause("forward and backward together", inside, measured["forward backward"]))
    for name, parts in CAUSES.items():
        ours, theirs = _sum(measured, parts), _sum(predicted, parts)
        if ours is not None or theirs is not None:
            found.append(Cause(name, theirs, ours))
    growth = 1.0 if series.mode == "weak" else point.world_size / series.baseline.world_size
    whole = point.step_s - series.baseline.step_s / growth
    return [*found, Cause("whole step", sum(predicted.values()), whole)]


def _sum(seconds: Mapping[str, float], parts: tuple[str, ...]) -> float | None:
    known = [seconds[part] for part in parts if part in seconds]
    return sum(known) if known else None


def explained(causes: list[Cause]) -> str:
    """A sentence that says which causes make up the gap. A step that is slower than predicted is explained by causes
    that cost more than predicted, and a faster one by causes that cost less."""
    whole = causes[-1].gap_s
    assert whole is not None
    known = {cause.name: cause.gap_s for cause in causes[:-1] if cause.gap_s is not None}
    slower = whole >= 0
    text = f"The step loses {1e3 * abs(whole):.3g} ms {'more' if slower else 'less'} than predicted"
    if not known:
        return f"{text}; no part of it was measured by cause."
    rest = whole - sum(known.values())
    missing = [cause.name for cause in causes if cause.measured_s is None]
    name, seconds = largest(known, slower)
    if seconds:
        text += f"; the largest known part is {name} with {1e3 * seconds:+.3g} ms, and"
    else:
        text += f"; no measured cause took {'more' if slower else 'less'} time than predicted, and"
    nothing = abs(rest) < 1e-6 * max(abs(cause.gap_s or 0.0) for cause in causes)
    text += " no time is" if nothing else f" {1e3 * rest:+.3g} ms are"
    text += " outside the causes that were both measured and predicted"
    return text + (f". Not measured: {', '.join(missing)}." if missing else ".")


def largest(seconds: Mapping[str, float], slower: bool) -> tuple[str, float]:
    """The part that explains most of a difference: of a slower step the one with most seconds over 0, of a faster one
    the one with most under 0. No name and 0 if there is none of that sign."""
    name, found = max(seconds.items(), key=lambda item: item[1] if slower else -item[1], default=("", 0.0))
    return (name, found) if (found > 0) == slower and found != 0.0 else ("", 0.0)
