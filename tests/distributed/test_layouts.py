"""Every layout gives the one-process run: ten losses, and every gradient of the first step."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from llm_parallel.model.init import shard_rows
from tests.distributed.layouts import MATRIX, REFERENCES, Row
from tests.support.harness import run_ranks
from tests.support.job import compare_layout

STEPS = 10
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-5

pytestmark = pytest.mark.gloo


@cache
def reference(name: str) -> dict[str, Any]:
    return run_ranks(compare_layout, 1, REFERENCES[name], STEPS)[0]


def slice_of(whole: np.ndarray, name: str, shape: tuple[int, ...], tp: int, tp_rank: int) -> np.ndarray:
    """The part of a whole gradient that one tensor-parallel rank holds."""
    if whole.shape == shape:
        return whole
    dim = 0 if whole.shape[0] != shape[0] else 1
    rows = shard_rows(name, whole.shape[dim], tp, tp_rank)
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


@pytest.mark.parametrize("row", MATRIX, ids=lambda row: row.name)
def test_layout_equals_one_process(row: Row) -> None:
    expected = reference(row.reference)
    ranks = run_ranks(compare_layout, row.processes, REFERENCES[row.reference] | row.changes, STEPS)
    losses = np.array([[loss for loss, _ in found["history"]] for found in ranks])
    worst_loss = np.abs(losses - [loss for loss, _ in expected["history"]]).max()
    gradient, name = worst_gradient(expected["gradients"], ranks)
    print(f"| {row.name} | {row.processes} | {worst_loss:.1e} | {gradient:.1e} | {name} |")
    assert worst_loss <= LOSS_TOLERANCE
    assert gradient <= GRADIENT_TOLERANCE, name


def test_reference_learns() -> None:
    losses = [loss for loss, _ in reference("plain")["history"]]
    assert losses[-1] < losses[0] - 0.3


def test_matrix_covers_what_it_should() -> None:
    assert len(MATRIX) >= 24
    assert {row.processes for row in MATRIX} == {1, 2, 4, 8}
