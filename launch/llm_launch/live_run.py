"""Causes faults in a live run of this machine and measures how it goes on.

What a drill knows it reads from the run folder, as an operator would; it acts from outside, by signals, but for faults
that only the process itself can have (``llm_parallel/worker/faults.py``), which go through the controller.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from llm_launch import wire
from llm_launch.copy_files import forget_run
from llm_launch.zygote import die_with_parent
from llm_parallel.config.tree import ElasticConfig

POLL_S = 0.02


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a file of JSON lines, torn ones left out; empty if there is none."""
    found = []
    with contextlib.suppress(OSError):
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found


def unix_time(record: Mapping[str, Any]) -> float:
    """Time of a record of events.jsonl or metrics.jsonl in Unix seconds."""
    return datetime.fromisoformat(record["time"]).timestamp()


@dataclass(frozen=True)
class Target:
    """The device of a rank, and the processes there."""

    rank: int
    node: str
    device: int
    pid: int
    agent_pid: int
    workers: tuple[int, ...]
    """All workers of the node."""


@dataclass
class LiveRun:
    """One run that a drill started, and its folder."""

    run_dir: Path
    process: subprocess.Popen[bytes]
    secret: str
    faults: list[tuple[float, str]] = field(default_factory=list)
    throttles: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @classmethod
    def start(cls, run_file: Path, overrides: Sequence[str], run_dir: Path, nodes: int, processes: int) -> LiveRun:
        """``llm-parallel launch`` in the background; its output goes to ``run_dir/launch.log``."""
        run_dir.mkdir(parents=True, exist_ok=True)
        secret = wire.new_secret()
        arguments = [f"run_dir={run_dir}", "elastic.drills=true", *overrides]
        arguments += ["--nodes", str(nodes), "--processes", str(processes)]
        with (run_dir / "launch.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "llm_parallel.cli", "launch", str(run_file), *arguments],
                env={**os.environ, "LLM_PARALLEL_SECRET": secret},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=partial(die_with_parent, os.getpid()),  # a run that nobody watches would go on for ever
            )
        return cls(run_dir, process, secret)

    def status(self) -> dict[str, Any]:
        """elastic.json; empty before there is one."""
        try:
            return json.loads((self.run_dir / "elastic.json").read_text())
        except (OSError, ValueError):
            return {}

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """Events of these kinds, or all."""
        return [e for e in read_lines(self.run_dir / "events.jsonl") if not kinds or e["event"] in kinds]

    def steps(self) -> list[dict[str, Any]]:
        """Step records in the order in which they were written, made again or not."""
        return [record for record in read_lines(self.run_dir / "metrics.jsonl") if "train/grad_norm" in record]

    def losses(self) -> dict[int, float]:
        """Loss of every step as it was made last."""
        return {record["step"]: record["train/loss"] for record in self.steps()}

    def until(self, condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
        """Waits for ``condition``. Raises TimeoutError, with the end of the log, when time is up or the run ended."""
        deadline = time.monotonic() + timeout_s
        while not (found := condition()):
            over = self.process.poll() is not None
            if (over and not condition()) or time.monotonic() > deadline:
                log = (self.run_dir / "launch.log").read_text(errors="replace")[-3000:]
                raise TimeoutError(f"{what} did not happen ({'run ended' if over else 'time is up'}):\n{log}")
            time.sleep(POLL_S)
        return found

    def reach(self, step: int, timeout_s: float = 120.0) -> None:
        """Waits until ``step`` is made."""
        self.until(lambda: any(record["step"] >= step for record in self.steps()), timeout_s, f"step {step}")

    def worker(self, rank: int) -> tuple[str, int, int]:
        """Node, device and process of a rank; waits while a killed one is not replaced."""
        target = self.target(rank)
        return target.node, target.device, target.pid

    def target(self, rank: int) -> Target:
        """What stands at a rank; waits while a killed process is not replaced."""
        found: Target = self.until(lambda: self.target_now(rank), 30.0, f"a process of rank {rank}")
        return found

    def target_now(self, rank: int) -> Target | None:
        """What stands at a rank by the run's last status; None while a killed process is not replaced."""
        status = self.status()
        if len(status.get("ranks", ())) <= rank:
            return None
        node, index = status["ranks"][rank]
        entry = next((item for item in status["nodes"] if item["name"] == node), None)
        if entry is None or str(index) not in entry["workers"]:
            return None
        workers = tuple(entry["workers"].values())
        return Target(rank, node, index, entry["workers"][str(index)], entry["agent_pid"], workers)

    def cause(self, kind: str, rank: int, **details: Any) -> float:
        """Causes one fault at the device of ``rank``; the Unix time of it.

        kinds: kill, stop (the worker's process), slow (it runs a fifth of the time, or a ``factor``-th), agent (its
        agent), node (agent and all its processes at once), partner (its second copies go to an ``address``), and nan,
        flip, raise, stall, hold inside the worker.
        """
        return self.cause_at(kind, self.target(rank), **details)

    def cause_at(self, kind: str, target: Target, **details: Any) -> float:
        """The same at what was found before. Raises ProcessLookupError if its process has ended meanwhile."""
        now = time.time()
        if kind in ("kill", "stop"):
            self._signal(target.pid, signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
        elif kind == "slow":
            command = [sys.executable, "-m", "llm_launch.throttle", str(target.pid), str(details.get("factor", 5.0))]
            self.throttles.append(subprocess.Popen(command, preexec_fn=partial(die_with_parent, os.getpid())))
        elif kind == "agent":
            self._signal(target.agent_pid, signal.SIGKILL)
        elif kind == "node":
            for process in (*target.workers, target.agent_pid):
                with contextlib.suppress(ProcessLookupError):
                    self._signal(process, signal.SIGKILL)
        else:  # what only the process itself can have, and "partner", which its agent tells it
            host, port = self.status()["controller"]
            with wire.connect_blocking(host, port, self.secret) as connection:
                fault = {"kind": kind, **details}
                wire.send(connection, {"is": "drill", "node": target.node, "device": target.device, "fault": fault})
                time.sleep(POLL_S)
        return self.note_fault(f"{kind} at rank {target.rank} ({target.node}/{target.device})", now)

    def note_fault(self, what: str, at_s: float | None = None) -> float:
        """Keeps a fault that was caused at a Unix time, now unless it is given; that time."""
        at_s = time.time() if at_s is None else at_s
        self.faults.append((at_s, what))
        return at_s

    def _signal(self, pid: int, number: signal.Signals) -> None:
        """To a process of this run; a number that another process has by now is left alone."""
        ours = self.process.pid
        try:
            if pid <= 0 or ours not in {parent.pid for parent in psutil.Process(pid).parents()}:
                raise ProcessLookupError(f"process {pid} is none of this run")
        except psutil.Error:
            raise ProcessLookupError(f"process {pid} has ended") from None
        os.kill(pid, number)

    def first_step_after(self, fault_s: float, timeout_s: float = 120.0) -> dict[str, Any]:
        """The first step of a generation formed after the fault."""

        def found() -> dict[str, Any] | None:
            formed = [unix_time(event) for event in self.events("form") if unix_time(event) > fault_s]
            if not formed:
                return None
            return next((record for record in self.steps() if unix_time(record) > formed[0]), None)

        return self.until(found, timeout_s, "a step after the fault")

    def saved_step(self) -> int:
        """Step of the newest complete checkpoint; 0 if there is none."""
        try:
            return int((self.run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
        except (OSError, ValueError):
            return 0

    def stop(self) -> None:
        """Asks the run to save and end."""
        self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float = 300.0) -> int:
        """Exit status of the run."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(
                "the run did not end:\n" + (self.run_dir / "launch.log").read_text(errors="replace")[-3000:]
            ) from None

    def close(self) -> None:
        """Ends the run if it still lives, and removes its copies from memory: nobody will go on from them."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for throttle in self.throttles:
            throttle.kill()
            throttle.wait()
        forget_run(Path(ElasticConfig().replica_dir), self.run_dir)
