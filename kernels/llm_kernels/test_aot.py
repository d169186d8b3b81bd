"""Every kernel compiles for A100 and H100 without a GPU and keeps its registers; the inspection sees when one does not.

What has compiled before is in aot_table.json: a run compiles what is not there and a random share of the rest.
Compilation happens in processes of its own: this one's kernels are for the interpreter where there is no GPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_kernels import aot, aot_table

pytest.importorskip("triton", reason="triton compiles the kernels")

BAD_KERNELS = """
import triton, triton.language as tl
from llm_kernels.aot import AotCase, inspect

@triton.jit
def copy(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y_ptr + at, tl.load(x_ptr + at) * 2)

@triton.jit
def product(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, tl.dot(x, x).to(y_ptr.dtype.element_ty))

@triton.jit
def chain(x_ptr, y_ptr, row_stride, steps, N: tl.constexpr, WIDE: tl.constexpr):
    step = tl.cast(row_stride, tl.int64) if WIDE else row_stride
    at = tl.arange(0, N)[:, None] * step + tl.arange(0, N)[None, :]
    sum = tl.zeros([N, N], tl.float32)
    for i in tl.range(0, steps):
        x = tl.load(x_ptr + i * N + at)
        sum = tl.dot(x, x, sum)
    tl.store(y_ptr + at, sum)

def problems(kernel, arguments, arch=90, **more):
    return inspect(AotCase("k", kernel, arguments, **more), arch).problems

wide = {"x_ptr": "*bf16", "y_ptr": "*bf16", "N": 1024}
square = {"x_ptr": "*bf16", "y_ptr": "*bf16", "N": 128}
if __name__ == "__main__":
    assert problems(copy, wide, wants=frozenset({"wide"})) == []
    unaligned = {**wide, "x_ptr": "*bf16:unaligned"}
    assert "narrower" in problems(copy, unaligned, wants=frozenset({"wide"}), narrow_allowed=0)[0]
    assert problems(copy, wide, wants=frozenset({"tensor_core"})) == ["no HGMMA"]
    assert problems(copy, wide, 80, wants=frozenset({"tensor_core"})) == ["no HMMA"]
    assert problems(product, square, wants=frozenset({"tensor_core"})) == []
    assert "spills" in problems(product, square, 80, maxnreg=128)[0]
    assert problems(copy, wide, wants=frozenset({"specialized"})) == ["no setmaxnreg"]
    assert "does not compile" in problems(copy, {**wide, "N": 1000})[0]
    tile = {"x_ptr": "*bf16", "y_ptr": "*fp32", "row_stride": 4096, "steps": "i32", "N": 64}
    assert problems(chain, {**tile, "WIDE": False}, num_stages=1) == ["row_stride enters arith.muli with 32 bits"]
    assert problems(chain, {**tile, "WIDE": True}, num_stages=1) == []
    report = inspect(AotCase("k", chain, {**tile, "WIDE": True}, num_stages=1), 90)
    assert report.loop["wait"] >= 1 and report.loop["hgmma"] >= 4
"""

# What ptxas of CUDA 12.8 says of the kernel for dk and dv with two stages of loads.
SERIALIZED = """
ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non wgmma \
instructions defining accumulator registers of a wgmma between start and end of the pipeline stage in the function '_k'
ptxas info    : Compiling entry function '_k' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""


