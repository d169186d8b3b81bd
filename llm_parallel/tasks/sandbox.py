"""Runs Python programs that nobody trusts, and tests them.

    with Sandbox() as sandbox:
        sandbox.run(Tested("def add(a, b): return a + b", "assert add(1, 2) == 3")).status  # "passed"
        sandbox.run(Script("print(input())", given="hello")).output                         # "hello\\n"

A worker is an interpreter that has given up what a program must not have: in namespaces of its own (``bwrap``,
bubblewrap), or by Landlock and a seccomp filter (``landlock``), which need neither a package nor a privilege. It forks
one process for each program, and another for its tests, which calls the program's functions and compares what they
return as values of Python's own types: a program cannot reach what judges it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import selectors
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from llm_parallel.errors import UserError
from llm_parallel.tasks.sandbox_worker import MODES, Limits, Mode, Setup, Worker, WorkerEnded, setups

Status = Literal["passed", "failed", "timeout", "memory", "output", "crashed"]
__all__ = ["MODES", "Job", "Limits", "Mode", "Sandbox", "SandboxFailed", "SandboxResult", "Script", "Status", "Tested"]

LONGER = 9
"""Times that the limit on wall time is extended for a program that wants to go on and gets no processor: what it may
compute, the limit on processor time says."""
TAIL = 2000
"""Characters of a program's last messages that a result keeps."""


class SandboxFailed(UserError):
    """The sandbox itself failed, or tests cannot be run. It says nothing about the program."""


@dataclass(frozen=True)
class Script:
    """A program that reads ``given`` from its standard input and writes its answer. It passes if it ends with status
    0; what it has written is for the caller to compare. otherwise: the first of these is run that is Python if the
    source is none."""

    source: str
    given: str = ""
    otherwise: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tested:
    """A program whose functions tests call.

    tests: Python whose assertions decide; the names that it uses and does not define are the program's, and
    ``candidate`` is the program's ``entry_point``. setup: Python that runs before the tests and beside them, without
    the program (imports, and the prompt of which the program is the completion). stop_early: the first assertion that
    does not hold ends the tests. otherwise: the first of these is taken that is Python if the source is none."""

    source: str
    tests: str
    setup: str = ""
    entry_point: str | None = None
    stop_early: bool = True
    otherwise: tuple[str, ...] = ()


Job = Script | Tested


@dataclass(frozen=True)
class SandboxResult:
    """What came of a program.

    mode: how it was held; status: ``passed``, or what it failed by (``failed``: an assertion or an exception;
    ``timeout``: processor or wall time; ``memory``; ``output``: too much of it, or too many files; ``crashed``: a
    signal); passed and total: assertions that held and their number; reason: a sentence; output and messages: standard
    output, and the end of standard error; exit: the exit status of a script; cpu_s: processor-seconds of the program;
    wall_s: seconds until the result."""

    mode: Mode
    status: Status
    passed: int = 0
    total: int = 0
    reason: str = ""
    output: str = ""
    messages: str = ""
    exit: int | None = None
    cpu_s: float = 0.0
    wall_s: float = 0.0

    @property
    def share(self) -> float:
        """The share of the assertions that held."""
        return self.passed / self.total if self.total else float(self.status == "passed")


