"""Names the slow test files whose code a change touched: ``python -m tests.support.affected``.

A test file is touched if it imports a changed module, directly or through others. Imports inside functions count, and
so do modules that are started by name (``-m llm_parallel.worker``), which no import statement shows.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

from tests.support.budgets import FILE, Part, parse

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "llm_parallel": "llm_parallel",
    "llm_kernels": "kernels/llm_kernels",
    "llm_launch": "launch/llm_launch",
    "benchmarks": "benchmarks",
    "tests": "tests",
}
"""Package → its folder in the repository."""
COMPILED = {"csrc/decode/": "llm_parallel._decode", "csrc/": "llm_parallel._C"}
"""Folder of a C++ extension → its module; the first that fits counts."""
TOUCH_EVERYTHING = ("conftest.py", "Makefile", "constraints.txt", "pyproject.toml", "setup.py", ".ci/run")
"""Files on which every test depends: selecting all of them would not fit into the time of .ci/run."""
LIMIT_S = 1800.0
"""Processor-seconds of slow tests that .ci/run has time for."""
UNKNOWN_S = 60.0
"""What a slow file is taken to cost while budgets.txt has no line for it."""

Graph = Mapping[str, frozenset[str]]
"""Module → modules that it imports."""

_IMPORTS = re.compile(r"\b(?:import|from)\s+([\w.]+)")


def module_of(path: str) -> str | None:
    """The module that a file of the repository is, or None."""
    for package, folder in FOLDERS.items():
        if path.startswith(f"{folder}/") and path.endswith(".py"):
            parts = [package, *path.removeprefix(f"{folder}/").removesuffix(".py").split("/")]
            return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return next((module for folder, module in COMPILED.items() if path.startswith(folder)), None)


def _names(source: str) -> Iterator[str]:
    """Dotted names that a source may import; some are names inside modules."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
            yield f"{node.value}.__main__"
            yield from _IMPORTS.findall(node.value)


def imports(source: str, modules: set[str]) -> frozenset[str]:
    """Those of ``modules`` that a source imports or names, with the packages that they are in."""
    found = {name for name in _names(source) if name in modules}
    for name in list(found):
        parts = name.split(".")
        found |= {".".join(parts[:length]) for length in range(1, len(parts))} & modules
    return frozenset(found)


@cache
def import_graph(root: Path = ROOT) -> tuple[dict[str, frozenset[str]], dict[str, str]]:
    """The imports of every module of the repository, and module → file."""
    files = {}
    for folder in FOLDERS.values():
        for path in sorted((root / folder).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            files[module_of(name) or name] = name
    modules = {*files, *COMPILED.values()}
    return {
        module: imports((root / path).read_text(encoding="utf-8"), modules) for module, path in files.items()
    }, files


def distances(graph: Graph, changed: Iterable[str]) -> dict[str, int]:
    """Module → imports between it and the nearest changed one, of those that reach one."""
    importers: dict[str, set[str]] = {}
    for module, imported in graph.items():
        for name in imported:
            importers.setdefault(name, set()).add(module)
    found = dict.fromkeys(changed, 0)
    frontier = set(found)
    while frontier:
        frontier = {module for name in frontier for module in importers.get(name, ())} - set(found)
        found |= dict.fromkeys(frontier, max(found.values()) + 1)
    return found


def changed_modules(paths: Iterable[str], graph: Graph, files: Mapping[str, str]) -> set[str]:
    """Modules that changed files are, or that stand beside a changed file of data."""
    found = set()
    for path in paths:
        module = module_of(path)
        if module is not None:
            found.add(module)
        else:
            parents = {parent.as_posix() for parent in Path(path).parents} - {"."}
            found |= {name for name, file in files.items() if Path(file).parent.as_posix() in parents}
    return found


def has_slow_tests(source: str) -> bool:
    """Whether something in a test file is marked slow."""
    return any(isinstance(node, ast.Attribute) and node.attr == "slow" for node in ast.walk(ast.parse(source)))


def within(costs: Mapping[str, float], order: Mapping[str, int], limit_s: float) -> tuple[list[str], list[str]]:
    """Files that fit into the limit, nearest to the change first and the cheaper of equals, and those that do not."""
    chosen, left_out, spent = [], [], 0.0
    for file in sorted(costs, key=lambda file: (order[file], costs[file], file)):
        if spent + costs[file] <= limit_s:
            chosen.append(file)
            spent += costs[file]
        else:
            left_out.append(file)
    return chosen, left_out


def select(paths: list[str], limit_s: float = LIMIT_S) -> tuple[list[str], list[str]]:
    """Slow test files for a change of these files, and what there is to say about the choice."""
    graph, files = import_graph()
    near = distances(graph, changed_modules(paths, graph, files))
    budgets = parse(FILE.read_text(encoding="utf-8")).seconds
    costs, order = {}, {}
    for module, distance in near.items():
        file = files.get(module, "")
        if Path(file).name.startswith("test_") and has_slow_tests((ROOT / file).read_text(encoding="utf-8")):
            costs[file], order[file] = budgets.get(Part(file, slow=True), UNKNOWN_S), distance
    chosen, left_out = within(costs, order, limit_s)
    said = [f"{len(paths)} changed files touch {len(costs)} files with slow tests; {len(chosen)} are run"]
    if left_out:
        said.append(
            f"not run, farther from the change than {limit_s / 60:.0f} processor-minutes reach: {' '.join(left_out)}"
        )
    everywhere = [path for path in paths if path in TOUCH_EVERYTHING or Path(path).name == "conftest.py"]
    if everywhere:
        said.append(
            f"every test depends on {' '.join(everywhere)}; no slow test is run for that: make test-all runs them"
        )
    return chosen, said


def git(*arguments: str) -> str | None:
    """What git prints, or None if it fails."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def base_commit() -> str | None:
    """The commit that the change is compared with: where its branch left the main one, else the commit before."""
    head = git("rev-parse", "HEAD")
    for main in ("origin/main", "main"):
        base = git("merge-base", "HEAD", main)
        if base and base != head:
            return base
    return git("rev-parse", "HEAD~1")


def main() -> None:
    """Prints the chosen files, one a line; what is to be said goes to stderr."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default=None, help="commit to compare with; by default found by git")
    arguments = parser.parse_args()
    base = arguments.base or base_commit()
    diff = git("diff", "--name-only", base) if base else None
    if diff is None:
        print("Slow tests: there is no earlier commit to compare with, so none is run.", file=sys.stderr)
        return
    chosen, said = select(diff.splitlines())
    print(f"Slow tests since {base[:10] if base else ''}: {'; '.join(said)}.", file=sys.stderr)
    print(*chosen, sep="\n")


if __name__ == "__main__":
    main()
