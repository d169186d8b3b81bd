"""megatron-core is imported without the compiler where torch has no CUDA, and nothing else changes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

SCRIPT = """
import json, sys
import llm_parallel
assert "torch" not in sys.modules, "the command's start must not pay for torch"
from megatron.core.fusions.fused_bias_swiglu import swiglu
from megatron.core.jit import jit_fuser
import torch
x = torch.arange(8.0).reshape(2, 4)
gate, up = x.chunk(2, dim=-1)
right = torch.equal(swiglu(x), torch.nn.functional.silu(gate) * up)
loaded = [name for name in ("torch._inductor.compile_fx", "wandb") if name in sys.modules]
import wandb
compiled = torch.compile(lambda x: 2 * x, backend="eager")
finders = [type(finder).__name__ for finder in sys.meta_path]
print(json.dumps([right, loaded, wandb.__name__, compiled(x).tolist() == (2 * x).tolist(),
                  torch.compile.__module__, "LeanMegatron" in finders, sys.modules["megatron.core"].__spec__.name]))
"""


@pytest.mark.processes
@pytest.mark.skipif(torch.version.cuda is not None, reason="with a CUDA build of torch nothing is touched")
def test_the_compiler_is_not_loaded_and_works_later() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    right, loaded, wandb, compiles, module, left, name = json.loads(done.stdout.splitlines()[-1])
    assert right and compiles and not left
    assert loaded == [] and wandb == "wandb" and module == "torch" and name == "megatron.core"


def test_with_cuda_nothing_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    from llm_parallel.lean_import import without_compiler

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    compiler = torch.compile
    with without_compiler():
        assert torch.compile is compiler
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None, raising=False)
    with without_compiler():
        assert torch.compile is not compiler and torch.compile(abs) is abs and torch.compile(dynamic=True)(abs) is abs
    assert torch.compile is compiler
