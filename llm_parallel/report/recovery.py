"""Reconstructs from its events when an elastic run trained, when it recovered, and from which faults."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

KINDS = ("starting", "training", "fault unseen", "recovering", "waiting", "stopped")
"""Kinds of spans. ``fault unseen`` is the time from the last finished step until a fault was detected."""


@dataclass
class Span:
    """A span of time of one kind; times are seconds since the first event."""

    kind: str
    begin_s: float
    end_s: float
    processes: int = 0
    """Processes that train in it; 0 for all kinds but training."""


@dataclass
class Recovery:
    """One fault, from its detection until training went on."""

    at_s: float
    step: int
    cause: str
    """What was detected; after the verdict, the verdict's text."""
    fault: str = ""
    """What the verdict blames: device, node, user …"""
    removed: list[str] = field(default_factory=list)
    resumed_s: float | None = None
    """When training went on; None if it did not."""
    resumed_step: int | None = None
    processes: int | None = None
    layout: str = ""

    @property
    def seconds(self) -> float | None:
        """From detection until training went on."""
        return None if self.resumed_s is None else self.resumed_s - self.at_s

    @property
    def lost_steps(self) -> int | None:
        """Number of steps that were lost and trained again."""
        return None if self.resumed_step is None else max(0, self.step - self.resumed_step)


@dataclass
class Life:
    """Spans that cover the time from the first event to the last, and the recoveries in it."""

    spans: list[Span]
    recoveries: list[Recovery]

    def seconds(self, kind: str) -> float:
        """Seconds in spans of ``kind``."""
        return sum(span.end_s - span.begin_s for span in self.spans if span.kind == kind)

    @property
    def goodput(self) -> float:
        """Share of the time without stops in which the run trained; steps that are trained again count as training."""
        alive = sum(self.seconds(kind) for kind in KINDS if kind != "stopped")
        return self.seconds("training") / alive if alive else 0.0


def life_of(events: Sequence[dict[str, Any]], step_times: Sequence[str] = ()) -> Life | None:
    """Reads ``events``; None if no launcher wrote them, which is so if none is of kind ``form``.

    ``step_times`` (ISO 8601) are those at which steps were finished: between the last one and a fault's detection, or
    the next start of a launcher that was killed and wrote no end, nothing trained.
    """
    known = [(_seconds(event["time"]), event) for event in events if "event" in event and "time" in event]
    if not any(event["event"] == "form" for _, event in known):
        return None
    first_s = known[0][0]
    story = _Story(sorted(_seconds(text) - first_s for text in step_times))
    for at_s, event in known:
        story.take(at_s - first_s, event)
    end_s = known[-1][0] - first_s
    if story.kind == "training" and story.step_times_s:
        end_s = max(story.since_s, story.step_times_s[-1])
    story.close(end_s)
    return Life(story.spans, story.recoveries)


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


@dataclass
class _Story:
    step_times_s: list[float]
    kind: str = "starting"
    since_s: float = 0.0
    processes: int = 0
    spans: list[Span] = field(default_factory=list)
    recoveries: list[Recovery] = field(default_factory=list)
    joined_s: list[float] = field(default_factory=list)
    """When nodes joined after training went on."""

    def take(self, at_s: float, event: dict[str, Any]) -> None:
        kind = event["event"]
        recovery = self.recoveries[-1] if self.recoveries and self.recoveries[-1].resumed_s is None else None
        if kind == "detect":
            self.recoveries.append(Recovery(at_s, event.get("step", 0), event.get("cause", "")))
            self._stop_training("fault unseen", at_s)
            self._enter("recovering", at_s)
        elif kind == "wait":
            self._enter("waiting", at_s)
        elif kind == "form":
            self._stop_training("starting", at_s)
            self._enter("recovering" if recovery else "starting", at_s)
            if recovery:
                recovery.layout = event.get("layout", "")
        elif kind == "resume":
            self._enter("training", at_s, event.get("world_size", 0))
            if recovery:
                recovery.resumed_s, recovery.resumed_step = at_s, event.get("step")
                recovery.processes = event.get("world_size")
        elif kind in ("end", "fail", "requeue"):
            self._enter("stopped", at_s)
        elif kind == "join":
            self.joined_s.append(at_s)
            if self.kind == "stopped":
                self._enter("starting", at_s)
        elif recovery and kind == "blame":
            recovery.fault, recovery.cause = event.get("fault", ""), event.get("cause", recovery.cause)
        elif recovery and kind == "remove":
            recovery.removed.append(f"{event.get('node')}/{event.get('device')}")

    def _stop_training(self, after: str, at_s: float) -> None:
        """Ends training at the last finished step; the time from there until now is of kind ``after``."""
        if self.kind != "training" or not self.step_times_s:
            return
        number = bisect.bisect_right(self.step_times_s, at_s)
        last_s = max(self.since_s, self.step_times_s[number - 1] if number else 0.0)
        joined_s = [joined for joined in self.joined_s if joined > last_s]
        if after == "starting" and joined_s:  # nodes joined but no step followed, so the previous launcher had died
            self._enter("stopped", last_s)
            last_s = joined_s[0]
        self._enter(after, last_s)

    def _enter(self, kind: str, at_s: float, processes: int = 0) -> None:
        self.close(at_s)
        self.joined_s = [] if kind == "training" else self.joined_s
        self.kind, self.processes = kind, processes

    def close(self, at_s: float) -> None:
        last = self.spans[-1] if self.spans else None
        if last is not None and (last.kind, last.processes) == (self.kind, self.processes):
            last.end_s = at_s
        elif at_s > self.since_s:
            self.spans.append(Span(self.kind, self.since_s, at_s, self.processes))
        self.since_s = at_s
