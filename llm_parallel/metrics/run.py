"""The metrics of one run: opens what the configuration asks for and hands every record to each of them."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from llm_parallel.config.tree import RunConfig
from llm_parallel.errors import UserError
from llm_parallel.jsonlines import JsonLines
from llm_parallel.metrics.console import ConsoleSink
from llm_parallel.metrics.record import EvalRecord, StepRecord
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
    """Where a run runs; written at the top of its metrics."""

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
        """What rates are given per."""
        return "GPU" if self.is_cuda else "process"


class MetricsLike(Protocol):
    """What the training loop tells about itself."""

    def start(self, lines: Sequence[str]) -> None:
        """Prints ``lines`` before the first step."""

    def step(self, record: StepRecord) -> None:
        """Records a step."""

    def eval(self, record: EvalRecord) -> None:
        """Records an evaluation."""

    def message(self, text: str) -> None:
        """Prints ``text``."""

    def event(self, kind: str, **fields: Any) -> None:
        """Records that ``kind`` happened."""

    def close(self) -> None:
        """Writes what is left."""


class NullMetrics:
    """Every rank but the first says nothing."""

    def start(self, lines: Sequence[str]) -> None:
        """Nothing."""

    def step(self, record: StepRecord) -> None:
        """Nothing."""

    def eval(self, record: EvalRecord) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""

    def event(self, kind: str, **fields: Any) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Metrics:
    """Console, metrics.jsonl, events.jsonl and what ``config.log`` asks for, under ``run_dir``. Build it on rank 0.

    ``resumed_step`` is the last step that a loaded checkpoint had done, 0 for a new run. Raises UserError where a
    package is missing, a port is taken, or a file cannot be written: now, or from a later call when the disk is full.
    """

    def __init__(
        self, run_dir: str | Path, config: RunConfig, *, world: World, resumed_step: int, total_steps: int
    ) -> None:
        run_dir = Path(run_dir)
        run_start = {"step": resumed_step, "total_steps": total_steps, **asdict(world)}
        log = config.log
        openers: list[Callable[[], Sink]] = []
        # What can be refused comes first, so that a refusal leaves nothing behind.
        if log.prometheus_port:
            openers.append(lambda: PrometheusSink(log.prometheus_port or 0))
        if log.wandb_project:
            openers.append(lambda: WandbSink(log.wandb_project or "", run_dir, config.model_dump(mode="json")))
        openers.append(lambda: JsonlSink(run_dir / "metrics.jsonl", run_start))
        if log.tensorboard:
            openers.append(lambda: TensorBoardSink(run_dir / "tensorboard", resumed_step))
        openers.append(lambda: ConsoleSink(total_steps, resumed_step, world.unit))
        self._sinks: list[Sink] = []
        try:
            for opener in openers:
                with _naming(run_dir):
                    self._sinks.append(opener())
            self._events = JsonLines(run_dir / "events.jsonl")
        except BaseException:
            self._close_sinks()
            raise
        self.event("run_start", **run_start)

    def start(self, lines: Sequence[str]) -> None:
        """Prints ``lines`` before the first step."""
        self._each(lambda sink: sink.start(lines))

    def step(self, record: StepRecord) -> None:
        """Records a step everywhere."""
        self._each(lambda sink: sink.step(record))

    def eval(self, record: EvalRecord) -> None:
        """Records an evaluation everywhere."""
        self._each(lambda sink: sink.eval(record))

    def message(self, text: str) -> None:
        """Prints ``text`` for a person."""
        self._each(lambda sink: sink.message(text))

    def event(self, kind: str, **fields: Any) -> None:
        """Appends ``{"event": kind, …, "time": now}`` to events.jsonl. Fields are JSON values."""
        self._events.append({"event": kind, **fields})

    def close(self) -> None:
        """Writes what is left and frees files and ports."""
        try:
            self._close_sinks()
        finally:
            self._events.close()

    def _each(self, act: Callable[[Sink], None]) -> None:
        for sink in self._sinks:
            with _naming(sink.target):
                act(sink)

    def _close_sinks(self) -> None:
        problem: UserError | None = None
        while self._sinks:
            sink = self._sinks.pop()
            try:
                with _naming(sink.target):
                    sink.close()
            except UserError as error:
                problem = error
        if problem:
            raise problem


@contextmanager
def _naming(target: object) -> Iterator[None]:
    """Turns what the system refuses (a full disk, a closed pipe) into a sentence that names ``target``."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot write metrics to {target}: {reason}; make room there or choose another") from error


def open_metrics(
    rank: int, run_dir: str | Path, config: RunConfig, *, world: World, resumed_step: int, total_steps: int
) -> MetricsLike:
    """``Metrics`` on rank 0, ``NullMetrics`` on every other."""
    if rank:
        return NullMetrics()
    return Metrics(run_dir, config, world=world, resumed_step=resumed_step, total_steps=total_steps)
