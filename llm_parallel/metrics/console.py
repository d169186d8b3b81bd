"""Prints a line for every step, and on a terminal a progress bar below. In a log lines may be rarer."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from llm_parallel.lines import say, silence, wrapped
from llm_parallel.metrics.record import AnswerRecord, EvalRecord, StepRecord, TaskRecord
from llm_parallel.metrics.step_line import StepLines, duration, eval_line, task_line

REDRAW_S = 0.3
"""Lines are printed and the bar is drawn anew at most this often; both flicker otherwise where steps take
milliseconds."""
WIDE = 76
"""Columns from which the bar has room for the time since the start."""


class ConsoleSink:
    """Prints to standard output. ``unit``, "GPU" or "process", is what rates are given per; ``line_interval_s`` the
    least time between two lines of steps where that is no terminal, except for skipped steps and the last one."""

    target = "standard output"

    def __init__(
        self,
        total_steps: int,
        first_step: int,
        unit: str,
        console: Console | None = None,
        line_interval_s: float = 0.0,
    ) -> None:
        self._lines = StepLines(total_steps, unit)
        # Variables such as FORCE_COLOR, which a batch job inherits, make rich take a log for a terminal.
        on_terminal = sys.stdout.isatty() if console is None else console.is_terminal
        console = console or Console(highlight=False, markup=False)
        self._screen = _Screen(console, total_steps, first_step) if on_terminal and console.is_terminal else None
        self._last_step, self._line_interval_s, self._next_line_s = total_steps, line_interval_s, 0.0

    def start(self, lines: Sequence[str]) -> None:
        """Prints ``lines`` and begins the progress bar."""
        for line in lines:
            self.message(line)
        if self._screen:
            self._screen.start()

    def step(self, record: StepRecord) -> None:
        """Prints the line of a step."""
        if self._screen:
            self._screen.progress(record)
            self._screen.add(self._lines.line(record, self._screen.width))
            return
        now = time.monotonic()
        if now >= self._next_line_s or record.skipped or record.step >= self._last_step:
            self._next_line_s = now + self._line_interval_s
            self.message(self._lines.line(record))

    def eval(self, record: EvalRecord) -> None:
        """Prints the line of an evaluation."""
        self.message(eval_line(record, self._screen.width if self._screen else None))

    def tasks(self, record: TaskRecord) -> None:
        """Prints the line of tasks' scores."""
        self.message(task_line(record))

    def answer(self, record: AnswerRecord) -> None:
        """Prints prompt and answer."""
        ending = "" if record.stopped else " … (cut)"
        self.message(f"after step {record.step}, {record.prompt!r} is answered: {record.answer!r}{ending}")

    def message(self, text: str) -> None:
        """Prints ``text``, above the progress bar if there is one."""
        if self._screen:
            self._screen.add(text)
            self._screen.flush()
        else:
            say(text)

    def close(self) -> None:
        """Ends the progress bar, which stays visible. A terminal or a pipe that is gone is silent from then on."""
        try:
            if self._screen:
                self._screen.close()
            sys.stdout.flush()
        except OSError:
            silence(sys.stdout)
            raise


class _Screen:
    """A terminal: lines that scroll above a bar. Lines wait for the next time of drawing."""

    def __init__(self, console: Console, total_steps: int, first_step: int) -> None:
        self._console = console
        self._waiting: list[str] = []
        self._lock = threading.Lock()
        self._drawn_s = 0.0
        self._later: threading.Timer | None = None
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("loss {task.fields[loss]}"),
            _Elapsed(console),
            TextColumn("left {task.fields[left]}"),
            console=console,
            auto_refresh=False,
            expand=True,
        )
        self._task = self._bar.add_task("train", total=total_steps, completed=first_step, loss="…", left="…")

    @property
    def width(self) -> int:
        """Columns of the terminal at this moment."""
        return self._console.width

    def start(self) -> None:
        """Draws the bar."""
        self._bar.start()

    def progress(self, record: StepRecord) -> None:
        """Where the bar stands when it is drawn next."""
        loss, left = f"{record.loss:.4f}", duration(record.eta_s)
        self._bar.update(self._task, completed=record.step, loss=loss, left=left)

    def add(self, text: str) -> None:
        """Prints a line at the next time of drawing, which is now if the last one is long enough ago."""
        with self._lock:
            self._waiting.append(text)
            rest_s = self._drawn_s + REDRAW_S - time.monotonic()
            if rest_s > 0:
                if self._later is None:
                    self._later = threading.Timer(rest_s, self._flush_later)
                    self._later.daemon = True
                    self._later.start()
                return
        self.flush()

    def _flush_later(self) -> None:
        with contextlib.suppress(OSError):  # of a terminal that is gone; the next line meets the same error
            self.flush()

    def flush(self) -> None:
        """Prints the lines that wait, and draws the bar below them."""
        with self._lock:
            if self._later is not None:
                self._later.cancel()
                self._later = None
            text, self._waiting = "\n".join(self._waiting), []
            self._drawn_s = time.monotonic()
            with self._console:  # one write for both
                self._bar.refresh()
                if text:
                    self._console.print(wrapped(text, self.width), markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Prints what waits and leaves the bar as it is."""
        self.flush()
        self._bar.stop()


class _Elapsed(ProgressColumn):
    """Time since the start, where the terminal is wide enough."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def render(self, task: Task) -> Text:
        """The time with its name."""
        return Text(f"since start {duration(task.elapsed or 0.0)}" if self._console.width >= WIDE else "")
