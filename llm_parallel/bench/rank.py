"""Runs one process of a benchmark that ``llm_launch.local`` started."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from llm_launch.worker import WorkerEnv, report_error, worker_environment


def run_plan(measure: Callable[[dict[str, Any], WorkerEnv, Path], None]) -> NoReturn:
    """Calls ``measure`` with the content of the JSON file that the command line names, this process's place, and the
    file's folder; then ends the process with its exit status. An error is reported in the folder's ``logs``."""
    path = Path(sys.argv[1])
    place = worker_environment()
    assert place is not None, "started by the launcher"
    try:
        measure(json.loads(path.read_text()), place, path.parent)
        status = 0
    except Exception as error:
        status = report_error(path.parent / "logs", place.rank, error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # after a failure other ranks may hang in a collective
