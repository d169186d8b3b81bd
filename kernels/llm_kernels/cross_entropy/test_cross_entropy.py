"""Cross entropy against torch's in fp64, with and without padded columns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llm_kernels.cross_entropy.ref import vocab_parallel_cross_entropy
from llm_kernels.testing import TOLERANCE, assert_matches, random


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("columns", "words"), [(50, 50), (64, 50), (1, 1), (8, 3)])
def test_matches_fp64(columns: int, words: int, dtype: torch.dtype) -> None:
    labels = torch.randint(0, words, (5, 3), generator=torch.Generator().manual_seed(0))

    def truth(logits: Tensor) -> Tensor:
        flat = torch.nn.functional.cross_entropy(logits[..., :words].flatten(0, 1), labels.flatten(), reduction="none")
        return flat.view(5, 3)

    assert_matches(
        lambda logits: vocab_parallel_cross_entropy(logits, labels, words), truth, [random(5, 3, columns, dtype=dtype)]
    )


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    losses = vocab_parallel_cross_entropy(logits, torch.tensor([1]), 3)
    losses.sum().backward()
    assert losses.item() == 2e4
    assert logits.grad is not None and logits.grad.tolist() == [[1.0, -1.0, 0.0]]
