"""What ptxas makes of every kernel, committed in aot_table.json, so that a test compiles only what has changed.

A row is what ``aot.inspect`` reports of one case, without the time. Its key is a hash of all that decides it: the
source of the kernel and of what it calls, without comments and docstrings; the case's arguments and options; the source
of ``aot.inspect``; and the versions of Triton and ptxas. ``check`` compiles the cases whose key is not in the table and
a random share of the others, so that a table that is wrong is found in time. The table may hold several versions of
Triton; with one that it does not hold, every case is compiled.

``python -m llm_kernels.aot --write-table`` renews the rows of the installed Triton.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import math
import random
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from llm_kernels import aot
from llm_kernels.aot import AotCase, Place, Report

TABLE = Path(__file__).with_name("aot_table.json")
RENEW = "python -m llm_kernels.aot --write-table"
Row = dict[str, Any]


_KEYS = {"key", "triton", "ptxas"}


@dataclass
class Checked:
    """Outcome of a check: a report of every case, what is wrong, and how many cases were compiled for which reason."""

    reports: list[Report] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    changed: int = 0
    sampled: int = 0


def versions() -> tuple[str, str]:
    """(Triton's, ptxas') version."""
    import triton

    said = subprocess.check_output([triton.knobs.nvidia.ptxas.path, "--version"], text=True)
    match = re.search(r"\bV([\d.]+)", said)
    return triton.__version__, match.group(1) if match else said.strip()


def key_of(case: AotCase, arch: int, of: tuple[str, str]) -> str:
    """The case's key under (Triton, ptxas) versions ``of``."""
    arguments = sorted((name, repr(value)) for name, value in case.arguments.items())
    options = case.num_warps, case.num_stages, sorted(case.wants), case.maxnreg, case.narrow_allowed, case.gluon
    parts = [*of, str(arch), repr(arguments), repr(options), source_of(aot.inspect), source_of(case.kernel)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def source_of(function: Any) -> str:
    """Source of a kernel or function, of every function and class of its package that it names, directly or through
    others, and the values of the global constants they name."""
    if id(function) not in _sources:
        found: dict[str, str] = {}
        _collect(function, found)
        _sources[id(function)] = function, "\n".join(f"{name}\n{text}" for name, text in sorted(found.items()))
    return _sources[id(function)][1]


# By identity, and with the function, so that nothing else gets its number. Not functools.cache: Triton computes a
# kernel's hash anew each time.
_sources: dict[int, tuple[Any, str]] = {}


def _collect(thing: Any, found: dict[str, str]) -> None:
    python = getattr(thing, "fn", thing)  # a kernel holds its function
    name = f"{python.__module__}.{python.__qualname__}"
    if name in found:
        return
    tree = _without_docstrings(ast.parse(textwrap.dedent(inspect.getsource(python))))
    found[name] = _written(tree)
    known = dict(vars(sys.modules[python.__module__])) if inspect.isclass(python) else dict(python.__globals__)
    if getattr(python, "__closure__", None):
        known |= {n: cell.cell_contents for n, cell in zip(python.__code__.co_freevars, python.__closure__)}
    for chain in sorted(set(_names(tree))):
        value = _resolve(chain, known)
        inner = getattr(value, "fn", value)
        if inspect.isfunction(inner) or inspect.isclass(inner):
            if inner.__module__.split(".")[0] == python.__module__.split(".")[0]:  # versions stand for other packages
                _collect(value, found)
        elif value is not None and not isinstance(value, ModuleType):
            found[f"{name}: {chain}"] = re.sub(r" at 0x\w+", "", repr(value))


def _names(tree: ast.AST) -> Iterator[str]:
    """``a`` and ``a.b.c`` wherever they are read."""
    for node in ast.walk(tree):
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        if isinstance(node, ast.Name):
            yield ".".join([node.id, *parts])


def _resolve(chain: str, known: Mapping[str, Any]) -> Any:
    first, *rest = chain.split(".")
    value = known.get(first)
    for name in rest:
        value = getattr(value, name, None)
    return value


def _without_docstrings(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def _written(node: Any) -> str:
    """A syntax tree as text, the same in every version of Python: ast.unparse and ast.dump change with it."""
    if isinstance(node, list):
        return f"[{', '.join(map(_written, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    told = [(name, value) for name, value in ast.iter_fields(node) if name not in ("ctx", "kind", "type_comment")]
    return f"{type(node).__name__}({', '.join(f'{n}={_written(v)}' for n, v in told if v is not None and v != [])})"


def row_of(report: Report) -> Row:
    """The report without its time and without what is empty or 0."""
    row = {name: value for name, value in asdict(report).items() if name != "compile_s" and value}
    row["occupancy"] = round(report.occupancy, 4)
    if "instructions" in row:
        row["instructions"] = {name: count for name, count in report.instructions.items() if count}
    return row


def report_of(row: Row) -> Report:
    """The report that a row was made of."""
    report = Report(**{name: value for name, value in row.items() if name not in _KEYS})
    report.instructions = {**dict.fromkeys(aot.CLASSES, 0), **report.instructions}
    return report


def read(table: Path = TABLE) -> list[Row]:
    """All rows of all versions of Triton; none where there is no table."""
    return json.loads(table.read_text())["rows"] if table.exists() else []


def write(rows: Sequence[Row], table: Path = TABLE) -> None:
    """Writes the table, a row a line, in an order that depends on nothing else."""
    ordered = sorted(rows, key=lambda row: (row["triton"], row["arch"], row["name"]))
    first = "name", "arch"
    plain = [{**{x: row[x] for x in first}, **{x: row[x] for x in sorted(row.keys() - first)}} for row in ordered]
    lines = ",\n".join(map(json.dumps, plain))
    table.write_text(f'{{"rows": [\n{lines}\n]}}\n')


Compile = Callable[[Sequence[Place]], list[Report]]
Cases = Mapping[Place, AotCase]


def check(cases: Cases, compile_all: Compile, share: float, seed: int, table: Path = TABLE) -> Checked:
    """Compiles what is not in the table and a random ``share`` of the rest. Failures: a case with a problem, a compiled
    case whose row is missing or another, a row without a case."""
    of = versions()
    rows = _rows_of(of[0], table)
    held = bool(rows)
    out, compiled = _compile_some(cases, compile_all, rows, share, seed)
    for place, case in cases.items():
        row, report = rows.pop((place[1], case.name), None), compiled.get(place)
        label = f"{case.name}, sm_{place[1]}"
        if report is not None and held:
            found, known = row_of(report), {} if row is None else row
            wrong = [x for x in sorted({*found, *known} - _KEYS) if found.get(x) != known.get(x)]
            if row is None:
                out.failures.append(f"{label}: not in the table")
            elif wrong:
                differences = "; ".join(f"{x} {known.get(x)} -> {found.get(x)}" for x in wrong)
                out.failures.append(f"{label}: the table has another row: {differences}")
    out.failures += [f"{name}, sm_{arch}: in the table, but no such case" for arch, name in rows]
    if out.failures:
        out.failures.append(f"If the table is what is out of date, renew it: {RENEW}")
    out.failures += _problems(out.reports)
    return out


def renew(cases: Cases, compile_all: Compile, share: float, seed: int, table: Path = TABLE) -> Checked:
    """Writes the table's rows of the installed Triton; compiles what is not in it and a random ``share`` of the rest.
    Failures: a case with a problem."""
    of = versions()
    rows = _rows_of(of[0], table)
    out, _ = _compile_some(cases, compile_all, rows, share, seed)
    fresh = [
        {**row_of(report), "key": key_of(case, place[1], of), "triton": of[0], "ptxas": of[1]}
        for (place, case), report in zip(cases.items(), out.reports)
    ]
    write([row for row in read(table) if row["triton"] != of[0]] + fresh, table)
    out.failures = _problems(out.reports)
    return out


def _rows_of(triton: str, table: Path) -> dict[tuple[int, str], Row]:
    return {(row["arch"], row["name"]): row for row in read(table) if row["triton"] == triton}


def _problems(reports: Sequence[Report]) -> list[str]:
    return [f"{r.name}, sm_{r.arch}: {problem}" for r in reports for problem in r.problems]


def _compile_some(
    cases: Cases, compile_all: Compile, rows: Mapping[tuple[int, str], Row], share: float, seed: int
) -> tuple[Checked, dict[Place, Report]]:
    """Reports of all cases, from the table or compiled, and those that were compiled."""
    of = versions()
    known = {p: rows[p[1], case.name] for p, case in cases.items() if _is_known(case, p[1], rows, of)}
    sample = set(random.Random(seed).sample(list(known), math.ceil(share * len(known))))
    chosen = [p for p in cases if p in sample or p not in known]
    compiled = dict(zip(chosen, compile_all(chosen)))
    reports = [compiled[p] if p in compiled else report_of(known[p]) for p in cases]
    return Checked(reports, changed=len(chosen) - len(sample), sampled=len(sample)), compiled


def _is_known(case: AotCase, arch: int, rows: Mapping[tuple[int, str], Row], of: tuple[str, str]) -> bool:
    row = rows.get((arch, case.name))
    return row is not None and row["key"] == key_of(case, arch, of)


_COLUMNS: tuple[tuple[str, Callable[[Row], Any]], ...] = (
    ("instructions", lambda r: r["length"]),
    ("registers", lambda r: r["registers"]),
    ("spill B", lambda r: r["spill_bytes"]),
    ("shared B", lambda r: r["shared_bytes"]),
    ("loop", lambda r: r["loop_length"] or ""),
    ("loads in flight", lambda r: r["loads_in_flight"]),
    ("barriers in loop", lambda r: r["loop"].get("barrier", 0) if r["loop_length"] else ""),
    ("warps", lambda r: r["num_warps"]),
    ("occupancy", lambda r: f"{r['occupancy']:.0%}"),
)


def beside(before: Sequence[Row], after: Sequence[Row]) -> str:
    """Markdown table of reports as data, of two commits: one line a kernel, each figure before and after."""
    old = {(row["arch"], row["name"]): row for row in before}
    heads = [head for name, _ in _COLUMNS for head in (f"{name} before", name)]
    lines = [f"| kernel | sm | {' | '.join(heads)} |", "|" + " --- |" * (2 + len(heads))]
    for row in after:
        was = old.get((row["arch"], row["name"]))
        cells = [str(cell) for _, of in _COLUMNS for cell in ("" if was is None else of(was), of(row))]
        lines.append(f"| {row['name']} | {row['arch']} | {' | '.join(cells)} |")
    return "\n".join(lines)
