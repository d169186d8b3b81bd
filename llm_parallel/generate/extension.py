"""The C++ extension ``llm_parallel._decode`` (csrc/decode/), or its absence, and its products and choices of tokens.

``native.py`` runs whole model chunks by it. It is not there where the package was built without a C++ compiler; torch's
operators do the work then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

try:
    from llm_parallel import _decode
except ImportError:
    _decode = None  # type: ignore[assignment]

MOST_ROWS = 64
"""Tokens of a pass up to which the extension computes all of it. With more, torch's products, which cut the matrices
into blocks for the caches, are as fast: SmolLM2-135M in fp32 takes 112 ms for 64 tokens here."""
KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def is_built() -> bool:
    """Whether the extension can be had."""
    return _decode is not None


def matrix_of(weight: Tensor) -> Any:
    """The extension's view of a matrix, None for one that it cannot read."""
    if _decode is None or weight.device.type != "cpu":
        return None
    packed = getattr(weight, "packed", None)
    if packed is not None:
        return packed.native
    if getattr(weight, "stored", None) is not None or weight.dtype not in KINDS or not weight.is_contiguous():
        return None
    return _decode.Matrix(KINDS[weight.dtype], weight.data_ptr(), 0, *weight.shape)


def packed(bits: int, codes: Tensor, scales: Tensor, rows: int, columns: int) -> Any:
    """The extension's view of a matrix in few bits, whose memory the caller keeps."""
    return _decode.Matrix(f"int{bits}", codes.data_ptr(), scales.data_ptr() if bits == 8 else 0, rows, columns)


def few_rows(weight: Tensor, many: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """x [T, in] → x Wᵀ [T, out] by the extension where T is small, else by ``many``."""
    matrix, dtype, outputs = matrix_of(weight), weight.dtype, weight.shape[0]
    if matrix is None:
        return many

    def product(x: Tensor) -> Tensor:
        if x.shape[0] > MOST_ROWS or x.dtype != dtype:
            return many(x)
        return multiplied(matrix, x, outputs)

    return product


def multiplied(matrix: Any, x_TI: Tensor, outputs: int) -> Tensor:
    """x [T, I] in bf16 or fp32 times a transposed matrix [outputs, I]."""
    x_TI = x_TI.contiguous()
    y = x_TI.new_empty(x_TI.shape[0], outputs)
    bfloat, threads = x_TI.dtype == torch.bfloat16, torch.get_num_threads()
    _decode.product(matrix, x_TI.data_ptr(), x_TI.shape[0], y.data_ptr(), bfloat, threads)
    return y


@dataclass(frozen=True)
class Best:
    """Of each row of logits: the largest, its token, and the logarithm of the sum of exponentials, NaN for a row that
    is not finite."""

    logits: list[float]
    tokens: list[int]
    log_sums: list[float]


def best_of(logits_BV: Tensor) -> Best | None:
    """Of fp32 logits; None where the extension cannot read them."""
    if _decode is None or not logits_BV.is_cpu or logits_BV.dtype != torch.float32 or logits_BV.stride(1) != 1:
        return None
    (rows, columns), stride = logits_BV.shape, logits_BV.stride(0)
    return Best(*_decode.best(logits_BV.data_ptr(), rows, columns, stride))


def level() -> str:
    """The instructions that the extension uses, or that there is none."""
    return "not built" if _decode is None else _decode.level()
