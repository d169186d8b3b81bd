"""SwiGLU against its formula in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llm_kernels.swiglu.ref import swiglu
from llm_kernels.testing import TOLERANCE, assert_matches, random


def truth(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(3, 2, 64), (5, 2), (2, 1, 1408)], ids=str)
def test_matches_fp64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_matches(swiglu, truth, [random(*shape, dtype=dtype)])
