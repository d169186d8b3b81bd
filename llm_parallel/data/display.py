"""Progress and report of ``prepare`` on the console."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from llm_parallel.data.prepare import PrepareReport, Progress

LINE_INTERVAL_S = 5.0


@contextmanager
def shown_progress(title: str, console: Console | None = None) -> Iterator[Callable[[Progress], None]]:
    """Gives the function that ``prepare`` calls with its progress: it moves a bar on a terminal, and elsewhere prints a
    line every five seconds and at the end."""
    console = console or Console()
    if not console.is_terminal:
        yield _line_printer(title, console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[tokens]} tokens"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=console) as bar:
        task = bar.add_task(title, tokens="0", total=None)

        def move(progress: Progress) -> None:
            bar.update(task, total=progress.bytes_total, completed=progress.bytes_done, tokens=f"{progress.tokens:,}")

        yield move


def print_report(report: PrepareReport, console: Console | None = None) -> None:
    """A table of what was written."""
    table = Table(title=f"{report.prefix}.bin, .idx", title_justify="left", show_header=False)
    again = f", {report.shards_reused} of {report.shards} shards done before" if report.shards_reused else ""
    rows = [
        ("documents", f"{report.documents:,} of {report.files:,} files"),
        ("tokens", f"{report.tokens:,} ({report.dtype}, vocabulary {report.vocab_size:,})"),
        ("bytes per token", f"{report.bytes_per_token:.3f}"),
        ("time", f"{report.seconds:.1f} s, {report.tokens_per_s:,.0f} tokens/s, {report.workers} processes{again}"),
        ("tokenizer", report.tokenizer),
    ]
    left_out = [(report.empty_documents, "empty documents"), (report.undecodable_files, "files that are not UTF-8")]
    if any(count for count, _ in left_out):
        rows.append(("left out", ", ".join(f"{count:,} {what}" for count, what in left_out if count)))
    for row in rows:
        table.add_row(*row)
    (console or Console()).print(table)


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