# A table of one case: true, then with a wrong row, then of another case, then without the case, then of another Triton.
STALE_TABLES = """
import sys
from pathlib import Path
import triton, triton.language as tl
from llm_kernels import aot_table
from llm_kernels.aot import AotCase, inspect

@triton.jit
def copy(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y_ptr + at, tl.load(x_ptr + at) * 2)

def case(**more):
    return AotCase("copy", copy, {"x_ptr": "*bf16", "y_ptr": "*bf16", "N": 1024, **more})

def check(case, share, run=aot_table.check):
    cases = {} if case is None else {("copy", 90, 0): case}
    found = run(cases, lambda places: [inspect(cases[p], p[1]) for p in places], share, 0, table)
    return found.changed, found.sampled, found.failures

if __name__ == "__main__":
    table = Path(sys.argv[1])
    assert check(case(), 0.05) == (1, 0, []), "no table: compiled, as with a Triton that a table does not have"
    assert check(case(), 0.05, aot_table.renew) == (1, 0, [])
    assert check(case(), 0.0) == (0, 0, []) and check(case(), 0.05) == (0, 1, [])
    (row,) = aot_table.read(table)
    aot_table.write([{**row, "registers": row["registers"] + 1}], table)
    assert check(case(), 0.0) == (0, 0, [])
    changed, sampled, failures = check(case(), 0.01)
    assert (changed, sampled) == (0, 1) and "registers" in failures[0] and aot_table.RENEW in failures[1], failures
    aot_table.write([row], table)
    changed, sampled, failures = check(case(N=4096), 0.0)
    assert (changed, sampled) == (1, 0) and "instructions" in failures[0], failures
    assert "no such case" in check(None, 0.05)[2][0]
    aot_table.write([{**row, "name": "another"}], table)
    assert "not in the table" in check(case(), 0.05)[2][0]
    aot_table.write([{**row, "triton": "0.1"}], table)
    assert check(case(), 0.05) == (1, 0, [])
    assert check(case(), 0.05, aot_table.renew) == (1, 0, []) and len(aot_table.read(table)) == 2
"""


def compiling_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.mark.slow
def test_every_configuration_compiles_without_a_spill(tmp_path: Path) -> None:
    """With the table's Triton from the table and a share of new compilations, else all compiled."""
    table = tmp_path / "aot.json"
    command = [sys.executable, "-m", "llm_kernels.aot", "--check-table", "--jobs", "1", "--out", str(table)]
    done = subprocess.run(command, env=compiling_environment(), capture_output=True, text=True, timeout=1800)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    reports = json.loads(table.read_text())
    assert {r["arch"] for r in reports} == {80, 90}
    assert {r["name"].split()[0] for r in reports} == set(aot.OPERATORS)
    for arch, core in ((80, "hmma"), (90, "hgmma")):
        attention = [r for r in reports if r["arch"] == arch and r["name"].startswith("attention ") and r["loop"]]
        assert attention and any(r["loop"].get(core) for r in attention)
    gluon = [r for r in reports if "gluon" in r["name"]]
    assert {r["arch"] for r in gluon} == {90} and all(r["instructions"]["tma"] for r in gluon)


