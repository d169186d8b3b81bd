"""What the controller writes: events with their time and cause, the present state, what a restart must remember."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from llm_launch.blame import Device, Verdict
from llm_parallel.config.tree import ElasticConfig
from llm_parallel.files import atomic_write
from llm_parallel.metrics.jsonlines import JsonLines

QUIET = {"join", "status"}


def as_prometheus(status: dict[str, Any]) -> str:
    """The state in Prometheus' text format, for node_exporter's textfile collector (or any that reads a file)."""
    numbers = {
        "step": ("gauge", "last finished optimizer step", status["step"]),
        "generation": ("gauge", "times that the run's processes were put together", status["generation"]),
        "world_size": ("gauge", "processes that train", status["world_size"]),
        "recoveries_total": ("counter", "faults recovered from since the start", status["recoveries"]),
        "lost_steps_total": ("counter", "steps made again since the start", status["lost_steps"]),
        "excluded_devices": ("gauge", "devices removed for good", len(status["excluded"])),
        "goodput": ("gauge", "part of the time since the start not spent recovering", status["goodput"]["fraction"]),
        "training": ("gauge", "whether steps are made", int(status["state"] == "training")),
    }
    lines = []
    for name, (kind, text, value) in numbers.items():
        full = f"llm_parallel_elastic_{name}"
        lines += [f"# HELP {full} {text}", f"# TYPE {full} {kind}", f"{full} {value}"]
    return "\n".join(lines) + "\n"


class Journal:
    """events.jsonl, elastic.json and elastic_memory.json of one run folder, and the terminal."""

    def __init__(self, run_dir: Path, elastic: ElasticConfig, secret: str) -> None:
        self._run_dir, self._elastic, self._secret = run_dir, elastic, secret
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        self._events = JsonLines(run_dir / "events.jsonl")
        self._hooks: list[subprocess.Popen[bytes]] = []
        self._faulted_s: float | None = None
        self._down_s = 0.0
        self._started_s = time.monotonic()
        self.recoveries = 0
        self.lost_steps = 0
        self.resumed_step = 0

    def event(self, kind: str, **fields: Any) -> None:
        """Records, prints, and hands to the user's hook."""
        now = time.monotonic()
        if kind == "detect":
            self._faulted_s = self._faulted_s or now
            self.recoveries += 1
        elif kind == "resume":
            self.resumed_step = fields.get("step", 0)
            if self._faulted_s is not None:
                fields["seconds_since_detection"] = round(now - self._faulted_s, 3)
                self._down_s += now - self._faulted_s
                self._faulted_s = None
        fields = {name: round(value, 3) if isinstance(value, float) else value for name, value in fields.items()}
        record = {"event": kind, **{name: value for name, value in fields.items() if value is not None}}
        self._events.append(record)
        if kind not in QUIET:
            self.say(kind + ": " + ", ".join(f"{name} {value}" for name, value in record.items() if name != "event"))
        self._hook(record)

    def _hook(self, record: dict[str, Any]) -> None:
        self._hooks = [hook for hook in self._hooks if hook.poll() is None]
        if self._elastic.on_event:
            with contextlib.suppress(OSError):
                hook = subprocess.Popen(self._elastic.on_event, shell=True, stdin=subprocess.PIPE)
                assert hook.stdin is not None
                hook.stdin.write(json.dumps(record).encode())
                hook.stdin.close()
                self._hooks.append(hook)

    def say(self, text: str) -> None:
        """One line on the terminal."""
        print(f"elastic | {text}", file=sys.stderr, flush=True)

    def fail(self, verdict: Verdict) -> None:
        """The run cannot go on: why, with the first traceback."""
        self._events.append({"event": "fail", "fault": verdict.fault.value, "cause": verdict.reason})
        traces = sorted(self._run_dir.glob("logs/traceback_*.txt"), key=lambda path: path.stat().st_mtime)
        if traces and verdict.fault.value != "user":
            print(traces[0].read_text(), file=sys.stderr)
        print(verdict.reason, file=sys.stderr, flush=True)

    def keep_traceback(self, device: Device, generation: int, text: str) -> None:
        """A worker's traceback, in the logs."""
        with contextlib.suppress(OSError):
            (self._run_dir / "logs" / f"traceback_g{generation}_{device.node}_{device.number}.txt").write_text(text)

    def keep_stacks(self, generation: int, looks: dict[str, Any]) -> None:
        """Stacks and collectives of all workers at a hang."""
        with contextlib.suppress(OSError), atomic_write(self._run_dir / "logs" / f"hang_g{generation}.json") as handle:
            json.dump(looks, handle, indent=1)

    def write_status(self, status: dict[str, Any]) -> None:
        """Replaces elastic.json."""
        elapsed = time.monotonic() - self._started_s
        down = self._down_s + (time.monotonic() - self._faulted_s if self._faulted_s is not None else 0.0)
        status = {
            **status,
            "recoveries": self.recoveries,
            "lost_steps": self.lost_steps,
            "goodput": {
                "elapsed_s": round(elapsed, 1),
                "down_s": round(down, 3),
                "fraction": round(1 - down / max(elapsed, 1e-9), 4),
            },
            "updated": time.time(),
        }
        with contextlib.suppress(OSError), atomic_write(self._run_dir / "elastic.json") as handle:
            json.dump(status, handle)
        with contextlib.suppress(OSError), atomic_write(self._run_dir / "elastic.prom") as handle:
            handle.write(as_prometheus(status))

    def remember(self, ledger: dict[str, Any]) -> None:
        """Keeps strikes and removals for the next start."""
        with atomic_write(self._run_dir / "elastic_memory.json") as handle:
            json.dump(ledger, handle)

    def remembered(self) -> dict[str, Any]:
        """What an earlier start kept; empty if there was none."""
        try:
            return json.loads((self._run_dir / "elastic_memory.json").read_text())
        except (OSError, ValueError):
            return {}

    def last_generation(self) -> int:
        """Generation of an earlier start, so that this one's are new."""
        try:
            return int(json.loads((self._run_dir / "elastic.json").read_text())["generation"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def close(self) -> None:
        """Closes the files."""
        self._events.close()
