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
PathFinder.find_spec = staticmethod(find_others)
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


@pytest.mark.parametrize(("version", "usable"), [("3.4.0", False), ("3.5.1", False), ("3.6.0", True), ("4.0+x", True)])
def test_an_old_triton_is_none(version: str, usable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(dispatch.metadata, "version", lambda _: version)
    dispatch.triton_fault.cache_clear()
    try:
        assert dispatch.triton_installed() == usable
        if not usable:
            with pytest.raises(ValueError, match=f"triton {version} is installed, and the kernels need 3.6"):
                dispatch.backend_for(torch.ones(1), "triton")
    finally:
        dispatch.triton_fault.cache_clear()


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


def test_other_dtypes_are_refused_by_name() -> None:
    pytest.importorskip("triton")
    x = torch.ones(2, 8, dtype=torch.float64)
    assert dispatch.backend_for(x, "auto") == dispatch.backend_for(x, "torch") == "torch"
    for tensors in ((x,), (x.float(), x)):
        with pytest.raises(ValueError, match=r"takes float32, bfloat16 and float16, not torch\.float64; .* by torch"):
            dispatch.backend_for(tensors[0], "triton", *tensors[1:])


def test_operators_compute_other_dtypes_by_torch_and_refuse_them_on_triton() -> None:
    pytest.importorskip("triton")
    from llm_kernels.rms_norm.op import add_rms_norm, rms_norm
    from llm_kernels.rope.op import rope, rope_qkv_
    from llm_kernels.rope.table import RopeTable
    from llm_kernels.swiglu.op import swiglu

    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, dtype=torch.float64, generator=generator) for size in ((4, 8), (8,)))
    heads, table = x.view(4, 1, 1, 8), RopeTable.make(torch.ones(4), 4)
    packed = torch.randn(4, 1, 24, dtype=torch.float64, generator=generator)
    calls = {
        "rms_norm": lambda b: rms_norm(x, weight, 1e-5, backend=b),
        "rms_norm, weight": lambda b: rms_norm(x.float(), weight, 1e-5, backend=b),
        "add_rms_norm": lambda b: add_rms_norm(x, x, weight, 1e-5, backend=b)[0],
        "rope": lambda b: rope(heads, heads, table, backend=b)[0],
        "rope_qkv_": lambda b: rope_qkv_(packed.clone(), table, num_groups=1, head_dim=8, backend=b),
        "swiglu": lambda b: swiglu(x, backend=b),
    }
    for name, call in calls.items():
        assert torch.equal(call("auto"), call("torch")), name
        assert call("auto").dtype == (torch.float32 if name.endswith("weight") else torch.float64), name
        with pytest.raises(ValueError, match="takes float32, bfloat16 and float16"):
            call("triton")
    # In fp64 the reference has the accuracy of fp64, not of the fp32 that the kernels compute in.
    exact = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(calls["rms_norm"]("auto"), exact, rtol=1e-14, atol=1e-14)
