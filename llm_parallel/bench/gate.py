"""Results of ``bench`` as files, and pass or fail against an earlier one, since users gate upgrades on it."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_parallel.errors import UserError
from llm_parallel.files import atomic_write
from llm_parallel.lines import say

_KEYS = ("operator", "shape", "dtype", "mode", "provider")


def load_result(path: str) -> dict[str, Any]:
    """A result file with the rows that can be compared. Raises UserError if it is not one."""
    try:
        result = json.loads(Path(path).read_text())
        rows = [row for row in result["rows"] if all(key in row for key in _KEYS) and "median_ms" in row]
        return {"environment": {}, **result, "rows": rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--baseline {path} is not a result of bench: {type(error).__name__}: {error}") from None


def slower_than(baseline: str, result: dict[str, Any], min_ratio: float) -> int:
    """Prints every row of ours whose speed is under ``min_ratio`` of the baseline's; 1 if there is one, else 0.

    Rows that the baseline has and this run lacks count as slower. Raises UserError if nothing can be compared, or the
    baseline was measured on another chip.
    """
    if not 0.0 < min_ratio <= 10.0:
        raise UserError(f"--min-ratio {min_ratio} is not over 0 and at most 10; 0.95 allows 5 % loss")
    stored, rows = load_result(baseline), result["rows"]
    chip, here = stored["environment"].get("chip"), result["environment"]["chip"]
    if chip != here:
        raise UserError(f"--baseline {baseline} was measured on {chip}, this run on {here}; take one of this chip")
    before = {tuple(row[key] for key in _KEYS): row["median_ms"] for row in stored["rows"]}
    now = {tuple(row[key] for key in _KEYS): row["median_ms"] for row in rows}
    ours = {key: ms for key, ms in before.items() if key[-1].startswith("ours") and ms is not None}
    operators = {key[0] for key in now}
    compared = {key: ms for key, ms in ours.items() if key[0] in operators}
    if not compared:
        raise UserError(
            f"--baseline {baseline} has no row of ours for {', '.join(sorted(operators)) or 'these operators'}"
        )
    failed = 0
    for key, ms in compared.items():
        found = now.get(key)
        if found is None or ms / found < min_ratio:
            ratio = "was not measured" if found is None else f"{ms / found:.3f} of the baseline's speed"
            say(f"SLOWER: {' '.join(key)}: {ratio} ({ms:.4f} ms before)")
            failed = 1
    verdict = "failed" if failed else "passed"
    say(f"{len(compared)} rows held against {baseline}, at least {min_ratio} of its speed: {verdict}")
    return failed


def write_result(prefix: Path, result: Mapping[str, Any]) -> None:
    """JSON with everything, and CSV of the rows."""
    with atomic_write(f"{prefix}.json") as handle:
        json.dump(result, handle, indent=1)
    columns = list(dict.fromkeys(key for row in result["rows"] for key in row if not isinstance(row[key], list)))
    with atomic_write(f"{prefix}.csv") as handle:
        writer = csv.DictWriter(handle, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(result["rows"])
    say(f"written: {prefix}.json, {prefix}.csv")
