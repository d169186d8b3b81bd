"""A process of the suite that runs stages one after the other. Importing torch takes seconds, so one process runs all
of them unless a kernel breaks its CUDA context or a stage hangs."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.gpu import files
from benchmarks.gpu.plan import Job, Lost, failure
from benchmarks.gpu.processes import kill_all

LOST = 3
"""Exit status of a process that can't go on, though its stage can in a new one."""
# A stage is begun only if so many seconds are left for it.
LEAST_S = 3.0


def run_stage(name: str, function: str, settings: Mapping[str, Any]) -> str:
    """Runs a stage and keeps its record up to date; its last state. function: "module:name"; settings: as the suite
    wrote them."""
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
    try:
        if name in settings["options"].get("break", ()):  # a rehearsal shows that the others stay
            raise RuntimeError("this stage was made to fail (--break)")
        if job.left() < LEAST_S:
            record["state"] = "no time left"
        else:
            module, attribute = function.split(":")
            result = getattr(import_module(module), attribute)(job)
            record["state"] = "partly" if result.get("left_out") else "done"
            record["result"] = dict(result)
            if result.get("problem"):
                record |= {"state": "failed", "problem": result["problem"]}
    except Lost as error:
        record |= {"state": "lost", "problem": str(error)}
    except Exception as error:  # a stage's failure is a result, and costs its own rows only
        traceback.print_exc()
        record |= {"state": "failed", "problem": failure(error)}
    save(record["result"])
    return record["state"]


def main(settings_file: str) -> int:
    """Runs the stages named in a file of settings."""
    settings = json.loads(Path(settings_file).read_text())
    signal.signal(signal.SIGTERM, _stop)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    for name, function in settings["stages"].items():
        print(f"== {name}", flush=True)
        if run_stage(name, function, settings) == "lost":
            return LOST
    return 0


def _end_with(parent: int) -> None:
    """Ends this process when the suite was killed, since nobody waits for it then."""
    while os.getppid() == parent:
        time.sleep(0.5)
    _stop()


def _stop(*_: Any) -> None:
    kill_all()
    os._exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
