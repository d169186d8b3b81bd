"""Prints a line for every step, and on a terminal a progress bar below."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from llm_parallel.metrics.record import AnswerRecord, EvalRecord, StepRecord


class ConsoleSink:
    """Prints to standard output. ``unit``, "GPU" or "process", is what rates are given per."""

    target = "standard output"

    def __init__(self, total_steps: int, first_step: int, unit: str, console: Console | None = None) -> None:
        self._total_steps = total_steps
        self._unit = unit
        console = console or Console(soft_wrap=True, highlight=False, markup=False)
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("loss {task.fields[loss]}"),
                TextColumn("ETA {task.fields[eta]}"),
                console=console,
            )
            self._task: TaskID = self._progress.add_task(
                "train", total=total_steps, completed=first_step, loss="…", eta="…"
            )

    def start(self, lines: Sequence[str]) -> None:
        """Prints ``lines`` and begins the progress bar."""
        for line in lines:
            self.message(line)
        if self._progress:
            self._progress.start()

    def step(self, record: StepRecord) -> None:
        """Prints the line of a step."""
        self.message(step_line(record, self._total_steps, self._unit))
        if self._progress:
            loss, eta = f"{record.loss:.4f}", duration(record.eta_s)
            self._progress.update(self._task, completed=record.step, loss=loss, eta=eta)

    def eval(self, record: EvalRecord) -> None:
        """Prints the line of an evaluation."""
        self.message(
            f"evaluation after step {record.step} | loss {record.loss:.4f} | perplexity {record.perplexity:.4g} | "
            f"{record.samples:,} samples, {record.tokens:,} tokens"
        )

    def answer(self, record: AnswerRecord) -> None:
        """Prints prompt and answer."""
        ending = "" if record.stopped else " … (cut)"
        self.message(f"after step {record.step}, {record.prompt!r} is answered: {record.answer!r}{ending}")

    def message(self, text: str) -> None:
        """Prints ``text``, above the progress bar if there is one."""
        if self._progress:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stdout, flush=True)

    def close(self) -> None:
        """Ends the progress bar, which stays visible."""
        if self._progress:
            self._progress.stop()


def step_line(record: StepRecord, total_steps: int, unit: str) -> str:
    """One line of a step, its fields aligned from step to step."""
    width = len(str(total_steps))
    fields = [
        f"step {record.step:>{width}}/{total_steps}",
        f"loss {record.loss:.4f}",
        f"grad norm {record.grad_norm:.3f}",
        f"lr {record.lr:.2e}",
        f"{record.tokens_per_s_per_gpu:,.0f} tokens/s/{unit}",
        f"{_significant(record.tflops_per_gpu)} TFLOP/s/{unit}",
        f"MFU {record.mfu:.1%}" if record.mfu is not None else "MFU n/a",
        f"{record.memory_reserved_gib:.2f} GiB",
        f"ETA {duration(record.eta_s)}",
    ]
    if record.skipped:
        fields.append(f"SKIPPED: {record.skip_reason}")
    return " | ".join(fields)


def duration(seconds: float) -> str:
    """``1:02:03``, with days before it where there are any."""
    return str(timedelta(seconds=round(seconds)))


def _significant(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.3f}"
