"""One rule chooses the implementation; the library works without Triton and without megatron-core."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from llm_kernels import dispatch

WITHOUT_TRITON = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def find_others(name, *rest, **more):
    return None if name.split(".")[0] in ("triton", "megatron") else find(name, *rest, **more)
PathFinder.find_spec = find_others
import torch
from importlib import import_module
from llm_kernels import aot, dispatch
for name in aot.OPERATORS:
    import_module(f"llm_kernels.{name}.op")
    import_module(f"llm_kernels.{name}.bench")
from llm_kernels.rms_norm.op import rms_norm
from llm_kernels.swiglu.op import swiglu
x = torch.randn(2, 8, requires_grad=True)
(rms_norm(x, torch.ones(8), 1e-5).sum() + swiglu(x).sum()).backward()
assert x.grad is not None and not dispatch.triton_installed()
try:
    rms_norm(x, torch.ones(8), 1e-5, backend="triton")
except ValueError as error:
    assert "triton is not installed" in str(error)
else:
    raise AssertionError
assert "megatron" not in sys.modules and "triton" not in sys.modules
"""


def test_library_works_without_triton_and_megatron() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_an_operator_does_not_import_triton() -> None:
    code = "import sys, llm_kernels.attention.op, llm_kernels.rms_norm.op; assert 'triton' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_auto_is_torch_on_cpu() -> None:
    assert dispatch.backend_for(torch.ones(1)) == "torch"
    assert dispatch.backend_for(torch.ones(1), "torch") == "torch"


def test_interpreter_must_be_asked_for() -> None:
    pytest.importorskip("triton")
    code = (
        "import torch; from llm_kernels.dispatch import backend_for\n"
        "try: backend_for(torch.ones(1), 'triton')\n"
        "except ValueError as error: assert 'TRITON_INTERPRET=1' in str(error)\n"
        "else: raise AssertionError"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
