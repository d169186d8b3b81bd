"""``llm-parallel plan --validate`` and ``--refit``: scores against published measurements, and a fit to them."""

from __future__ import annotations

import json

from llm_parallel.files import atomic_write
from llm_parallel.lines import say
from llm_parallel.planner.published import scores
from llm_parallel.planner.published.fit import as_record, fit_chip
from llm_parallel.planner.published.rows import read_rows
from llm_parallel.screen import say_next, show


def validate_command(rows: str | None, out: str | None, everything: bool = False) -> int:
    """``plan --validate``: prints how far predictions are from measured rows, in about ten lines unless ``everything``
    is wanted or the ``rows`` are the user's; ``out``: JSON file of the same."""
    lines: list[str] = []
    found = scores.report(rows, lines.append)
    short = rows is None and not everything
    show("\n".join(scores.summary() if short else lines))
    if short:
        say_next("llm-parallel plan --validate --all")
    if out:
        with atomic_write(out) as handle:
            json.dump(found, handle, indent=1)
    return 0


def refit_command(target: str) -> int:
    """``plan --refit``: fits the constants anew on the declared half of the rows and writes them as JSON."""
    rows, _ = read_rows()
    records = {chip: as_record(fit_chip(chip, rows), rows, chip) for chip in scores.CHIPS}
    with atomic_write(target) as handle:
        json.dump(records, handle, indent=1)
    say(f"written: {target}")
    return 0