class Sandbox:
    """Workers for programs, which are started as they are needed and used again. Threads may share it.

    mode: ``auto`` takes the first of ``bwrap`` and ``landlock`` that works here; ``unsafe`` holds nothing but limits on
    time, memory, files and output. workers: programs at a time; None: as many as processors. packages: folders whose
    modules programs may import. Raises SandboxFailed if no mode works that was allowed."""

    def __init__(
        self,
        mode: Mode | Literal["auto"] = "auto",
        limits: Limits | None = None,
        workers: int | None = None,
        packages: Sequence[str] = (),
    ) -> None:
        if mode != "auto" and mode not in MODES:
            raise UserError(f"the sandbox has no mode {mode!r}; it has auto, {', '.join(MODES)}")
        if sys.platform != "linux":
            raise SandboxFailed(f"programs are run on Linux only, and this is {sys.platform}")
        self.limits = limits or Limits()
        self.workers = workers or len(os.sched_getaffinity(0))
        self._places = threading.Semaphore(self.workers)
        self._lock = threading.Lock()
        self._idle: list[Worker] = []
        self._process = os.getpid()
        self._starter = ThreadPoolExecutor(1)
        self.refused: dict[str, str] = {}
        """Why modes that were tried before do not work here, in the words of the system."""
        self._setup = self._first_that_works(mode, packages)
        self.mode: Mode = self._setup.mode
        """How programs are held."""

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers."""
        with self._lock:
            idle, self._idle = self._idle, []
        if self._process == os.getpid():
            for worker in idle:
                worker.kill()
            self._starter.shutdown()

    def run(self, job: Job) -> SandboxResult:
        """Runs one program. Raises SandboxFailed if the sandbox fails or its tests are no Python."""
        with self._places:
            for _ in range(3):  # a program cannot end its worker, but the system can, for want of memory
                worker = self._worker()
                try:
                    result, clean = Running(job, self.limits, worker).result()
                except WorkerEnded:
                    worker.kill()
                    continue
                except BaseException:
                    worker.kill()
                    raise
                if clean:
                    with self._lock:
                        self._idle.append(worker)
                else:
                    worker.kill()
                return result
        raise SandboxFailed(
            f"workers of the sandbox ({self.mode}) end while they run a program, which cannot end them; is the "
            "machine's memory exhausted?"
        )

    def run_many(self, jobs: Sequence[Job]) -> list[SandboxResult]:
        """Runs programs, ``workers`` at a time; results in the order of the jobs. Raises as ``run``."""
        if len(jobs) < 2:
            return [self.run(job) for job in jobs]
        with ThreadPoolExecutor(min(self.workers, len(jobs))) as threads:
            return list(threads.map(self.run, jobs))

    def _worker(self) -> Worker:
        with self._lock:
            if self._process != os.getpid():  # a fork has the sockets of workers that are its parent's
                self._idle, self._process, self._starter = [], os.getpid(), ThreadPoolExecutor(1)
            if self._idle:
                return self._idle.pop()
        return self._start(self._setup)

    def _start(self, setup: Setup) -> Worker:
        # A worker dies with the thread that started it, which must not be one that comes and goes.
        worker = self._starter.submit(Worker, setup).result()
        problem = worker.problem()
        if problem:
            worker.kill()
            raise SandboxFailed(f"the sandbox ({setup.mode}) does not start: {problem}")
        return worker

    def _first_that_works(self, mode: str, packages: Sequence[str]) -> Setup:
        wanted = [one for one in MODES if one != "unsafe"] if mode == "auto" else [mode]
        for setup in setups(wanted, self.limits, packages):
            try:
                worker = self._start(setup)
                try:
                    probe = Tested("def two(): return 2", "assert two() == 2")
                    result, _ = Running(probe, self.limits, worker).result()
                finally:
                    worker.kill()
                if result.status == "passed":
                    self.refused.pop(setup.mode, None)
                    return setup
                self.refused[setup.mode] = f"a program of one line ended with {result.status} ({result.reason})"
            except (UserError, OSError, WorkerEnded) as error:
                self.refused[setup.mode] = str(error)
        self._starter.shutdown()
        why = "; ".join(f"{name}: {text}" for name, text in self.refused.items())
        raise SandboxFailed(
            f"no way to hold programs works here ({why}); install bubblewrap, or take a kernel with Landlock (Linux "
            "5.13), or run them without protection by mode unsafe"
        )


@dataclass
class Running:
    """One program at work in one worker."""

    job: Job
    limits: Limits
    worker: Worker
    _kept: dict[str, bytearray] = field(default_factory=lambda: {name: bytearray() for name in ("out", "err", "says")})

    def result(self) -> tuple[SandboxResult, bool]:
        """The result, and whether the worker can take another program. Raises SandboxFailed, and WorkerEnded if the
        worker has ended before the program did."""
        begin = time.monotonic()
        tested = isinstance(self.job, Tested)
        sources = json.dumps([self.job.source, *self.job.otherwise])
        texts = [sources, json.dumps(asdict(self.job)) if tested else getattr(self.job, "given", "")]
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(_file(text)) for text in texts]
            ends = {name: _pipe(stack) for name in (("out", "err", "says") if tested else ("out", "err"))}
            try:
                descriptors = [*(file.fileno() for file in files), *(written for _, written in ends.values())]
                self.worker.ask({"tested": tested}, descriptors)
            finally:
                for _, written in ends.values():
                    os.close(written)
            stopped, reply = self._wait({read: name for name, (read, _) in ends.items()}, begin + self.limits.wall_s)
        said = [json.loads(line) for line in self._kept["says"].split(b"\n")[:-1]]
        outcome = self._status(stopped, reply, said)
        common = {
            "mode": self.worker.setup.mode,
            "output": self._kept["out"].decode("utf-8", "replace"),
            "messages": self._kept["err"].decode("utf-8", "replace")[-TAIL:],
            "cpu_s": reply.get("cpu_s", 0.0),
            "wall_s": time.monotonic() - begin,
        }
        return SandboxResult(**{**outcome, **common}), reply.get("clean", False)

    def _wait(self, reading: dict[int, str], deadline: float) -> tuple[Status | None, dict[str, Any]]:
        """Reads what the program writes until it has ended. Returns by what limit it was stopped, and the worker's
        reply."""
        control, reply, left = self.worker.control, None, self.limits.output_bytes
        longer = LONGER
        with selectors.DefaultSelector() as selector:
            for descriptor, name in reading.items():
                selector.register(descriptor, selectors.EVENT_READ, name)
            selector.register(control, selectors.EVENT_READ, "reply")
            while selector.get_map():
                # Without protection, a child that outlives its program holds the other ends of its pipes.
                lingers = reply is not None and self.worker.setup.mode == "unsafe"
                ready = selector.select(0 if lingers else max(deadline - time.monotonic(), 0))
                if not ready:
                    if lingers:
                        break
                    if not self.worker.is_busy():
                        return "timeout", {}
                    if not longer:
                        raise SandboxFailed(
                            f"a program got less than {self.limits.cpu_s} processor-seconds in "
                            f"{(LONGER + 1) * self.limits.wall_s:g} s; the machine is too busy, so run fewer at a time"
                        )
                    longer -= 1
                    deadline += self.limits.wall_s
                    continue
                for key, _ in ready:
                    if key.data == "reply":
                        selector.unregister(control)
                        reply = self.worker.reply()
                        continue
                    piece = os.read(key.fd, 1 << 16)
                    if not piece:
                        selector.unregister(key.fd)
                    self._kept[key.data] += piece
                    if key.data != "says":
                        left -= len(piece)
                if left < 0:
                    return "output", {}
        return None, reply or {}

    def _status(self, stopped: Status | None, reply: dict[str, Any], said: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Status, reason and counts of the result. Raises as ``result``."""
        broken = next((one["broken"] for one in said if one.get("broken")), None)
        if broken:
            raise SandboxFailed(broken)
        outcomes = [one for one in said if "ok" in one]
        passed = sum(one["ok"] for one in outcomes)
        total = max(len(outcomes), next((one["total"] for one in said if "total" in one), 0))
        counts = {"passed": passed, "total": total}
        if stopped == "timeout":
            return {"status": stopped, "reason": f"it took more than {self.limits.wall_s:g} s", **counts}
        if stopped == "output":
            reason = f"it wrote more than {self.limits.output_bytes:,} bytes"
            return {"status": stopped, "reason": reason, **counts}
        if not reply:
            if self.worker.setup.mode != "unsafe":
                raise WorkerEnded
            return {"status": "crashed", "reason": "it ended the process that watches it", **counts}
        if reply["crowded"]:
            return {"status": "output", "reason": "it made more files than it may", **counts}
        if isinstance(self.job, Script):
            return {"exit": reply["exit"], **self._of_script(reply)}
        return {**counts, **self._of_tests(reply, outcomes, bool(said and said[-1].get("done")))}

    def _of_tests(self, reply: dict[str, Any], outcomes: Sequence[dict[str, Any]], done: bool) -> dict[str, Any]:
        if not done:
            by = self._signal(reply["tests_signal"], reply)
            return {**by, "reason": f"its tests could not end: {by['reason']}"}
        wrong = next((one for one in outcomes if not one["ok"]), None)
        if wrong is None:
            return {"status": "passed"}
        if wrong["kind"] == "Gone" and reply["exit"] is None:
            return self._signal(reply["signal"], reply)
        return {"status": "memory" if wrong["kind"] == "MemoryError" else "failed", "reason": wrong["reason"]}

    def _of_script(self, reply: dict[str, Any]) -> dict[str, Any]:
        if reply["signal"] is not None:
            return self._signal(reply["signal"], reply)
        if reply["exit"] == 0:
            return {"status": "passed"}
        last = (self._kept["err"].decode("utf-8", "replace").strip().splitlines() or [""])[-1]
        reason = last[:TAIL] or f"it ended with status {reply['exit']}"
        return {"status": "memory" if last.startswith("MemoryError") else "failed", "reason": reason}

    def _signal(self, number: int | None, reply: dict[str, Any]) -> dict[str, Any]:
        if number == signal.SIGXCPU or (number == signal.SIGKILL and reply["cpu_s"] >= self.limits.cpu_s):
            return {"status": "timeout", "reason": f"it took more than {self.limits.cpu_s} processor-seconds"}
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        return {"status": "crashed", "reason": f"it was ended by {name}"}


def _file(text: str) -> Any:
    """A text as an open file without a name, which cannot be written to."""
    data = text.encode("utf-8", "surrogatepass")
    memory = os.fdopen(os.memfd_create("given", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "wb")
    memory.write(data)
    memory.flush()
    memory.seek(0)
    fcntl.fcntl(memory.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    return memory


def _pipe(stack: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe, of which the end to read is closed at the end."""
    read, written = os.pipe()
    stack.callback(os.close, read)
    return read, written
