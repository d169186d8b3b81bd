"""What a run is doing, from the files in its folder alone: the newest step, and whether its processes are alive."""

from __future__ import annotations

import fcntl
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from llm_launch.lease import BEAT_S, DEAD_BEATS, LOCK_NAME, RECORD_NAME, Holder, read_holder
from llm_launch.private import lock_is_refused
from llm_parallel.errors import UserError
from llm_parallel.files import open_regular, read_json, read_small
from llm_parallel.jsonlines import read_jsonlines

SLOW_STEPS = 10.0
"""Medians of a step's time after which its absence is worth saying."""


@dataclass(frozen=True)
class RunStatus:
    """State of a run."""

    state: str
    """``running``, ``finished``, ``stopped``, ``failed``, or ``ended`` if it is gone without a word; of an elastic run
    what its launcher does; of a SLURM job also ``pending``, ``requeued``, ``starting``, ``suspended``, ``ending``,
    ``cancelled`` and ``preempted``."""
    why: str = ""
    """What is known about it, as of a failure its cause."""
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
    job: str = ""
    """The SLURM job, its start and its nodes, for people."""

    @property
    def headline(self) -> str:
        """The state, of what, and why."""
        by = self.job or (self.holder.describe() if self.holder is not None and self.state == "running" else "")
        return f"{self.state}{f' ({by})' if by else ''}{f': {self.why}' if self.why else ''}"

    @property
    def progress(self) -> str:
        """How many steps are made, and of how many."""
        return f"step {self.step:,}" + (f" of {self.total_steps:,}" if self.total_steps is not None else "")

    @property
    def last_step_at(self) -> datetime | None:
        """When the last step was recorded."""
        try:
            return datetime.fromisoformat(self.record["time"]) if "time" in self.record else None
        except (ValueError, TypeError):
            return None

    def lines(self, now: datetime) -> list[str]:
        """The state in a few lines."""
        found = [self.headline]
        loss = self.record.get("train/loss")
        held_out = self.evaluation.get("eval/loss")
        parts = [self.progress]
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


def read_status(run_dir: Path, holder: Holder | None) -> RunStatus:
    """The status of a run in which ``holder`` trains, None if nobody does. Raises UserError if the folder is none of a
    run."""
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
    state, why = ("running", "") if holder is not None else _ending(run_dir, step, total)
    return RunStatus(
        state, why, holder, step, total, record, evaluation, _saved_step(run_dir),
        statistics.median(times) if times else None,
    )  # fmt: skip


class SignsOfLife:
    """Whether somebody trains in a folder. On one machine a lock says so; a process of another machine counts its
    record up, and what counts is whether it does so while this one looks: the clock of a login node may be wrong by
    minutes."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._seen: Holder | None = None
        self._moved_s = time.monotonic()

    def look(self) -> tuple[Holder | None, bool]:
        """Who trains, None if nobody does; and whether that is sure. As long as it is not, look again."""
        path = self.run_dir / RECORD_NAME
        holder = read_holder(path)
        if holder is None:
            return None, True
        locked = _is_locked(self.run_dir / LOCK_NAME)
        if locked or holder.host == os.uname().nodename[:200]:
            return (holder, True) if locked else (None, True)  # on this machine it would hold the lock
        seen, self._seen = self._seen, holder
        if seen is not None and holder != seen:
            self._moved_s = time.monotonic()
            return holder, True
        if seen is None and abs(time.time() - _modified(path)) < DEAD_BEATS * BEAT_S:
            return holder, True
        silent = time.monotonic() - self._moved_s > DEAD_BEATS * BEAT_S
        return (None, True) if silent else (holder, False)


def _is_locked(path: Path) -> bool:
    """Whether a process of this machine holds the lock, or of another one where the file system passes locks on."""
    try:
        fd = open_regular(path)
    except OSError:
        return False
    return lock_is_refused(fd, fcntl.LOCK_SH)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def living_holder(run_dir: Path, pause: Callable[[float], None] = time.sleep) -> Holder | None:
    """Who trains in a folder at this moment; None if nobody does. For a record that another machine wrote some time
    ago, by this machine's clock, it takes seconds to know."""
    signs = SignsOfLife(run_dir)
    while True:
        holder, sure = signs.look()
        if sure:
            return holder
        pause(BEAT_S / 10)


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
        return str(read_json(path)["message"]).strip().splitlines()[-1]
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return ""


def _saved_step(run_dir: Path) -> int | None:
    try:
        return int(read_small(run_dir / "checkpoints" / "latest_checkpointed_iteration.txt"))
    except (OSError, ValueError):
        return None


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.0f} min" if minutes < 90 else f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"
