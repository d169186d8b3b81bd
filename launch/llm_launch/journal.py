"""What the controller writes: events with their time and cause, the present state, and what a next start must know."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from llm_launch.blame import Device, Fault, Verdict
from llm_launch.copy_files import RUN_ID_NAME
from llm_launch.hooks import Hooks
from llm_launch.sentences import sentence
from llm_parallel.config.tree import ElasticConfig
from llm_parallel.errors import UserError
from llm_parallel.files import atomic_write, read_json, read_small
from llm_parallel.jsonlines import JsonLines
from llm_parallel.lines import note

QUIET = {"join", "status"}
UNTRACED = (Fault.USER, Fault.HOST_MEMORY, Fault.AGENT, Fault.NODE)
"""Ends of a run that no process's traceback explains; one that lies there is of something else."""
MEMORY_NAME = "elastic_memory.json"
NEEDED = (RUN_ID_NAME, "config.yaml", MEMORY_NAME)
"""Files of the run folder that recoveries and the next start read."""


def as_prometheus(status: dict[str, Any]) -> str:
    """The state in Prometheus' text format, for node_exporter's textfile collector (or any that reads a file)."""
    numbers = {
        "step": ("gauge", "last finished optimizer step", status["step"]),
        "generation": ("gauge", "times that ranks were assigned to devices", status["generation"]),
        "world_size": ("gauge", "processes that train", status["world_size"]),
        "recoveries_total": ("counter", "faults recovered from since the start", status["recoveries"]),
        "lost_steps_total": ("counter", "steps made again since the start", status["lost_steps"]),
        "excluded_devices": ("gauge", "devices removed for good", len(status["excluded"])),
        "missing_nodes": ("gauge", "expected nodes that are not there", len(status.get("missing", ()))),
        "goodput": ("gauge", "part of the time since the start not spent recovering", status["goodput"]["fraction"]),
        "single_copies": (
            "gauge",
            "processes without a second memory copy on another node",
            status.get("single_copies", 0),
        ),
        "training": ("gauge", "whether steps are made", int(status["state"] == "training")),
    }
    lines = []
    for name, (kind, text, value) in numbers.items():
        full = f"llm_parallel_elastic_{name}"
        lines += [f"# HELP {full} {text}", f"# TYPE {full} {kind}", f"{full} {value}"]
    return "\n".join(lines) + "\n"


