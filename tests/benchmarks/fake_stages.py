"""Stages that end in every possible way; the suite runs them in its worker like the real ones."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from benchmarks.gpu.plan import Job, Lost
from benchmarks.gpu.processes import run

ROWS = [{"operator": "rope", "shape": "s", "mode": "all", "provider": "ours", "note": "a row"}]


def good(job: Job) -> Mapping[str, Any]:
    """Finishes."""
    return {"rows": ROWS}


def raising(job: Job) -> Mapping[str, Any]:
    """Fails after it has saved a row."""
    job.save({"rows": ROWS})
    raise ValueError("no such thing\nand more")


def dying(job: Job) -> Mapping[str, Any]:
    """Ends its process, as a segmentation fault does."""
    job.save({"rows": ROWS})
    os._exit(7)


def dying_in_one(job: Job) -> Mapping[str, Any]:
    """Ends its process in one item, which it leaves out at the next try."""
    if not job.previous.get("died"):
        job.save({"rows": ROWS, "begun": "one"})
        os._exit(7)
    return {"rows": [*job.previous["rows"], *ROWS]}


def hanging(job: Job) -> Mapping[str, Any]:
    """Never ends, nor does a program that it starts."""
    job.save({"rows": ROWS})
    run([sys.executable, "-c", f"import time; time.sleep(600)  # {job.options['mark']}"], job.work / "program.log", 600)
    return {}


def lost_twice(job: Job) -> Mapping[str, Any]:
    """Loses the GPU two times, then goes on from what it had saved."""
    rows = list(job.previous.get("rows", []))
    if len(rows) < 2:
        job.save({"rows": [*rows, *ROWS]})
        raise Lost("the GPU is gone")
    return {"rows": [*rows, *ROWS]}


def always_lost(job: Job) -> Mapping[str, Any]:
    """Loses the GPU at every try."""
    raise Lost("the GPU is gone")


def without_time(job: Job) -> Mapping[str, Any]:
    """Leaves out one item for lack of time, and does it at the second try."""
    if job.previous.get("rows"):
        return {"rows": [*job.previous["rows"], *ROWS], "left_out": []}
    return {"rows": ROWS, "left_out": ["the other"]}


def slow(job: Job) -> Mapping[str, Any]:
    """Runs long enough to be cut short."""
    job.save({"rows": ROWS})
    time.sleep(20)
    return {"rows": ROWS}


def is_running(mark: str) -> bool:
    """Whether a program with this mark in its command line runs."""
    return subprocess.run(["pgrep", "-f", f"sleep.600.*{mark}"], stdout=subprocess.DEVNULL).returncode == 0
