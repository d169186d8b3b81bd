"""RMSNorm against its formula in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llm_kernels.rms_norm.ref import rms_norm
from llm_kernels.testing import TOLERANCE, assert_matches, random


def truth(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(3, 2, 64), (1, 1, 2), (7, 33), (2, 3, 1000)], ids=str)
def test_matches_fp64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = [random(*shape, dtype=dtype), random(shape[-1], dtype=dtype, seed=1)]
    assert_matches(lambda x, w: rms_norm(x, w, 1e-5), truth, inputs)
