"""Selection of slow tests by the import graph: it holds grimp's graph and more, and a change selects the tests that
import it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import affected
from tests.support.affected import (
    changed_modules,
    distances,
    has_slow_tests,
    import_graph,
    imports,
    module_of,
    select,
    within,
)

PACKAGES = ("llm_parallel", "llm_kernels", "llm_launch")


@pytest.fixture(scope="module")
def graph() -> tuple[dict[str, frozenset[str]], dict[str, str]]:
    return import_graph()


def test_a_file_is_its_module() -> None:
    assert module_of("llm_parallel/train/loop.py") == "llm_parallel.train.loop"
    assert module_of("kernels/llm_kernels/rope/__init__.py") == "llm_kernels.rope"
    assert module_of("tests/unit/test_affected.py") == "tests.unit.test_affected"
    assert module_of("csrc/bindings.cpp") == "llm_parallel._C"
    assert module_of("csrc/decode/chunk.cpp") == "llm_parallel._decode"
    assert module_of("README.md") is None and module_of("configs/x.yaml") is None


def test_every_way_of_naming_a_module_counts() -> None:
    modules = {"a", "a.b", "a.c", "a.d", "a.d.__main__", "a.e", "a.f"}
    source = """
import a.b
COMMAND = ["python", "-m", "a.d"]
CODE = "import sys; import a.e"
def later():
    from a import c, name
"""
    assert imports(source, modules) == {"a", "a.b", "a.c", "a.d", "a.d.__main__", "a.e"}


def test_the_graph_has_all_that_grimp_finds(graph: tuple[dict[str, frozenset[str]], dict[str, str]]) -> None:
    """grimp is what import-linter stands on; ours has names in strings and packages besides."""
    grimp = pytest.importorskip("grimp", reason="grimp comes with import-linter")
    theirs = grimp.build_graph(*PACKAGES, cache_dir=None)
    missing = [
        (module, found)
        for module in theirs.modules
        for found in theirs.find_modules_directly_imported_by(module)
        if module in graph[0] and found in graph[0] and found not in graph[0][module]
    ]
    assert not missing
    assert {m for m in theirs.modules if not m.endswith(("_C", "_decode"))} <= set(graph[0])


def test_a_chain_of_imports_reaches_the_test() -> None:
    chain = {name: frozenset(found) for name, found in {"t": "b", "b": "c", "c": "", "other": "d", "d": "t"}.items()}
    assert distances(chain, {"c"}) == {"c": 0, "b": 1, "t": 2, "d": 3, "other": 4}
    assert distances(chain, {"other"}) == {"other": 0}


def test_slow_tests_are_seen_by_their_mark() -> None:
    assert has_slow_tests("@pytest.mark.slow\ndef test_it(): ...")
    assert not has_slow_tests("TEXT = '@pytest.mark.slow'")


def test_a_file_of_data_touches_the_modules_beside_it() -> None:
    files = {"p.q.a": "p/q/a.py", "p.q.b": "p/q/b.py", "p.c": "p/c.py"}
    assert changed_modules(["p/q/table.csv"], {}, files) == {"p.q.a", "p.q.b", "p.c"}
    assert changed_modules(["README.md"], {}, files) == set()


def test_the_nearest_and_cheapest_come_first_while_there_is_time() -> None:
    costs, order = (
        {"near": 50.0, "cheap": 10.0, "far": 30.0, "small": 5.0},
        {"near": 1, "cheap": 2, "far": 2, "small": 3},
    )
    assert within(costs, order, 70.0) == (["near", "cheap", "small"], ["far"])
    assert within(costs, order, 1000.0) == (["near", "cheap", "far", "small"], [])


def test_a_change_selects_slow_tests_of_its_code_and_no_others() -> None:
    chosen, _ = select(["llm_parallel/parallel/layout.py"], limit_s=1e9)
    assert "tests/distributed/test_layouts.py" in chosen
    chosen, _ = select(["llm_parallel/cli.py"], limit_s=1e9)
    assert "tests/integration/test_wheel.py" in chosen, "it starts the command by its module's name"
    assert "tests/distributed/test_layouts.py" not in chosen
    chosen, said = select(["README.md"], limit_s=1e9)
    assert chosen == [] and "0 are run" in said[0]
    assert all((affected.ROOT / file).is_file() for file in chosen)


def test_what_touches_everything_is_said() -> None:
    chosen, said = select(["Makefile", "tests/integration/conftest.py"], limit_s=1e9)
    assert "every test depends on Makefile tests/integration/conftest.py" in said[-1]
    assert len(chosen) < 10


def test_without_time_the_rest_is_named() -> None:
    chosen, said = select(["llm_parallel/parallel/layout.py"], limit_s=0.0)
    assert chosen == [] and "tests/distributed/test_layouts.py" in said[1]


@pytest.mark.processes
def test_the_base_is_a_commit_or_nothing() -> None:
    base = affected.base_commit()
    if (affected.ROOT / ".git").exists() and base is not None:
        assert affected.git("cat-file", "-t", base) == "commit"
    assert affected.git("no-such-command") is None
    assert isinstance(affected.ROOT, Path)
