"""Matrices in few bits: bitsandbytes' codes, the error of the paper, and blocks that a cut does not change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from llm_parallel.model.quant import BLOCK, NF4, FrozenProduct, QuantizedMatrix

CPU = torch.device("cpu")


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.04
    values[1] = 0.0  # a block of zeros has no scale
    values[2, :3] = torch.tensor([1.0, -1.0, 0.5])
    return values


def held(kind: Any, values: torch.Tensor) -> QuantizedMatrix:
    return QuantizedMatrix(kind, values.shape[0], range(values.shape[1]), values.shape[1], CPU, None).copy_(values)


def test_codes_scales_and_values_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    values = matrix(96, 576)
    codes, state = functional.quantize_4bit(values, blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
    ours = held("nf4", values)
    assert torch.equal(ours.codes.flatten(), codes.flatten())
    assert torch.equal(ours.scales.flatten(), state.absmax)
    assert torch.equal(ours.values(torch.float32), functional.dequantize_4bit(codes, state))
    np.testing.assert_array_equal(np.array(NF4, dtype=np.float32), state.code.numpy())
    assert torch.equal(ours._by_bitsandbytes(torch.bfloat16), ours.values(torch.bfloat16))


@pytest.mark.parametrize(("kind", "error"), [("nf4", 0.0917), ("int8", 0.0079)])
def test_error_of_normal_numbers(kind: str, error: float) -> None:
    """9.2 % in NF4 with blocks of 64; int8 rounds by 1 / sqrt(12) of a 127th of the largest of a row."""
    values = torch.randn(256, 1024, generator=torch.Generator().manual_seed(1))
    rounded = held(kind, values).values(torch.float32)
    assert float((rounded - values).norm() / values.norm()) == pytest.approx(error, rel=0.03)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("columns", [576, 100, 30])
def test_values_are_the_nearest_that_the_kind_has(kind: str, columns: int) -> None:
    """By trying every code, in fp64; 100 and 30 are not whole blocks."""
    values = matrix(8, columns)
    points = np.array(NF4) if kind == "nf4" else np.arange(-127, 128) / 127
    rounded = held(kind, values).values(torch.float32).double().numpy()
    width = BLOCK if kind == "nf4" else columns
    for start in range(0, columns, width):
        block = values[:, start : start + width].double().numpy()
        scale = np.abs(block).max(1, keepdims=True)
        candidates = points[None, None] * scale[..., None]
        nearest = np.abs(block[..., None] - candidates).min(-1)
        found = np.abs(block - rounded[:, start : start + width])
        np.testing.assert_allclose(found, nearest, atol=1e-6 * scale.max())


def test_bytes_that_are_held() -> None:
    values = matrix(64, 128)
    assert sum(part.nbytes for part in held("nf4", values).tensors) == 64 * 128 // 2 + 64 * 2 * 4
    assert sum(part.nbytes for part in held("int8", values).tensors) == 64 * 128 + 64 * 4


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_product_and_gradient_are_those_of_the_values(kind: str) -> None:
    weight = held(kind, matrix(24, 128))
    x = torch.randn(5, 128, requires_grad=True)
    dense = weight.values(torch.float32)
    dy = torch.randn(5, 24)
    y: torch.Tensor = FrozenProduct.apply(x, weight)  # type: ignore[assignment]
    y.backward(dy)
    assert torch.equal(y, x.detach() @ dense.t())
    assert torch.equal(x.grad, dy @ dense)  # type: ignore[arg-type]
