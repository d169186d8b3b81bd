"""Runs each contender of ``bench step`` in a process of its own, and times them in turns."""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from llm_parallel.config.tree import RunConfig
from llm_parallel.lines import say

WARMUP_STEPS = 3


@dataclass
class Finding:
    """What was measured of one contender."""

    losses: list[float] = field(default_factory=list)
    """Of the first steps, in nats per token."""
    seconds: list[float] = field(default_factory=list)
    """Of a step, for each round."""
    split: dict[str, float] = field(default_factory=dict)
    """Seconds of each part of a step."""
    peak_bytes: int = 0
    """Peak of CUDA's allocator; on a CPU, growth of the process over what it had before it built the model."""
    problem: str | None = None
    """Why it failed; None if it did not."""


def taking_turns(
    names: Sequence[str], config: RunConfig, rounds: int, steps: int, trace: str | None
) -> dict[str, Finding]:
    """Runs all contenders at the same time, and times each once in every round, in rotated order."""
    findings = {name: Finding() for name in names}
    with contextlib.ExitStack() as stack:
        pipes = {name: stack.enter_context(_contender(name, config, findings[name])) for name in names}
        able = [name for name in names if findings[name].problem is None]
        for number in range(rounds):
            turn = number % max(len(able), 1)
            for name in able[turn:] + able[:turn]:
                _time_round(pipes[name], findings[name], steps)
        for name in able:
            _look_closer(pipes[name], findings[name], _trace_path(trace, name))
    return findings


def one_after_the_other(
    names: Sequence[str], config: RunConfig, rounds: int, steps: int, trace: str | None
) -> dict[str, Finding]:
    """Runs one contender at a time on the device: half of the rounds in the order given, the rest in reversed order."""
    findings = {name: Finding() for name in names}
    first = (rounds + 1) // 2
    for part, order in ((first, list(names)), (rounds - first, list(reversed(names)))):
        for name in order if part else ():
            finding = findings[name]
            with _contender(name, config, finding) as pipe:
                for _ in range(part):
                    _time_round(pipe, finding, steps)
                if not finding.split:
                    _look_closer(pipe, finding, _trace_path(trace, name))
    return findings


def _trace_path(folder: str | None, name: str) -> str | None:
    return str(Path(folder) / f"{name}.json") if folder else None


@contextlib.contextmanager
def _contender(name: str, config: RunConfig, finding: Finding) -> Iterator[Connection]:
    """Starts a contender, lets it warm up, and gives the connection to it."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(name, config, there), daemon=True)
    process.start()
    there.close()
    first = _ask(here, finding)
    if first is not None:
        finding.losses, finding.peak_bytes = first
        say(f"{name}: first losses {', '.join(f'{loss:.6f}' for loss in finding.losses)}")
    else:
        say(f"{name}: {finding.problem}")
    try:
        yield here
    finally:
        with contextlib.suppress(OSError):
            here.send(("stop",))
        process.join(timeout=20)
        if process.is_alive():
            process.kill()


def _ask(pipe: Connection, finding: Finding, *request: Any) -> Any:
    """The contender's answer; None after a failure, which is kept in the finding."""
    if finding.problem is not None:
        return None
    try:
        if request:
            pipe.send(request)
        answer, problem = pipe.recv()
    except (EOFError, OSError):
        answer, problem = None, "its process died (out of memory?)"
    finding.problem = problem
    if problem is not None:
        finding.seconds = []
    return answer


def _time_round(pipe: Connection, finding: Finding, steps: int) -> None:
    seconds = _ask(pipe, finding, "time", steps)
    if seconds is not None:
        finding.seconds.append(seconds)


def _look_closer(pipe: Connection, finding: Finding, trace: str | None) -> None:
    """Measures the split and the trace after the timed rounds, since both cost time."""
    finding.split = _ask(pipe, finding, "split") or {}
    if trace is not None:
        _ask(pipe, finding, "trace", trace)


def _serve(name: str, config: RunConfig, pipe: Connection) -> None:
    """Runs in the contender's process."""
    warnings.filterwarnings("ignore")  # about packages that are not installed; the table says what ran
    try:
        _Server(name, config).run(pipe)
    except Exception as error:  # a contender's failure is a result
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        pipe.send((None, text[:300]))


class _Server:
    def __init__(self, name: str, config: RunConfig) -> None:
        import torch

        from llm_parallel.bench.contenders import CONTENDERS

        self.cuda = config.device == "cuda"
        if self.cuda:
            torch.cuda.init()
        before = psutil.Process().memory_info().rss
        self.contender = CONTENDERS[name](config)
        losses = [self.contender.step() for _ in range(WARMUP_STEPS)]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        self.first = losses, torch.cuda.max_memory_allocated() if self.cuda else max(peak, 0)

    def run(self, pipe: Connection) -> None:
        """Answers requests until told to stop."""
        pipe.send((self.first, None))
        while (request := pipe.recv())[0] != "stop":
            pipe.send((getattr(self, request[0])(*request[1:]), None))

    def time(self, steps: int) -> float:
        """Mean seconds of ``steps`` steps."""
        self._synchronize()
        started = time.perf_counter()
        for _ in range(steps):
            self.contender.step()
        self._synchronize()
        return (time.perf_counter() - started) / steps

    def split(self) -> dict[str, float]:
        """Seconds of each part of one step."""
        from llm_parallel.bench.clock import SplitClock

        clock = SplitClock(self.contender.modules, self.cuda)
        with clock.watching():
            clock.enter("backward")
            self.contender.gradient()
            clock.enter("clip and AdamW")
            self.contender.update()
            return clock.seconds()

    def trace(self, path: str) -> None:
        """Writes a Chrome trace of one step."""
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.cuda else [])]
        with profile(activities=activities) as profiler:
            self.contender.step()
            self._synchronize()
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(path)

    def _synchronize(self) -> None:
        import torch

        if self.cuda:
            torch.cuda.synchronize()
