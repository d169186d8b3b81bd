"""Sinks that records are written to: metrics.jsonl, TensorBoard, Weights & Biases, Prometheus. run.py opens them."""

from __future__ import annotations

import errno
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from llm_parallel.errors import UserError
from llm_parallel.jsonlines import JsonLines
from llm_parallel.metrics.record import AnswerRecord, EvalRecord, StepRecord, TaskRecord, scalars


class Sink(Protocol):
    """A destination of records."""

    @property
    def target(self) -> str:
        """Name of the file or service, for messages."""
        ...

    def start(self, lines: Sequence[str]) -> None:
        """Called once before the first step with the lines that are printed then."""

    def step(self, record: StepRecord) -> None:
        """Records a step."""

    def eval(self, record: EvalRecord) -> None:
        """Records an evaluation."""

    def tasks(self, record: TaskRecord) -> None:
        """Records scores of tasks."""

    def answer(self, record: AnswerRecord) -> None:
        """Records an answer of the model."""

    def message(self, text: str) -> None:
        """Prints ``text`` if the sink is read by a person."""

    def close(self) -> None:
        """Writes what is left."""


class QuietSink:
    """Base of the sinks that ignore text, and answers if they do not say otherwise."""

    target = ""

    def start(self, lines: Sequence[str]) -> None:
        """Nothing to say."""

    def answer(self, record: AnswerRecord) -> None:
        """Nothing to record."""

    def message(self, text: str) -> None:
        """Nothing to say."""

    def close(self) -> None:
        """Nothing to close."""


class JsonlSink(QuietSink):
    """``metrics.jsonl``: a line for each record, and one with ``"event": "run_start"`` for each start or resume of the
    run.

    After a resume, older lines of steps after the resumed one stay in the file; the reader (history.py) leaves them
    out."""

    def __init__(self, path: Path, run_start: dict[str, Any]) -> None:
        self.target = str(path)
        self._lines = JsonLines(path)
        try:
            self._lines.append({"event": "run_start", **run_start})
        except UserError:
            self._lines.close()
            raise

    def step(self, record: StepRecord) -> None:
        """Appends the line of a step."""
        reason = {"train/skip_reason": record.skip_reason} if record.skipped else {}
        self._lines.append({"step": record.step, **scalars(record), **reason})

    def eval(self, record: EvalRecord) -> None:
        """Appends the line of an evaluation."""
        self._lines.append({"step": record.step, **scalars(record)})

    def tasks(self, record: TaskRecord) -> None:
        """Appends the line of tasks' scores."""
        self._lines.append({"step": record.step, **scalars(record), "tasks/seconds": record.seconds})

    def answer(self, record: AnswerRecord) -> None:
        """Appends the line of an answer."""
        self._lines.append({"event": "answer", **asdict(record)})

    def close(self) -> None:
        """Closes the file."""
        self._lines.close()


class TensorBoardSink(QuietSink):
    """Event files in ``folder``; TensorBoard hides steps after ``resumed_step`` that an earlier process wrote."""

    def __init__(self, folder: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.target = str(folder)
        self._writer = SummaryWriter(str(folder), purge_step=resumed_step + 1 if resumed_step else None, flush_secs=10)

    def step(self, record: StepRecord) -> None:
        """Writes the scalars of a step."""
        self._write(record)

    def eval(self, record: EvalRecord) -> None:
        """Writes the scalars of an evaluation."""
        self._write(record)

    def tasks(self, record: TaskRecord) -> None:
        """Writes the scores of tasks."""
        self._write(record)

    def answer(self, record: AnswerRecord) -> None:
        """Writes prompt and answer as a text under the prompt's name."""
        ending = "" if record.stopped else " …"
        text = f"**{record.prompt}**\n\n{record.answer}{ending}"
        self._writer.add_text(f"answers/{record.prompt[:40]}", text, record.step)

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()

    def _write(self, record: StepRecord | EvalRecord | TaskRecord) -> None:
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record.step)


class WandbSink(QuietSink):
    """Weights & Biases, online or offline by its own settings; a resumed run keeps its id."""

    def __init__(self, project: str, run_dir: Path, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(
                f"log.wandb_project is {project!r} but the wandb package is not installed; "
                "run 'pip install wandb' or leave log.wandb_project out"
            ) from None
        self.target = f"Weights & Biases project {project}"
        run_id_file = run_dir / "wandb" / "run_id.txt"
        known = run_id_file.read_text().strip() if run_id_file.exists() else None
        run_id_file.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=project, dir=str(run_dir), name=run_dir.name, id=known, resume="allow", config=config
            )
        except wandb.Error as error:
            raise UserError(
                f"log.wandb_project is {project!r} but Weights & Biases says: {error} "
                "Leave log.wandb_project out, or set WANDB_MODE=offline to report later"
            ) from error
        run_id_file.write_text(self._run.id)
        # With wandb's own counter, steps that a resumed run repeats after its checkpoint would be dropped.
        self._run.define_metric("*", step_metric="step")

    def step(self, record: StepRecord) -> None:
        """Sends the scalars of a step."""
        self._run.log({"step": record.step, **scalars(record)})

    def eval(self, record: EvalRecord) -> None:
        """Sends the scalars of an evaluation."""
        self._run.log({"step": record.step, **scalars(record)})

    def tasks(self, record: TaskRecord) -> None:
        """Sends the scores of tasks."""
        self._run.log({"step": record.step, **scalars(record)})

    def close(self) -> None:
        """Waits until everything is sent."""
        self._run.finish()


class PrometheusSink(QuietSink):
    """The latest values as gauges, such as ``llm_parallel_train_loss``, at ``http://host:port/metrics``."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        try:
            import prometheus_client
        except ImportError:
            raise UserError(
                f"log.prometheus_port is {port} but the prometheus_client package is not installed; "
                "run 'pip install prometheus-client' or leave log.prometheus_port out"
            ) from None
        self.target = f"Prometheus port {port}"
        self._client = prometheus_client
        self._registry = prometheus_client.CollectorRegistry()
        self._gauges: dict[str, Any] = {}
        try:
            self._server, self._thread = prometheus_client.start_http_server(port, host, registry=self._registry)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            why = "is in use" if error.errno == errno.EADDRINUSE else "may not be opened by this user"
            raise UserError(
                f"log.prometheus_port is {port}, which {why} on this machine; choose a free port over 1023"
            ) from None

    def step(self, record: StepRecord) -> None:
        """Sets the gauges of a step."""
        self._set(record)

    def eval(self, record: EvalRecord) -> None:
        """Sets the gauges of an evaluation."""
        self._set(record)

    def tasks(self, record: TaskRecord) -> None:
        """Sets the gauges of tasks."""
        self._set(record)

    def close(self) -> None:
        """Frees the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _set(self, record: StepRecord | EvalRecord | TaskRecord) -> None:
        self._gauge("train/step").set(record.step)
        for name, value in scalars(record).items():
            self._gauge(name).set(value if math.isfinite(value) else math.nan)

    def _gauge(self, name: str) -> Any:
        if name not in self._gauges:
            safe_name = "llm_parallel_" + re.sub(r"\W", "_", name, flags=re.ASCII)
            self._gauges[name] = self._client.Gauge(safe_name, name, registry=self._registry)
        return self._gauges[name]
