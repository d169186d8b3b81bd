"""The process that supervises the stages: it gives each its time, ends those that hang, starts a new process after one
has died, and keeps the results up to date. It imports neither torch nor modules that import torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu import files
from benchmarks.gpu.packages import install
from benchmarks.gpu.plan import BUDGET_S, ROOT, STAGES, Stage
from benchmarks.gpu.processes import kill_group, start
from benchmarks.gpu.report import summary
from benchmarks.gpu.worker import LOST

# A stage ends by itself at its deadline; this long after it, it is ended.
GRACE_S = 8.0
# Of the whole budget: for ending the last stage and for the last files.
RESERVE_S = 15.0
# A stage whose process lost its GPU goes on in a new one, but not for ever.
MOST_TRIES = 4
PUBLISH_S = 2.0


@dataclass
class Suite:
    """One run. stages: those to run, in order; options: what they are told; settled: names of those that have ended in
    this run."""

    out: Path
    work: Path
    budget_s: float = BUDGET_S
    stages: Sequence[Stage] = STAGES
    rehearse: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    run: str = ""
    settled: set[str] = field(default_factory=set)
    tries: dict[str, int] = field(default_factory=dict)
    published: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def pending(self) -> list[Stage]:
        """Stages that still have to run, in order."""
        return [stage for stage in self.stages if stage.name not in self.settled]

    def note(self, name: str, **changes: Any) -> None:
        """Changes a stage's record."""
        record = files.read(self.work / f"{name}.json") or {}
        files.write(self.work / f"{name}.json", {**record, "run": self.run, **changes})

    def publish(self, last: bool = False) -> None:
        """Updates the result files, and the archive only when a stage has ended."""
        self.published = time.monotonic()
        found = files.records(self.work)
        files.publish(self.work, self.out, summary(found), found, archive=last)


def deadlines(pending: Sequence[Stage], now: float, end: float) -> dict[str, float]:
    """When each stage must end: the remaining time is divided by the stages' shares."""
    total = sum(stage.seconds for stage in pending)
    found, used = {}, 0.0
    for stage in pending:
        used += stage.seconds
        found[stage.name] = now + (end - now) * used / total
    return found


def run_suite(suite: Suite, wheels: Path | None = None) -> int:
    """Runs the stages; exit status 0 if all finished."""
    suite.work.mkdir(parents=True, exist_ok=True)
    suite.run = f"{os.getpid()}-{time.time():.0f}"
    for name, record in files.records(suite.work).items():
        if record["state"] == "done":
            suite.settled.add(name)
        elif record["state"] == "running":
            files.write(suite.work / f"{name}.json", {**record, "state": "cut", "problem": "its run was cut"})
    todo = [stage.name for stage in suite.pending()]
    print(f"to run: {', '.join(todo) or 'nothing, all has been done'}", flush=True)
    if todo:
        site = suite.work / "site"
        suite.options["packages"] = install(wheels, site, suite.work / "packages.log")
        when = deadlines(suite.pending(), time.monotonic(), suite.started + suite.budget_s - RESERVE_S)
        try:
            while suite.pending():
                _one_worker(suite, when, site)
        finally:
            suite.publish(last=True)
    text = (suite.out / "summary.md").read_text() if todo else summary(files.records(suite.work))
    print(text)
    states = {name: record.get("state") for name, record in files.records(suite.work).items()}
    return 0 if all(states.get(stage.name) == "done" for stage in suite.stages) else 1


def environment(suite: Suite, site: Path) -> dict[str, str]:
    """Environment of the stages' processes: our code comes first, then the wheels that were brought along. A rehearsal
    sees no GPU."""
    paths = [ROOT, ROOT / "kernels", ROOT / "launch", site, os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(str(path) for path in paths if str(path))}
    env |= {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return env | ({"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"} if suite.rehearse else {})


def _one_worker(suite: Suite, when: Mapping[str, float], site: Path) -> None:
    """Starts a process for all pending stages, supervises it until it ends, and records what it did."""
    functions = {stage.name: stage.function for stage in suite.pending()}
    settings = {
        "work": str(suite.work), "run": suite.run, "stages": functions, "deadlines": dict(when),
        "rehearse": suite.rehearse, "options": suite.options,
    }  # fmt: skip
    files.write(suite.work / "settings.json", settings)
    command = [sys.executable, "-m", "benchmarks.gpu.worker", str(suite.work / "settings.json")]
    log = suite.work / "worker.log"
    said = log.stat().st_size if log.exists() else 0
    process = start(command, log, environment(suite, site))
    try:
        late = _watch(suite, process, when)
    finally:
        kill_group(process, mercy_s=2.0)
    _settle(suite, list(functions), late, process.returncode, log.read_text(errors="replace")[said:][-3000:])
    suite.publish(last=True)


def _watch(suite: Suite, process: subprocess.Popen, when: Mapping[str, float]) -> str | None:
    """Publishes while the process runs; returns the stage that had to be ended, or None."""
    seen: dict[str, str] = {}
    while process.poll() is None:
        running = None
        states = {}
        for name, record in files.records(suite.work).items():
            if record.get("run") == suite.run:
                states[name] = f"{record.get('state')} {record.get('seconds')}"
                running = name if record.get("state") == "running" else running
        ended = [name for name in states if not states[name].startswith("running") and seen.get(name) != states[name]]
        if ended:
            print(f"{time.monotonic() - suite.started:5.0f} s  {', '.join(f'{n}: {states[n]}' for n in ended)} s")
            sys.stdout.flush()
        if ended or (states != seen and time.monotonic() - suite.published > PUBLISH_S):
            suite.publish(last=bool(ended))
        seen = states
        if running is not None and time.monotonic() > when[running] + GRACE_S:
            return running
        time.sleep(0.2)
    return None


def _settle(suite: Suite, names: Sequence[str], late: str | None, status: int, tail: str) -> None:
    """Marks the stages that ended. If the process died, the stage that it ran, or else the first, counts as failed."""
    progress = False
    for name in names:
        record = files.read(suite.work / f"{name}.json") or {}
        if record.get("run") != suite.run:
            continue
        state = record.get("state")
        if name == late:
            suite.note(name, state="cut", problem="its time was over", log=tail)
        elif state == "running":
            result = {**(record.get("result") or {}), "died": True}
            suite.note(name, state="failed", problem=f"its process ended with {status}", log=tail, result=result)
            if "begun" in result and _may_try_again(suite, name):  # it knows what to leave out
                progress = True
                continue
        elif state == "lost":
            if _may_try_again(suite, name):
                progress = True
                continue
            suite.note(name, state="failed", problem=f"the GPU was lost {MOST_TRIES} times")
        suite.settled.add(name)
        progress = True
    if not progress and status != LOST:
        suite.note(names[0], state="failed", problem=f"its process ended with {status} before it began", log=tail)
        suite.settled.add(names[0])


def _may_try_again(suite: Suite, name: str) -> bool:
    suite.tries[name] = suite.tries.get(name, 1) + 1
    return suite.tries[name] <= MOST_TRIES


def stop_on_signal() -> None:
    """SIGTERM ends the suite as Ctrl-C does: its processes are ended and its files are written."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
