"""Every layout gives the one-process run: the losses of its steps, and every gradient of the first step.

By default the rows of a covering array, in which every two settings that may meet do meet; the longer list of
``layouts.MATRIX``, in which three and four meet, is slow.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from llm_parallel.model.tensors import kind_of
from tests.distributed import covering
from tests.distributed.layouts import MATRIX, REFERENCES, Row
from tests.support.harness import run_ranks
from tests.support.job import compare_layout

SHORT, LONG = 3, 10
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-5

pytestmark = pytest.mark.gloo


ARRAY = covering.covering_array()
WITNESSES = {"TP2 SP", "PP2 VPP2", "DP2 overlap, small buckets"}
"""Rows of the list that go all their steps by default, as what an optimizer does wrong may grow over steps."""


@cache
def reference(steps: int, objective: str, *changes: tuple[str, Any]) -> dict[str, Any]:
    """The run of one process."""
    return run_ranks(compare_layout, 1, dict(changes), steps, objective)[0]


def slice_of(whole: np.ndarray, name: str, shape: tuple[int, ...], tp: int, tp_rank: int) -> np.ndarray:
    """The part of a whole gradient that one tensor-parallel rank holds."""
    if whole.shape == shape:
        return whole
    dim = 0 if whole.shape[0] != shape[0] else 1
    rows = kind_of(name.split(" ")[-1]).shard(whole.shape[dim], tp, tp_rank)
    return np.concatenate([whole.take(range(part.start, part.stop), axis=dim) for part in rows], axis=dim)


def worst_gradient(expected: dict[str, np.ndarray], ranks: list[dict[str, Any]]) -> tuple[float, str]:
    """Largest relative distance ||g - g0|| / ||g0|| over all shards of all gradients, and whose it is."""
    worst = (0.0, "")
    seen = set()
    for found in ranks:
        for name, gradient in found["gradients"].items():
            whole = slice_of(expected[name], name, gradient.shape, found["tp"], found["tp_rank"])
            scale = np.linalg.norm(whole.astype(np.float64))
            distance = np.linalg.norm(gradient.astype(np.float64) - whole)
            worst = max(worst, (distance / scale if scale else distance, name))
            seen.add(name)
    assert seen == set(expected), "every gradient is compared"
    return worst


def assert_equals_one_process(
    name: str,
    processes: int,
    reference_changes: dict[str, Any],
    changes: dict[str, Any],
    steps: int,
    objective: str = "likelihood",
) -> None:
    expected = reference(steps, objective, *reference_changes.items())
    ranks = run_ranks(compare_layout, processes, reference_changes | changes, steps, objective)
    losses = np.array([[loss for loss, _ in found["history"]] for found in ranks])
    assert losses.shape == (processes, len(expected["history"])) and losses.shape[1] >= steps
    wanted = np.array([loss for loss, _ in expected["history"]])
    worst_loss = (np.abs(losses - wanted) / np.maximum(np.abs(wanted), 1.0)).max()
    gradient, whose = worst_gradient(expected["gradients"], ranks)
    print(f"| {name} | {processes} | {worst_loss:.1e} | {gradient:.1e} | {whose} |")
    assert worst_loss <= LOSS_TOLERANCE
    assert gradient <= GRADIENT_TOLERANCE, whose


@pytest.mark.parametrize("row", ARRAY, ids=covering.name)
def test_every_pair_of_settings_equals_one_process(row: dict[str, Any]) -> None:
    name, changes = covering.name(row), covering.changes(row)
    shared, objective = covering.reference_changes(row), row["objective"]
    assert_equals_one_process(name, covering.processes(row), shared, changes, SHORT, objective)


def case(row: Row) -> Any:
    """A row of the list as a parameter."""
    return pytest.param(row, id=row.name, marks=[] if row.name in WITNESSES else [pytest.mark.slow])


@pytest.mark.parametrize("row", [case(row) for row in MATRIX])
def test_layout_equals_one_process(row: Row) -> None:
    assert_equals_one_process(row.name, row.processes, REFERENCES[row.reference], row.changes, LONG)


def test_reference_learns() -> None:
    losses = [loss for loss, _ in reference(LONG, "likelihood")["history"]]
    assert losses[-1] < losses[0] - 0.3


def test_matrix_covers_what_it_should() -> None:
    assert len(MATRIX) >= 24
    assert {row.processes for row in MATRIX} == {1, 2, 4, 8}
    assert {row.name for row in MATRIX} >= WITNESSES
