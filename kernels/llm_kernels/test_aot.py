"""Every kernel compiles for A100 and H100 without a GPU and keeps its registers; the inspection sees when one does not.

Compilation happens in processes of its own: this one's kernels are for the interpreter where there is no GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_kernels import aot

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


def compiling_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.mark.slow
def test_every_configuration_compiles_without_a_spill(tmp_path: Path) -> None:
    table = tmp_path / "aot.json"
    command = [sys.executable, "-m", "llm_kernels.aot", "--jobs", "2", "--out", str(table)]
    done = subprocess.run(command, env=compiling_environment(), capture_output=True, text=True, timeout=900)
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
