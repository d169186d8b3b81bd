"""What a run is doing, from the files in its folder alone: the newest step, and whether its processes are alive."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from llm_launch.lease import BEAT_S, DEAD_BEATS, LOCK_NAME, RECORD_NAME, Holder, read_holder
from llm_parallel.errors import UserError
from llm_parallel.jsonlines import read_jsonlines

SLOW_STEPS = 10.0
"""Medians of a step's time after which its absence is worth saying."""


@dataclass(frozen=True)
class RunStatus:
    """State of a run."""

    state: str
    """``running``, ``finished``, ``stopped``, ``failed``, or ``ended`` if it is gone without a word."""
    why: str = ""
    """What is known about a failure."""
    holder: Holder | None = None
    """Who trains."""
    step: int = 0
    """The last step that was recorded."""
    total_steps: int | None = None
    """Steps of the whole run."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """Numbers of the last step, as metrics.jsonl has them."""
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    """Numbers of the last evaluation."""
    saved_step: int | None = None
    """Step of the newest checkpoint."""
    step_s: float | None = None
    """Median time of the last steps."""

    @property
    def last_step_at(self) -> datetime | None:
        """When the last step was recorded."""
        try:
            return datetime.fromisoformat(self.record["time"]) if "time" in self.record else None
        except (ValueError, TypeError):
            return None

    def lines(self, now: datetime) -> list[str]:
        """The state in a few lines."""
        by = f" ({self.holder.describe()})" if self.holder is not None and self.state == "running" else ""
        found = [f"{self.state}{by}{f': {self.why}' if self.why else ''}"]
        of = f" of {self.total_steps:,}" if self.total_steps is not None else ""
        loss = self.record.get("train/loss")
        held_out = self.evaluation.get("eval/loss")
        parts = [f"step {self.step:,}{of}"]
        parts += [f"loss {loss:.4f}"] if isinstance(loss, float) else []
        if isinstance(held_out, float):
            parts.append(f"held-out loss {held_out:.4f} after step {self.evaluation['step']:,}")
        parts += [f"checkpoint of step {self.saved_step:,}"] if self.saved_step is not None else []
        found.append(", ".join(parts))
        if self.state == "running":
            found.append(self._pace(now))
        return [line for line in found if line]

    def _pace(self, now: datetime) -> str:
        at, left = self.last_step_at, self.record.get("time/eta_s")
        if at is None:
            return "no step yet: the processes build the model"
        ago = max(0.0, (now - at).total_seconds())
        if self.step_s is not None and ago > max(SLOW_STEPS * self.step_s, 10.0):
            return f"no step for {_duration(ago)}, and one takes {self.step_s:.2f} s: see logs/ and events"
        eta = f"{_duration(left)} left, " if isinstance(left, int | float) else ""
        return f"{eta}last step {_duration(ago)} ago"


def read_status(run_dir: Path) -> RunStatus:
    """The status of a run. Raises UserError if the folder is none of a run."""
    if not (run_dir / "metrics.jsonl").exists() and not (run_dir / "config.yaml").exists():
        raise UserError(f"{run_dir} is no run's folder: it has neither metrics.jsonl nor config.yaml; name a run_dir")
    record: dict[str, Any] = {}
    evaluation: dict[str, Any] = {}
    total, step = None, 0
    times: list[float] = []
    for found in read_jsonlines(run_dir / "metrics.jsonl") if (run_dir / "metrics.jsonl").exists() else ():
        if not isinstance(found.get("step", 0), int):
            continue  # nothing of ours
        if found.get("event") == "run_start":
            total, step = found.get("total_steps", total), found.get("step", step)
            record = {} if record.get("step", 0) > step else record
        elif "train/loss" in found and "step" in found:
            record, step = found, found["step"]
            seconds = found.get("perf/step_time")
            times = [*times[-63:], float(seconds) if isinstance(seconds, int | float) else 0.0]
        elif "eval/loss" in found and "step" in found:
            evaluation = found
    total = total if isinstance(total, int) else None
    holder = living_holder(run_dir)
    state, why = ("running", "") if holder is not None else _ending(run_dir, step, total)
    return RunStatus(
        state, why, holder, step, total, record, evaluation, _saved_step(run_dir),
        statistics.median(times) if times else None,
    )  # fmt: skip


def living_holder(run_dir: Path) -> Holder | None:
    """Who trains in a folder at this moment; None if nobody does."""
    path = run_dir / RECORD_NAME
    holder = read_holder(path)
    if holder is None:
        return None
    try:
        fd = os.open(run_dir / LOCK_NAME, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        fd = None
    if fd is not None:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return holder
        finally:
            os.close(fd)
        if holder.host == os.uname().nodename[:200]:
            return None  # it would hold the lock
    # A process of another machine counts its record up; the clock of the file system may differ a little from ours.
    age_s = time.time() - path.stat().st_mtime
    return holder if age_s < 2 * DEAD_BEATS * BEAT_S else None


def _ending(run_dir: Path, step: int, total: int | None) -> tuple[str, str]:
    """How a run ended that nobody holds any more."""
    last: dict[str, Any] = {}
    path = run_dir / "events.jsonl"
    for record in read_jsonlines(path) if path.exists() else ():
        if record.get("event") in ("run_start", "end", "stop", "stopped", "early_stop", "fail"):
            last = {**record, "was": last.get("event")}
    if last.get("event") == "end":
        made = last["step"] if isinstance(last.get("step"), int) else step
        if total is not None and made < total and last["was"] != "early_stop":
            return "stopped", ""
        return "finished", ""
    if last.get("event") in ("stop", "stopped"):
        return "stopped", ""
    reports = [_report(found) for found in sorted((run_dir / "logs").glob("error_rank_*.json"))]
    said = next((text for text in reports if text), "") or str(last.get("cause", ""))
    if said or last.get("event") == "fail":
        return "failed", said
    if not last:
        return "ended", "no step was begun"
    return "ended", "its processes are gone and left no message, as after a kill or a power cut"


def _report(path: Path) -> str:
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["message"]).strip().splitlines()[-1]
    except (OSError, ValueError, KeyError, IndexError):
        return ""


def _saved_step(run_dir: Path) -> int | None:
    try:
        return int((run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    except (OSError, ValueError):
        return None


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.0f} min" if minutes < 90 else f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"
