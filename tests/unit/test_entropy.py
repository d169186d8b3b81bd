"""The entropy of the model's distribution and its gradient, against autograd in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm_parallel.model import observe
from llm_parallel.model.entropy import entropy
from tests.support.harness import run_ranks

ROWS, COLUMNS = (3, 5), 40


def exact(logits: torch.Tensor, valid: int, softcap: float) -> torch.Tensor:
    x = logits.double()[..., :valid]
    x = softcap * torch.tanh(x / softcap) if softcap else x
    log_p = x.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def example(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = 4.0 * torch.randn(*ROWS, COLUMNS, generator=generator)
    return logits.to(dtype), torch.randn(*ROWS, generator=generator)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradient(dtype: torch.dtype, softcap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "BLOCK_NUMBERS", 4 * COLUMNS)  # so that there are several blocks
    logits, upstream = example(dtype)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().double().requires_grad_()
    found, wanted = entropy(ours, 33, softcap), exact(theirs, 33, softcap)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    found.backward(upstream)
    wanted.backward(upstream.double())
    assert ours.grad is not None and theirs.grad is not None
    bound = 2e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=bound, atol=bound)
    assert not ours.grad[..., 33:].any(), "padding of the vocabulary takes no part"


def divided(rank: int, world_size: int, valid: int) -> tuple[np.ndarray, np.ndarray]:
    import torch.distributed as dist

    logits, upstream = example()
    own = logits.chunk(world_size, dim=-1)[rank].clone().requires_grad_()
    width = COLUMNS // world_size
    found = entropy(own, min(max(valid - rank * width, 0), width), 0.0, dist.group.WORLD)
    found.backward(upstream)
    assert own.grad is not None
    return found.detach().numpy(), own.grad.numpy()


@pytest.mark.gloo
@pytest.mark.parametrize("valid", [33, 15])
def test_a_divided_vocabulary_has_the_same(valid: int) -> None:
    """With 15 tokens the second rank holds padding alone."""
    logits, upstream = example()
    whole = logits.clone().double().requires_grad_()
    wanted = exact(whole, valid, 0.0)
    wanted.backward(upstream.double())
    assert whole.grad is not None
    ranks = run_ranks(divided, 2, valid)
    for found, _ in ranks:
        np.testing.assert_allclose(found, wanted.detach().numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.concatenate([grad for _, grad in ranks], -1), whole.grad.numpy(), atol=2e-6)
