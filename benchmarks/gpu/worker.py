"""A process of the suite that runs stages one after the other, as long as it lives: importing torch takes seconds, so
one process runs all of them unless a kernel ends its CUDA work or a stage hangs."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.gpu import files
from benchmarks.gpu.plan import STAGES, Job, Lost, failure

LOST = 3
"""Exit status of a process that can't go on, though the stage it was in can."""
# A stage is begun only if so many seconds are left for it.
LEAST_S = 3.0


def run_stage(name: str, function: Callable[[Job], Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """Runs a stage and keeps its record up to date; its last state. settings: as the suite wrote them."""
    work = Path(settings["work"])
    path = work / f"{name}.json"
    before = files.read(path) or {}
    previous = before.get("result") or {}
    record: dict[str, Any] = {"state": "running", "run": settings["run"], "result": previous}
    spent = before.get("seconds", 0.0)
    began = time.monotonic()

    def save(result: Mapping[str, Any]) -> None:
        record["result"] = dict(result)
        record["seconds"] = spent + time.monotonic() - began
        files.write(path, record)

    save(previous)
    results = {other: found.get("result") or {} for other, found in files.records(work).items() if other != name}
    job = Job(work, settings["deadlines"][name], settings["rehearse"], save, previous, results, settings["options"])
    if name in settings["options"].get("break", ()):  # a rehearsal shows that the others stay
        function = _broken
    try:
        if job.left() < LEAST_S:
            record["state"] = "no time left"
        else:
            result = function(job)
            record["state"] = "partly" if result.get("left_out") else "done"
            record["result"] = dict(result)
    except Lost as error:
        record |= {"state": "lost", "problem": str(error)}
    except Exception as error:  # a stage's failure is a result, and costs its own rows only
        traceback.print_exc()
        record |= {"state": "failed", "problem": failure(error)}
    save(record["result"])
    return record["state"]


def _broken(job: Job) -> Mapping[str, Any]:
    raise RuntimeError("this stage was made to fail (--break)")


def main(settings_file: str) -> int:
    """Runs the stages named in a file of settings."""
    settings = json.loads(Path(settings_file).read_text())
    functions = {stage.name: stage.function for stage in STAGES}
    for name in settings["stages"]:
        print(f"== {name}", flush=True)
        module, function = functions[name].split(":")

        def loaded(job: Job, module: str = module, function: str = function) -> Mapping[str, Any]:
            return getattr(import_module(f"benchmarks.gpu.{module}"), function)(job)

        if run_stage(name, loaded, settings) == "lost":
            return LOST
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
