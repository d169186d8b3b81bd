"""Progress and report of ``prepare`` on the console."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from llm_parallel.data.inputs import SHOWN
from llm_parallel.data.prepare import PrepareReport, Progress
from llm_parallel.screen import show_facts

LINE_INTERVAL_S = 5.0
WIDE = 90
"""Columns from which the bar has room for the time since the start."""


@contextmanager
def shown_progress(title: str, console: Console | None = None) -> Iterator[Callable[[Progress], None]]:
    """Gives the function that ``prepare`` calls with its progress: it moves a bar on a terminal, and elsewhere prints a
    line every five seconds and at the end."""
    on_terminal = sys.stdout.isatty() if console is None else console.is_terminal  # FORCE_COLOR makes no terminal
    console = console or Console()
    if not on_terminal:
        yield _line_printer(title, console)
        return
    since = (TextColumn("since start"), TimeElapsedColumn()) if console.width >= WIDE else ()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None if console.width >= WIDE else 6),
        TaskProgressColumn(),
        TextColumn("{task.fields[tokens]} tokens"),
        *since,
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
    )
    with RichProgress(*columns, console=console) as bar:
        task = bar.add_task(title, tokens="0", total=None)

        def move(progress: Progress) -> None:
            bar.update(task, total=progress.bytes_total, completed=progress.bytes_done, tokens=f"{progress.tokens:,}")

        yield move


def print_report(report: PrepareReport, console: Console | None = None) -> None:
    """A table of what was written."""
    again = f", {report.shards_reused} of {report.shards} shards done before" if report.shards_reused else ""
    forms = ", ".join(f"{count:,} {form}" for form, count in report.forms.items())
    rows = [
        ("documents", f"{report.documents:,} of {report.files:,} files ({forms})"),
        ("tokens", f"{report.tokens:,} ({report.dtype}, vocabulary {report.vocab_size:,})"),
        ("bytes per token", f"{report.bytes_per_token:.3f}"),
        ("time", f"{report.seconds:.1f} s, {report.tokens_per_s:,.0f} tokens/s, {report.workers} processes{again}"),
        ("tokenizer", report.tokenizer),
        *_left_out(report),
    ]
    if report.prepend_bos or not report.append_eod:
        begin, end = "a begin token" if report.prepend_bos else "", "an end token" if report.append_eod else ""
        rows.insert(
            2, ("every document has", " and ".join(filter(None, (begin, end))) or "neither begin nor end token")
        )
    show_facts(f"{report.prefix}.bin, .idx", rows, console)


def _left_out(report: PrepareReport) -> Iterator[tuple[str, str]]:
    """Rows about what was not read: the files with their reasons, other endings in folders, and records."""
    if report.skipped_files:
        by_reason: dict[str, list[str]] = {}
        for path, reason in report.skipped:
            by_reason.setdefault(reason, []).append(path)
        lines = [f"{_some(paths)} {reason}" for reason, paths in by_reason.items()]
        yield f"{report.skipped_files:,} files not read", _shown(lines, len(lines))
    if report.other_endings:
        others = [f"{count:,} {kind}" for kind, count in report.other_endings.items()]
        yield "endings not taken", _shown(others, len(others), ", ")
    if report.damaged:
        yield f"{len(report.damaged):,} damaged files", _shown(report.damaged, len(report.damaged))
    if report.bad_records:
        yield f"{report.bad_records:,} bad records", _shown(report.first_bad, report.bad_records)
    if report.empty_documents:
        yield "empty documents", f"{report.empty_documents:,}"


def _some(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1:,} more, each of which"


def _shown(lines: Sequence[str], count: int, between: str = "\n") -> str:
    """The first five of ``count``."""
    more = [f"and {count - SHOWN:,} more in the report"] if count > SHOWN else []
    return between.join([*lines[:SHOWN], *more])


def _line_printer(title: str, console: Console) -> Callable[[Progress], None]:
    last = 0.0

    def show(progress: Progress) -> None:
        nonlocal last
        finished = progress.bytes_done >= progress.bytes_total
        if time.monotonic() - last < LINE_INTERVAL_S and not finished:
            return
        last = time.monotonic()
        share = progress.bytes_done / max(progress.bytes_total, 1)
        left = "" if progress.eta_s is None or finished else f", {progress.eta_s:.0f} s left"
        console.print(
            f"{title}: {share:.0%}, {progress.documents:,} documents, {progress.tokens:,} tokens, "
            f"{progress.seconds:.0f} s{left}",
            highlight=False,
            soft_wrap=True,
        )

    return show
