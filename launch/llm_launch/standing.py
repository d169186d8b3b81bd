"""What a run is doing by its files and by SLURM together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llm_launch.job_record import JobRecord
from llm_launch.job_view import JobView, word
from llm_launch.lease import Holder
from llm_launch.run_status import RunStatus, living_holder, read_status
from llm_launch.states import OVER
from llm_parallel.files import read_json


@dataclass(frozen=True)
class Standing:
    """Status of a run; elastic: what ``launch`` keeps in elastic.json, None where it has not written any; complaint:
    why SLURM said nothing."""

    status: RunStatus
    elastic: dict[str, Any] | None
    complaint: str = ""


def stand(run_dir: Path, record: JobRecord | None, said: tuple[Sequence[JobView], str] | None) -> Standing:
    """Where a run stands. ``record``: of its SLURM job; ``said``: what SLURM says of that job, and why it says nothing.
    Raises UserError if the folder is none of a run."""
    views, complaint = said if said is not None else ([], "")
    elastic = read_elastic(run_dir)
    holder = living_holder(run_dir)
    begun = (run_dir / "metrics.jsonl").exists() or (run_dir / "config.yaml").exists()
    if begun or (elastic is None and record is None):
        status = read_status(run_dir, holder)
    else:
        status = RunStatus("ended", "no step was begun", holder)
    if elastic is not None:
        state, why = _of_launcher(elastic, holder, status)
        step = elastic.get("step")
        status = replace(status, state=state, why=why, step=step if isinstance(step, int) else status.step)
    if record is None or (holder is not None and not holder.job):
        return Standing(status, elastic, complaint)
    start = record.start
    if views:
        state, why = word(views[0], record, holder is not None, (status.state, status.why))
        start = max(start, views[0].restarts)
        status = replace(status, state=state, why=why)
    nodes = f" on {views[0].nodes}" if views and views[0].nodes else ""
    job = f"SLURM job {record.job}{f', start {start + 1}' if start else ''}{nodes}"
    return Standing(replace(status, job=job), elastic, complaint)


def read_elastic(run_dir: Path) -> dict[str, Any] | None:
    """State that ``launch`` keeps; None where it did not write any."""
    try:
        found = read_json(run_dir / "elastic.json")
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _of_launcher(elastic: dict[str, Any], holder: Holder | None, status: RunStatus) -> tuple[str, str]:
    """What the launcher does; of one that is over, how it ended, and ``ended`` if it has not said so. The elastic.json
    of an earlier start says nothing about a holder that has not written its own."""
    state = str(elastic.get("state"))
    over = state in [phase.value for phase in OVER]
    if holder is not None:
        return ("running" if over else state), ""
    if over:
        return state, status.why if state == "failed" else ""
    return "ended", f"the launcher is gone, and its last word was {state!r}; the next start goes on"
