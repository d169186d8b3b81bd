"""slurm.json in the run folder: which SLURM job the run is, how often it was started for nothing, how it ended last."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from llm_launch.slurm import SlurmJob
from llm_parallel.files import atomic_write, read_json

NAME = "slurm.json"
JOB = re.compile(r"\d[\d_+\[\],%-]*")
"""Number of a job, which commands get as an argument."""


@dataclass(frozen=True)
class JobRecord:
    """What is known of the run's newest SLURM job."""

    job: str
    """Its number, of a task of an array as 12_3."""
    start: int = 0
    """How often it was requeued before its newest start."""
    kept: int = 0
    """The latest step that a start of it has gone on from, or saved at its end."""
    fruitless: int = 0
    """Starts in a row, with the newest, after which ``kept`` was no later one."""
    begun: bool = False
    """Whether a start of it has begun; it waits since it was submitted else."""
    ended: str = ""
    """Why its newest start has ended; empty as long as it runs."""
    folders: Sequence[str] = ()
    """Names of the folders of an array's runs, one for each task, in this folder; empty if it is no array."""

    def begin(self, job: SlurmJob, on_disk: int) -> JobRecord:
        """The record at the beginning of a start. ``on_disk``: step of the newest complete checkpoint."""
        if self.job != job.job_id or not self.begun:
            return JobRecord(job.job_id, job.restart_count, on_disk, 1, True)
        found = self.keep(on_disk)
        return replace(found, start=job.restart_count, fruitless=found.fruitless + 1, begun=True, ended="")

    def keep(self, step: int) -> JobRecord:
        """With a step from which the next start can go on. One that is later than all before is progress."""
        return replace(self, kept=step, fruitless=0) if step > self.kept else self

    def end(self, why: str, counts: bool) -> JobRecord:
        """The record at the end of a start, which does not count if SLURM took its nodes."""
        return replace(self, ended=why, fruitless=self.fruitless if counts else max(0, self.fruitless - 1))

    def write(self, run_dir: Path) -> None:
        """Raises OSError."""
        with atomic_write(run_dir / NAME) as handle:
            json.dump(asdict(self), handle)


def read_record(run_dir: Path) -> JobRecord | None:
    """The record of a folder; None if there is none, or it is none of ours."""
    try:
        found: dict[str, Any] = read_json(run_dir / NAME)
        record = JobRecord(**{field.name: found[field.name] for field in fields(JobRecord) if field.name in found})
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    right = (
        isinstance(record.job, str)
        and JOB.fullmatch(record.job) is not None
        and isinstance(record.ended, str)
        and isinstance(record.folders, list | tuple)
    )
    numbers = all(isinstance(number, int) for number in (record.start, record.kept, record.fruitless))
    return record if right and numbers and record.job else None


def forget(run_dir: Path) -> None:
    """Removes the record, since the run goes on outside of SLURM."""
    with contextlib.suppress(OSError):
        (run_dir / NAME).unlink()
