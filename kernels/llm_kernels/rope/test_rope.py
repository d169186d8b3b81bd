"""RoPE against complex multiplication in fp64, and Llama 3.1's scaling against its published cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from llm_kernels.rope.ref import cos_sin, inverse_frequencies, rope
from llm_kernels.testing import TOLERANCE, assert_matches, random


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("seq", "rows", "heads", "dim"), [(17, 2, 3, 16), (1, 1, 1, 2), (5, 1, 4, 64)])
def test_is_a_rotation_of_pairs(seq: int, rows: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    frequencies = inverse_frequencies(dim, 10000.0)
    positions = torch.arange(seq).unsqueeze(1) * 3
    cos, sin = (table.unsqueeze(2) for table in cos_sin(positions, frequencies))

    def truth(x: Tensor) -> Tensor:
        pairs = torch.complex(x[..., : dim // 2], x[..., dim // 2 :])
        angles = (positions.double().unsqueeze(-1) * frequencies.double()).unsqueeze(2)
        turned = pairs * torch.exp(1j * angles)
        return torch.cat((turned.real, turned.imag), dim=-1)

    assert_matches(lambda x: rope(x, cos, sin), truth, [random(seq, rows, heads, dim, dtype=dtype)])


def test_scaling_keeps_short_and_stretches_long_wavelengths() -> None:
    plain = inverse_frequencies(128, 500000.0)
    scaled = inverse_frequencies(128, 500000.0, (8.0, 1.0, 4.0, 8192))
    wavelengths = 2 * math.pi / plain
    short, long = wavelengths < 8192 / 4, wavelengths > 8192 / 1
    assert torch.equal(scaled[short], plain[short])
    torch.testing.assert_close(scaled[long], plain[long] / 8)
    between = ~short & ~long
    assert between.any() and ((scaled < plain) & (scaled > plain / 8))[between].all()
