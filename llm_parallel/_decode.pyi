"""The C++ extension for passes of few tokens on a CPU (csrc/decode/). Tensors are given by their addresses, which the
callers in llm_parallel/generate keep alive; llm_parallel/generate/layers.py computes the same by torch's operators."""

from collections.abc import Mapping, Sequence
from typing import Any

Addresses = tuple[int, int, int, int, int, int]
"""Of slots int64, cosines and sines fp32, pages int32, starts and lengths int64; see Pass in csrc/decode/chunk.h."""

class Matrix:
    """A matrix [rows, columns]; ``kind`` is fp32, bf16, int8 or int4; see csrc/decode/kernels.h."""

    def __init__(self, kind: str, data: int, scales: int, rows: int, columns: int) -> None: ...

class Shape:
    """Sizes of all layers; ``members`` query heads share each of ``groups`` keys; ``wide``: of the MLP."""

    def __init__(self, hidden: int, wide: int, groups: int, members: int, head_dim: int) -> None: ...

class Layer:
    """One layer: its matrices, biases, norms and cache, by the names of csrc/decode/chunk.h."""

    def __init__(self, parts: Mapping[str, Any]) -> None: ...

class Chunk:
    """Consecutive layers."""

    def __init__(self, shape: Shape, layers: Sequence[Layer]) -> None: ...
    def forward(self, x: int, rows: int, seen: Addresses, threads: int) -> None:
        """Changes the stream x, fp32 [rows, hidden], in place."""

def product(matrix: Matrix, x: int, rows: int, y: int, bfloat: bool, threads: int) -> None:
    """y [rows, matrix.rows] = x times the transposed matrix; both bf16 or both fp32."""

def attend(
    shape: Shape, layer: Layer, q: int, rows: int, seen: Addresses, out: int, bfloat: bool, threads: int
) -> None:
    """Attention of one query of each head for each row: q and out [rows, groups, members, head_dim]."""

def logits(matrix: Matrix, norm: Any, eps: float, x: int, rows: int, bfloat: bool, y: int, threads: int) -> None:
    """y fp32 [rows, matrix.rows] of the RMS-normed rows of x [rows, matrix.columns], bf16 or fp32."""

def best(x: int, rows: int, columns: int, stride: int) -> tuple[list[float], list[int], list[float]]:
    """For rows of fp32 numbers: the largest, where it first stands, and the logarithm of the sum of exponentials; not a
    number for rows that are not finite."""

def level() -> str:
    """The instructions that are in use: avx512, avx2 or portable."""

def levels() -> list[str]:
    """Those that this processor runs, the best first."""

def use(level: str) -> None:
    """Takes other instructions from now on. Raises ValueError for those that this processor lacks."""
