"""``llm-parallel plot``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import join, quote

from llm_parallel.lines import say
from llm_parallel.metrics.plots import compare_runs, plot_run
from llm_parallel.screen import say_next


def plot_command(run_dirs: Sequence[str]) -> None:
    """Draws the curves of runs and prints where the pictures are. Raises UserError."""
    folders = [Path(folder) for folder in run_dirs]
    pictures = plot_run(folders[0]) if len(folders) == 1 else compare_runs(folders, folders[0] / "plots")
    for picture in pictures:
        say(str(picture))
    say_next(f"llm-parallel report {join(run_dirs)} --out {quote(run_dirs[0].rstrip('/') + '/report.html')}")