def test_inspection_sees_what_is_wrong(tmp_path: Path) -> None:
    script = tmp_path / "bad.py"
    script.write_text(BAD_KERNELS)
    done = subprocess.run([sys.executable, str(script)], env=compiling_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_stale_table_is_found(tmp_path: Path) -> None:
    script = tmp_path / "stale.py"
    script.write_text(STALE_TABLES)
    command = [sys.executable, str(script), str(tmp_path / "table.json")]
    done = subprocess.run(command, env=compiling_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_committed_table_is_in_order(tmp_path: Path) -> None:
    """Whatever wrote it: no row twice, no problem, and the bytes that ``write`` would write."""
    rows = aot_table.read()
    assert len({(row["triton"], row["arch"], row["name"]) for row in rows}) == len(rows) > 0
    assert not [row["name"] for row in rows if {"problems", "spill_bytes", "serialized"} & row.keys()]
    aot_table.write(rows, tmp_path / "table.json")
    assert (tmp_path / "table.json").read_text() == aot_table.TABLE.read_text()


KERNEL = """
import triton, triton.language as tl
SCALE: tl.constexpr = tl.constexpr(2)

@triton.jit
def helper(x):
    return x * SCALE

@triton.jit
def kernel(x_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(x_ptr + at, helper(tl.load(x_ptr + at)))

def launch(x):
    kernel[(1,)](x, x.numel())
"""


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("    at = ", '    """What it does."""\n\n    # why\n    at =  ', True),
        ("kernel[(1,)]", "kernel[(2,)]", True),
        ("x * SCALE", "x + SCALE", False),
        ("constexpr(2)", "constexpr(3)", False),
        ("tl.arange(0, N)", "tl.arange(0, N) + 1", False),
    ],
    ids=["comment", "launcher", "function called", "constant", "kernel"],
)
def test_a_key_changes_with_what_is_compiled(old: str, new: str, same: bool, tmp_path: Path) -> None:
    sources = []
    for name, text in (("before", KERNEL), ("after", KERNEL.replace(old, new))):
        path = tmp_path / name / "kernel_of_a_test.py"
        path.parent.mkdir()
        path.write_text(text)
        spec = importlib.util.spec_from_file_location("kernel_of_a_test", path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules["kernel_of_a_test"] = module
        try:
            spec.loader.exec_module(module)
            sources.append(aot_table.source_of(module.kernel))
        finally:
            del sys.modules["kernel_of_a_test"]
    assert (sources[0] == sources[1]) == same


def test_loads_in_flight() -> None:
    """Four registers at once; a pair whose second register is read; two groups to shared memory, one waited for."""
    listing = [
        ("LDG.E.128", " R4, desc[UR4][R2.64] ;"),
        ("LDG.E.64", " R8, desc[UR4][R2.64] ;"),
        ("FADD", " R10, R9, R9 ;"),
        ("LDG.E", " R8, desc[UR4][R2.64] ;"),
        ("LDGSTS.E.128", " [R20], desc[UR4][R2.64] ;"),
        ("LDGDEPBAR", " ;"),
        ("LDGSTS.E.128", " [R20], desc[UR4][R2.64] ;"),
        ("LDGDEPBAR", " ;"),
    ]
    instructions = [(16 * i, opcode, operands) for i, (opcode, operands) in enumerate(listing)]
    assert [aot.loads_in_flight(instructions[:n]) for n in (1, 2, 3, 4, 5, 8)] == [1, 2, 2, 2, 3, 4]
    waited = [(128, "DEPBAR.LE", " SB0, 0x1 ;"), (144, "LDGSTS.E", " [R20], desc[UR4][R2.64] ;")]
    assert aot.loads_in_flight(instructions + waited) == 4
    assert aot.loads_in_flight([*instructions, waited[1]]) == 5


def test_serialized_products_are_a_problem() -> None:
    """From ptxas' own words, because which kernels it serializes changes with every version of it."""
    (reason,) = aot.serialized(SERIALIZED)
    assert reason.startswith("due to non wgmma instructions") and reason.endswith("pipeline stage")
    assert aot.serialized(SERIALIZED.replace("are serialized", "are not")) == []
    counts = {"hgmma": 20, "hmma": 0, "wide": 1, "narrow": 0, "setmaxnreg": 0}
    report = aot.Report("k", 90, 8, serialized=reason, instructions=counts)
    report.loop_length, report.loop = 337, {"hgmma": 20, "wait": 20}
    report.problems = aot._problems(aot.AotCase("k", None, {}), report)
    assert len(report.problems) == 1 and "every HGMMA is waited for" in report.problems[0]
    assert "| 337 per 20 | 20 per 20 |" in aot.table([report])


@pytest.mark.parametrize(
    ("arch", "registers", "warps", "shared", "expected"),
    [(90, 32, 8, 0, 1.0), (90, 255, 8, 0, 0.125), (90, 168, 12, 164 * 1024, 0.1875), (80, 64, 4, 48 * 1024, 0.1875)],
)
def test_occupancy(arch: int, registers: int, warps: int, shared: int, expected: float) -> None:
    """From the CUDA occupancy calculator's rules: 65,536 registers of an SM in units of 256 a warp, 64 warps."""
    assert aot.occupancy(arch, registers, warps, shared) == expected
