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


@pytest.mark.parametrize(
    ("arch", "registers", "warps", "shared", "expected"),
    [(90, 32, 8, 0, 1.0), (90, 255, 8, 0, 0.125), (90, 168, 12, 164 * 1024, 0.1875), (80, 64, 4, 48 * 1024, 0.1875)],
)
def test_occupancy(arch: int, registers: int, warps: int, shared: int, expected: float) -> None:
    """From the CUDA occupancy calculator's rules: 65,536 registers of an SM in units of 256 a warp, 64 warps."""
    assert aot.occupancy(arch, registers, warps, shared) == expected
