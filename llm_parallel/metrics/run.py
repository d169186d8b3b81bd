"""Opens the sinks that the configuration asks for, and passes every record of a run to each of them."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from llm_parallel.config.tree import RunConfig
from llm_parallel.errors import UserError
from llm_parallel.jsonlines import JsonLines
from llm_parallel.lines import note
from llm_parallel.metrics.console import ConsoleSink
from llm_parallel.metrics.record import AnswerRecord, EvalRecord, StepRecord, TaskRecord
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


@dataclass
class _Outlet:
    """A sink, and what became of it. ``reopen`` opens it anew after a step; None where that cannot help."""

    target: str
    sink: Sink | None
    reopen: Callable[[int], Sink] | None = None
    failed: bool = False
    step: int = 0
    """The last step that it was given."""

    def tell(self, act: Callable[[Sink], None]) -> None:
        """Hands a record on. Raises UserError."""
        with _naming(self.target):
            if self.sink is None and self.reopen is None:
                return
            self.open()
            assert self.sink is not None
            try:
                act(self.sink)
            except (OSError, UserError):
                self.drop()
                raise

    def open(self) -> None:
        """Opens the sink if it is not open. Raises UserError."""
        if self.sink is None and self.reopen is not None:
            with _naming(self.target):
                self.sink = self.reopen(self.step)

    def drop(self) -> None:
        """Lets the sink go as it is; another one takes its place at the next record."""
        sink, self.sink = self.sink, None
        if sink is not None:
            with suppress(OSError, UserError):
                sink.close()


class Metrics:
    """What the training loop says about itself, handed to every sink; without sinks and events it says nothing.

    A sink that cannot be written (a full disk, a deleted folder, a terminal that is gone) ends no run: that is an event
    and a message where there still is one, the sink is tried again at every record, and its return is another event.
    """

    def __init__(self, outlets: Sequence[_Outlet] = (), events: JsonLines | None = None) -> None:
        self._outlets = list(outlets)
        self._events = events
        self._unwritten = False
        self._speaking = False

    def start(self, lines: Sequence[str]) -> None:
        """Prints ``lines`` before the first step."""
        self._each(lambda sink: sink.start(lines))

    def step(self, record: StepRecord) -> None:
        """Records a step everywhere."""
        self._each(lambda sink: sink.step(record))
        for outlet in self._outlets:
            outlet.step = record.step

    def eval(self, record: EvalRecord) -> None:
        """Records an evaluation everywhere."""
        self._each(lambda sink: sink.eval(record))

    def tasks(self, record: TaskRecord) -> None:
        """Records scores of tasks everywhere."""
        self._each(lambda sink: sink.tasks(record))

    def answer(self, record: AnswerRecord) -> None:
        """Records an answer of the model everywhere."""
        self._each(lambda sink: sink.answer(record))

    def message(self, text: str) -> None:
        """Prints ``text`` for a person."""
        self._each(lambda sink: sink.message(text))

    def event(self, kind: str, **fields: Any) -> None:
        """Appends ``{"event": kind, …, "time": now}`` to events.jsonl. Fields are JSON values."""
        if self._events is None:
            return
        try:
            self._events.append({"event": kind, **fields})
        except UserError as error:
            known, self._unwritten = self._unwritten, True
            if not known:
                self._say(f"{error}; training goes on without events")
            return
        if self._unwritten:
            self._unwritten = False
            self.event("restored", target=str(self._events.path))

    def close(self) -> None:
        """Writes what is left and frees files and ports."""
        while self._outlets:
            outlet = self._outlets.pop()
            try:
                with _naming(outlet.target):
                    if outlet.sink is not None:
                        outlet.sink.close()
            except UserError as error:
                self.degraded(outlet.target, error)
        if self._events is not None:
            self._events.close()

    def _each(self, act: Callable[[Sink], None]) -> None:
        for outlet in list(self._outlets):
            try:
                outlet.tell(act)
            except UserError as error:
                known, outlet.failed = outlet.failed, True
                if not known:
                    self.degraded(outlet.target, error)
                continue
            if outlet.failed and outlet.sink is not None:
                outlet.failed = False
                self.event("restored", target=outlet.target)

    def degraded(self, target: str, error: UserError) -> None:
        """Says that a sink cannot be written."""
        self.event("degraded", target=target, cause=str(error))
        self._say(f"{error}; training goes on without it")

    def _say(self, text: str) -> None:
        """On the outlets that people read, and in this process's log; not about the failure to say something."""
        if self._speaking:
            return
        self._speaking = True
        try:
            note(text)
            self.message(text)
        finally:
            self._speaking = False


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

    ``resumed_step`` is the last step that a loaded checkpoint had done, 0 for a new run, which raises UserError where a
    package is missing, a port is taken, or a file cannot be written. A run that goes on has something to lose: there
    these are events, and what could not be opened is tried again at every record.
    """
    if rank:
        return Metrics()
    run_dir = Path(run_dir)
    run_start = {"step": resumed_step, "total_steps": total_steps, **asdict(world)}
    late: dict[str, UserError] = {}
    outlets: list[_Outlet] = []
    try:
        for target, opener in _openers(run_dir, config, run_start).items():
            outlets.append(_Outlet(target, None, opener, step=resumed_step))
            try:
                outlets[-1].open()
            except UserError as error:
                if not resumed_step:
                    raise
                outlets[-1].failed, late[target] = True, error
        lines = ConsoleSink(total_steps, resumed_step, world.unit, line_interval_s=config.log.line_interval_s)
        outlets.append(_Outlet("standard output", lines))
        events = _events(run_dir / "events.jsonl", run_start)
    except BaseException:
        for outlet in reversed(outlets):
            outlet.drop()
        raise
    metrics = Metrics(outlets, events)
    for target, problem in late.items():
        metrics.degraded(target, problem)
    return metrics


def _openers(run_dir: Path, config: RunConfig, run_start: dict[str, Any]) -> dict[str, Callable[[int], Sink]]:
    """What opens each sink, by its name, after a step. Those that can fail come first, so that a failure leaves no file
    behind."""
    log = config.log
    openers: dict[str, Callable[[int], Sink]] = {}
    if port := log.prometheus_port:
        openers[f"Prometheus port {port}"] = lambda _: PrometheusSink(port, log.prometheus_host)
    if project := log.wandb_project:
        openers["Weights & Biases"] = lambda _: WandbSink(project, run_dir, config.model_dump(mode="json"))
    path, folder = run_dir / "metrics.jsonl", run_dir / "tensorboard"
    openers[str(path)] = lambda step: JsonlSink(path, {**run_start, "step": step})
    if log.tensorboard:
        openers[str(folder)] = lambda step: TensorBoardSink(folder, step)
    return openers


def _events(path: Path, run_start: dict[str, Any]) -> JsonLines | None:
    events = None
    try:
        events = JsonLines(path)
        events.append({"event": "run_start", **run_start})
    except UserError as error:
        if not run_start["step"]:
            if events is not None:
                events.close()
            raise
        note(f"{error}; training goes on without events")
    return events
