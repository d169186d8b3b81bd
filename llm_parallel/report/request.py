"""What ``llm-parallel report`` is asked; each field's docstring is the help of its option."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llm_parallel.options import argument, option


@dataclass(frozen=True)
class ReportRequest:
    """Runs and sweeps to show, and where the page and its figures go."""

    runs: Sequence[str] = argument((), name="run_dirs")
    """Run folders, shown together."""
    sweeps: Sequence[str] = option((), name="--csv")
    """CSV of a scaling sweep; may be given several times."""
    out: str = "report.html"
    """Page to write."""
    png: str | None = None
    """Folder for PNGs of the figures."""
    title: str = ""
    """Heading of the page."""
