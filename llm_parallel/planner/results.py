"""Results of ``llm-parallel bench`` that the planner calibrates on, read and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_parallel.config.tree import RunConfig
from llm_parallel.errors import UserError

KINDS = {"comm": "fits", "kernels": "card", "step": "mfu"}
"""A key that only a result of that kind holds."""


@dataclass(frozen=True)
class Measured:
    """One result file of ``llm-parallel bench``."""

    path: str
    """Where it is."""
    kind: str
    """``comm``, ``kernels`` or ``step``."""
    tree: Mapping[str, Any]
    """Its content."""

    @property
    def chip(self) -> str:
        """What it was measured on."""
        return str(self.tree["environment"]["chip"])

    @property
    def source(self) -> str:
        """Where a figure came from, as a comment in the description says."""
        where = self.tree["environment"]
        return f"bench {self.kind}, {Path(self.path).name}, {where['date']}, commit {where['commit']}"


def read_results(paths: Sequence[str]) -> list[Measured]:
    """Reads the files. Raises UserError for one that is no such result, and if they were measured on different
    chips."""
    found = [_read(path) for path in paths]
    chips = sorted({result.chip for result in found})
    if len(chips) > 1:
        raise UserError(
            f"--calibrate: the results are of {' and of '.join(chips)}; give those of one kind of chip at a time"
        )
    return found


def _read(path: str) -> Measured:
    try:
        tree = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"--calibrate {path} cannot be read ({error.strerror})") from None
    except ValueError:
        raise UserError(f"--calibrate {path} is not JSON; give what bench --out wrote, PREFIX.json") from None
    kinds = [kind for kind, field in KINDS.items() if isinstance(tree, dict) and field in tree]
    if len(kinds) != 1:
        raise UserError(f"--calibrate {path} is no result of bench comm, bench kernels or bench step")
    for name in ("chip", "date", "commit"):
        if name not in (tree.get("environment") or {}):
            raise UserError(f"--calibrate {path} lacks environment.{name}; measure it anew with bench {kinds[0]} --out")
    return Measured(path, kinds[0], tree)


def field(result: Measured, *names: str) -> Any:
    """A value of a result by its path. Raises UserError if it is missing."""
    found: Any = result.tree
    for name in names:
        if not isinstance(found, Mapping) or name not in found:
            raise UserError(f"--calibrate {result.path} lacks {'.'.join(names)}; measure it anew with bench "
                            f"{result.kind} --out")  # fmt: skip
        found = found[name]
    return found


def step_seconds(result: Measured) -> float:
    """Median seconds of our step. Raises UserError if it failed."""
    rows = [row for row in field(result, "rows") if row.get("provider") == "ours"]
    if not rows or not rows[0].get("median_ms"):
        raise UserError(f"--calibrate {result.path} has no time of provider ours; run bench step --provider ours")
    return float(rows[0]["median_ms"]) / 1e3


def step_config(result: Measured) -> RunConfig:
    """The configuration that was measured. Raises UserError if this version can't read it."""
    try:
        return RunConfig.model_validate(field(result, "config"))
    except ValueError as error:
        raise UserError(
            f"--calibrate {result.path}: its config is not one of this version: {str(error).splitlines()[0]}"
        ) from None
