"""Noise on embeddings: uniform, independent, of the size that NEFTune's paper gives."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from llm_parallel.model.noise import add_embedding_noise, uniform_noise

NUMBERS, POSITIONS = torch.tensor([0, 1, 2**40]), torch.arange(64)


def test_noise_is_uniform_and_uncorrelated() -> None:
    noise = uniform_noise(7, NUMBERS, POSITIONS, 128)
    assert noise.shape == (64, 3, 128) and noise.dtype == torch.float32
    assert stats.kstest(noise.flatten().numpy(), stats.uniform(-1, 2).cdf).pvalue > 1e-3
    for one, other in ((noise[1:], noise[:-1]), (noise[:, 0], noise[:, 1]), (noise[..., 1:], noise[..., :-1])):
        assert abs(np.corrcoef(one.flatten(), other.flatten())[0, 1]) < 4 / math.sqrt(one.numel())


def test_noise_depends_on_seed_sample_position_and_channel_only() -> None:
    whole = uniform_noise(7, NUMBERS, POSITIONS, 128)
    assert torch.equal(uniform_noise(7, NUMBERS[1:], POSITIONS[[5, 40]], 128), whole[[5, 40], 1:])
    assert torch.equal(uniform_noise(7, NUMBERS, POSITIONS, 16), whole[..., :16])
    assert not torch.equal(uniform_noise(8, NUMBERS, POSITIONS, 128), whole)
    assert len(whole.unique()) > 0.99 * whole.numel()


def test_noise_has_the_size_of_the_paper() -> None:
    embedded = torch.zeros(64, 3, 128)
    noise = add_embedding_noise(embedded, 5.0, 7, NUMBERS, POSITIONS, 64)
    bound = 5.0 / math.sqrt(64 * 128)
    assert noise.abs().max() <= bound and noise.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
