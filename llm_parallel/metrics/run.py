"""Opens the sinks that the configuration asks for, and passes every record of a run to each of them."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from llm_parallel.config.tree import RunConfig
from llm_parallel.errors import UserError
from llm_parallel.jsonlines import JsonLines
from llm_parallel.metrics.console import ConsoleSink
from llm_parallel.metrics.record import AnswerRecord, EvalRecord, StepRecord
from llm_parallel.metrics.sinks import JsonlSink, PrometheusSink, Sink, TensorBoardSink, WandbSink


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers, as far as they are installed."""
    versions = {"python": platform.python_version()}
    for package in ("llm-parallel", "torch", "megatron-core", "triton", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


@dataclass(frozen=True)
class World:
    """The processes and devices of a run, which are written at the top of its metrics."""

    size: int
    """Number of processes."""
    layout: str
    """``Layout.describe()``."""
    device_name: str
    """``Platform.device_name``."""
    is_cuda: bool
    """Whether a process has a GPU."""
    versions: dict[str, str] = field(default_factory=installed_versions)
    """Package versions."""

    @property
    def unit(self) -> str:
        """What rates are given per: "GPU" or "process"."""
        return "GPU" if self.is_cuda else "process"


class Metrics:
    """What the training loop says about itself, handed to every sink; without sinks and events it says nothing.

    Its methods raise UserError where a file cannot be written, as when the disk is full.
    """

    def __init__(self, sinks: Sequence[Sink] = (), events: JsonLines | None = None) -> None:
        self._sinks = list(sinks)
        self._events = events

    def start(self, lines: Sequence[str]) -> None:
        """Prints ``lines`` before the first step."""
        self._each(lambda sink: sink.start(lines))

    def step(self, record: StepRecord) -> None:
        """Records a step everywhere."""
        self._each(lambda sink: sink.step(record))

    def eval(self, record: EvalRecord) -> None:
        """Records an evaluation everywhere."""
        self._each(lambda sink: sink.eval(record))

    def answer(self, record: AnswerRecord) -> None:
        """Records an answer of the model everywhere."""
        self._each(lambda sink: sink.answer(record))

    def message(self, text: str) -> None:
        """Prints ``text`` for a person."""
        self._each(lambda sink: sink.message(text))

    def event(self, kind: str, **fields: Any) -> None:
        """Appends ``{"event": kind, …, "time": now}`` to events.jsonl. Fields are JSON values."""
        if self._events is not None:
            self._events.append({"event": kind, **fields})

    def close(self) -> None:
        """Writes what is left and frees files and ports."""
        try:
            _close(self._sinks)
        finally:
            if self._events is not None:
                self._events.close()

    def _each(self, act: Callable[[Sink], None]) -> None:
        for sink in self._sinks:
            with _naming(sink.target):
                act(sink)


def _close(sinks: list[Sink]) -> None:
    """Closes all of them, the last one opened first; raises what one of them raised only after that."""
    problem: UserError | None = None
    while sinks:
        sink = sinks.pop()
        try:
            with _naming(sink.target):
                sink.close()
        except UserError as error:
            problem = error
    if problem:
        raise problem


@contextmanager
def _naming(target: object) -> Iterator[None]:
    """Turns an error of the system (a full disk, a closed pipe) into a UserError that names ``target``."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot write metrics to {target}: {reason}; make room there or choose another") from error


def open_metrics(
    rank: int, run_dir: str | Path, config: RunConfig, *, world: World, resumed_step: int, total_steps: int
) -> Metrics:
    """On rank 0: console, metrics.jsonl, events.jsonl and what ``config.log`` asks for, under ``run_dir``; on every
    other rank metrics that say nothing.

    ``resumed_step`` is the last step that a loaded checkpoint had done, 0 for a new run. Raises UserError where a
    package is missing, a port is taken, or a file cannot be written.
    """
    if rank:
        return Metrics()
    run_dir = Path(run_dir)
    run_start = {"step": resumed_step, "total_steps": total_steps, **asdict(world)}
    log = config.log
    openers: list[Callable[[], Sink]] = []
    # Those that can fail come first, so that a failure leaves no file behind.
    if log.prometheus_port:
        openers.append(lambda: PrometheusSink(log.prometheus_port or 0))
    if log.wandb_project:
        openers.append(lambda: WandbSink(log.wandb_project or "", run_dir, config.model_dump(mode="json")))
    openers.append(lambda: JsonlSink(run_dir / "metrics.jsonl", run_start))
    if log.tensorboard:
        openers.append(lambda: TensorBoardSink(run_dir / "tensorboard", resumed_step))
    openers.append(lambda: ConsoleSink(total_steps, resumed_step, world.unit))
    sinks: list[Sink] = []
    try:
        for opener in openers:
            with _naming(run_dir):
                sinks.append(opener())
        events = JsonLines(run_dir / "events.jsonl")
    except BaseException:
        _close(sinks)
        raise
    metrics = Metrics(sinks, events)
    metrics.event("run_start", **run_start)
    return metrics