class Journal:
    """events.jsonl, elastic.json and elastic_memory.json of one run folder, and the terminal.

    A thread of its own does the writing, in order: the run folder is on a shared file system, which may keep a writer
    waiting for longer than agents wait for a sign of life of the controller.
    """

    def __init__(self, run_dir: Path, elastic: ElasticConfig, secret: str) -> None:
        self._run_dir, self._elastic, self._secret = run_dir, elastic, secret
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        self._needed = {name: data for name in NEEDED if (data := _content(run_dir / name)) is not None}
        """What the next start cannot do without, by file name."""
        self._failing = False
        self._events = JsonLines(run_dir / "events.jsonl")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._newest: dict[str, Any] | None = None
        self._lock = threading.Lock()
        self._hooks = Hooks(elastic.on_event, self.say) if elastic.on_event else None
        self._faulted_s: float | None = None
        self._down_s = 0.0
        self._started_s = time.monotonic()
        self.recoveries = 0
        self.lost_steps = 0
        self.resumed_step = 0
        self.on_resume: Callable[[int], None] | None = None
        """Is told the step from which a generation goes on."""

    def later(self, work: Callable[[], None]) -> None:
        """Has ``work`` done by the thread that writes, after what was handed in before."""

        def done() -> None:
            try:
                work()
            except (OSError, UserError) as error:
                if not self._failing:
                    self.say(f"events or state cannot be written: {error}; it is tried again every second")
                self._failing = True
            else:
                if self._failing:
                    self.say("events and state are written again")
                self._failing = False

        with contextlib.suppress(RuntimeError):  # of a journal that is closed: an agent's connection may end later
            self._writer.submit(done)

    def event(self, kind: str, **fields: Any) -> None:
        """Records an event, prints it, and passes it to the command ``elastic.on_event``."""
        now = time.monotonic()
        if kind == "detect":
            self._faulted_s = self._faulted_s or now
            self.recoveries += 1
        elif kind == "resume":
            self.resumed_step = fields.get("step", 0)
            if self.on_resume is not None:
                self.on_resume(self.resumed_step)
            if self._faulted_s is not None:
                fields["seconds_since_detection"] = round(now - self._faulted_s, 3)
                self._down_s += now - self._faulted_s
                self._faulted_s = None
        fields = {name: round(value, 3) if isinstance(value, float) else value for name, value in fields.items()}
        record = {"event": kind, **{name: value for name, value in fields.items() if value is not None}}
        self.later(partial(self._events.append, record, datetime.now(timezone.utc)))
        if kind not in QUIET:
            self.say(sentence(record))
        if self._hooks is not None:
            self._hooks.put(record)

    def say(self, text: str) -> None:
        """One line on the terminal, if there still is one."""
        with contextlib.suppress(OSError, ValueError):
            if sys.stderr.isatty():
                sys.stderr.write("\r\x1b[K")  # a worker's progress bar may stand there; it is drawn anew below
        note(f"elastic | {text}")

    def fail(self, verdict: Verdict) -> None:
        """Records and prints why the run cannot go on, after the first traceback."""
        record = {"event": "fail", "fault": verdict.fault.value, "cause": verdict.reason}
        self.later(partial(self._events.append, record, datetime.now(timezone.utc)))
        if verdict.fault not in UNTRACED:
            self.later(self._print_first_traceback)
        self._writer.submit(note, verdict.reason)

    def _print_first_traceback(self) -> None:
        traces = sorted(self._run_dir.glob("logs/traceback_*.txt"), key=lambda path: path.stat().st_mtime)
        if traces:
            note(read_small(traces[0]).decode(errors="replace"))

    def keep_traceback(self, device: Device, generation: int, text: str) -> None:
        """A worker's traceback, in the logs."""
        path = self._run_dir / "logs" / f"traceback_g{generation}_{device.node}_{device.number}.txt"
        self.later(partial(_replace, path, text))

    def keep_stacks(self, generation: int, looks: dict[str, Any]) -> None:
        """Stacks and collectives of all workers at a hang."""
        self.later(partial(_replace, self._run_dir / "logs" / f"hang_g{generation}.json", json.dumps(looks, indent=1)))

    def write_status(self, status: dict[str, Any]) -> None:
        """Replaces elastic.json. Of several states that wait to be written, only the newest is."""
        elapsed = time.monotonic() - self._started_s
        down = self._down_s + (time.monotonic() - self._faulted_s if self._faulted_s is not None else 0.0)
        waiting, self._newest = (
            self._newest,
            {
                **status,
                "recoveries": self.recoveries,
                "lost_steps": self.lost_steps,
                "goodput": {
                    "elapsed_s": round(elapsed, 1),
                    "down_s": round(down, 3),
                    "fraction": round(1 - down / max(elapsed, 1e-9), 4),
                },
                "updated": time.time(),
            },
        )
        if waiting is None:
            self.later(self._write_newest)

    def _write_newest(self) -> None:
        with self._lock:
            status, self._newest = self._newest, None
        assert status is not None
        self._restore_folder()
        _replace(self._run_dir / "elastic.json", json.dumps(status))
        _replace(self._run_dir / "elastic.prom", as_prometheus(status))

    def _restore_folder(self) -> None:
        """Puts back what the next start needs if somebody has deleted the run folder: without the run's number nobody
        would find the memory copies, and without its run file no generation could be formed."""
        missing = [name for name in self._needed if not (self._run_dir / name).exists()]
        for name in missing:
            with atomic_write(self._run_dir / name, "wb") as handle:
                handle.write(self._needed[name])
        if missing:
            (self._run_dir / "logs").mkdir(exist_ok=True)
            cause = f"{', '.join(missing)} in {self._run_dir} had been deleted and were written anew; checkpoints, logs"
            self.event("folder_restored", cause=f"{cause} and numbers that were deleted too are gone")

    def remember(self, ledger: dict[str, Any]) -> None:
        """Keeps strikes and removals for the next start."""
        text = json.dumps(ledger)

        def write() -> None:
            self._needed[MEMORY_NAME] = text.encode()
            _replace(self._run_dir / MEMORY_NAME, text)

        self.later(write)

    def remembered(self) -> dict[str, Any]:
        """What an earlier start kept; empty if there was none."""
        try:
            return dict(read_json(self._run_dir / MEMORY_NAME))
        except (OSError, ValueError, TypeError):
            return {}

    def last_generation(self) -> int:
        """Generation of an earlier start, so that this one's are new."""
        try:
            return int(read_json(self._run_dir / "elastic.json")["generation"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def close(self) -> None:
        """Writes what is left and closes the files."""
        if self._hooks is not None:
            self._hooks.close()
        self._writer.shutdown(wait=True)
        self._events.close()


def _content(path: Path) -> bytes | None:
    try:
        return read_small(path)
    except OSError:
        return None


def _replace(path: Path, text: str) -> None:
    with atomic_write(path) as handle:
        handle.write(text)
