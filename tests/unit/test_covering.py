"""The covering array of layouts: every legal pair of settings is there, and the trainer accepts every row."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from llm_parallel.config.rules import find_problems
from tests.distributed import covering
from tests.distributed.test_layouts import ARRAY
from tests.support.job import base_config, changed


def product() -> list[dict[str, Any]]:
    """Every combination of all values, legal or not, with the axes that ``legal`` does not read left plain."""
    values = [values if name in covering.MESH else values[:1] for name, values in covering.AXES.items()]
    return [dict(zip(covering.AXES, row)) for row in itertools.product(*values)]


def test_every_legal_pair_occurs() -> None:
    """Pairs of the mesh by trying every combination; a free axis goes with every setting that any legal row has."""
    wanted, settings = set(), set()
    for row in product():
        if covering.legal(row):
            mesh = [(name, row[name]) for name in covering.MESH]
            wanted |= {frozenset(pair) for pair in itertools.combinations(mesh, 2)}
            settings |= set(mesh)
    for name, values in covering.AXES.items():
        if name not in covering.MESH:
            mine = {(name, value) for value in values}
            wanted |= {frozenset(pair) for pair in itertools.product(settings, mine)}
            settings |= mine
    wanted -= {frozenset(pair) for pair in covering.NEVER}
    found = {frozenset(pair) for row in ARRAY for pair in itertools.combinations(row.items(), 2)}
    assert found == wanted
    assert len(wanted) > 500, "the product has pairs"


def test_no_legal_pair_is_ruled_out_by_mistake() -> None:
    """The pairs that can never meet, by name: a new rule that removes others shows here."""
    found = {frozenset(pair) for row in ARRAY for pair in itertools.combinations(row.items(), 2)}
    settings = [(name, value) for name, values in covering.AXES.items() for value in values]
    never = {
        " ".join(f"{name}={value}" for name, value in pair)
        for pair in itertools.combinations(settings, 2)
        if pair[0][0] != pair[1][0] and frozenset(pair) not in found
    }
    assert never == {
        "tp=1 sp=True",
        "tp=4 cp=4",
        "tp=4 pp=4",
        "tp=4 dp=4",
        "cp=4 pp=4",
        "cp=4 dp=4",
        "pp=4 dp=4",
        "pp=1 vpp=2",
        "pp=1 stages=uneven",
        "packing=none objective=preferences",
    }


def test_the_array_stays_small_and_is_the_same_each_time() -> None:
    assert covering.covering_array() == ARRAY
    assert len(ARRAY) <= 24
    names = [covering.name(row) for row in ARRAY]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("row", ARRAY, ids=covering.name)
def test_the_rules_accept_the_row_and_no_setting_is_lost(row: dict[str, Any]) -> None:
    config = changed(base_config(), covering.changes(row))
    assert find_problems(config, covering.processes(row), "cpu") == []
    assert covering.reference_changes(row).items() <= covering.changes(row).items()
    for name in ("tied", "packing", "recompute", "vocabulary", "optimizer", "overlap", "micro_batch"):
        if row[name] != covering.AXES[name][0]:
            assert covering.changes(row) != covering.changes({**row, name: covering.AXES[name][0]}), name
