"""Elements whose offsets do not fit in 32 bits: strides are 64 bits wide before they are multiplied with an index.

The repaired interpreter raises where an integer does not fit in its type (interpreter.py). The tensors lie in sparse
files, so that tensors of gigabytes take only the memory that is touched.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need triton")

from llm_kernels.rms_norm.op import add_rms_norm, rms_norm
from llm_kernels.rope.op import rope, rope_qkv_
from llm_kernels.rope.ref import inverse_frequencies
from llm_kernels.rope.table import RopeTable
from llm_kernels.swiglu.op import swiglu
from llm_kernels.testing import far_apart, random

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would have to hold the gigabytes")
FAR = 3 << 29  # with this stride the third row begins beyond 2^31 elements
DTYPE = torch.bfloat16
TABLE = RopeTable.make(inverse_frequencies(8, 10000.0), 4)


def gradients(op: Callable[..., Tensor | tuple[Tensor, ...]], inputs: list[Tensor], dy: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = op(*leaves)
    outputs = list(out) if isinstance(out, tuple) else [out]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, dy)]


def same_as_close_by(op: Callable, inputs: list[Tensor], dy: list[Tensor]) -> None:
    near = gradients(op, [x.contiguous() for x in inputs], [g.contiguous() for g in dy])
    for found, wanted in zip(gradients(op, inputs, dy), near, strict=True):
        assert torch.equal(found, wanted)


def test_rows_far_apart(tmp_path: Path) -> None:
    def far(columns: int) -> Tensor:
        return far_apart((3, columns), (FAR, 1), DTYPE, tmp_path)

    weight = random(16, dtype=DTYPE)
    same_as_close_by(lambda x, w: rms_norm(x, w, 1e-5, backend="triton"), [far(16), weight], [far(16)])
    same_as_close_by(
        lambda x, r, w: add_rms_norm(x, r, w, 1e-5, backend="triton"), [far(16), far(16), weight], [far(16), far(16)]
    )
    same_as_close_by(lambda x: swiglu(x, backend="triton"), [far(32)], [far(16)])
    x, dy = far(32), far(16)
    (right,) = gradients(lambda x: swiglu(x, backend="triton"), [x.contiguous()], [dy])[1:]
    torch.ops.llm_kernels.swiglu_backward_(dy, x)
    assert torch.equal(x, right)


# Tokens, rows or heads may be far apart; heads are so where they come first in memory.
@pytest.mark.parametrize("strides", [(FAR, 32, 8), (32, FAR, 8), (32, 96, FAR)], ids=["tokens", "rows", "heads"])
def test_rotation_of_heads_far_apart(strides: tuple[int, int, int], tmp_path: Path) -> None:
    def far(heads: int) -> Tensor:
        return far_apart((3, 3, heads, 8), (*strides, 1), DTYPE, tmp_path)

    same_as_close_by(lambda q, k: rope(q, k, TABLE, backend="triton"), [far(3), far(3)], [far(3), far(3)])


@pytest.mark.parametrize("strides", [(FAR, 32, 1), (32, FAR, 1)], ids=["tokens", "rows"])
def test_rotation_in_place_far_apart(strides: tuple[int, int, int], tmp_path: Path) -> None:
    x = far_apart((3, 3, 24), strides, DTYPE, tmp_path)
    wanted = rope_qkv_(x.contiguous(), TABLE, num_groups=1, head_dim=8, backend="triton")
    assert torch.equal(rope_qkv_(x, TABLE, num_groups=1, head_dim=8, backend="triton"), wanted)
