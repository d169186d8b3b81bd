"""How an operator describes its benchmark: shapes, providers, and the bytes and FLOPs that it cannot do without."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Shape = Mapping[str, Any]


@dataclass(frozen=True)
class Work:
    """Minimal bytes moved or FLOPs done: in forward, in backward."""

    forward: int
    backward: int


@dataclass(frozen=True)
class Benchmark:
    """One operator, as the benchmark runs it.

    shapes: real model shapes, each with a ``name``. make: inputs of a shape, leaves that want gradients where the
    operator has them. providers: name → function that imports what it needs (ImportError: not installed) and returns
    the callable to measure, on the inputs of ``make``. bytes_moved: each input read once, each output written once;
    None for operators that are not bound by memory. flops: None for those that are. small: an aligned shape that the
    interpreter can run, on which bytes are counted. inplace: the operator writes over its inputs, so they are made
    anew.
    """

    name: str
    shapes: Sequence[Shape]
    small: Shape
    make: Callable[[Shape, torch.dtype, torch.device], tuple[Tensor, ...]]
    providers: Mapping[str, Callable[[], Callable[..., Any]]]
    bytes_moved: Callable[[Shape, torch.dtype], Work] | None = None
    flops: Callable[[Shape], Work] | None = None
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,)
    inplace: bool = False
    has_backward: bool = True


def normal(*shape: int, dtype: torch.dtype, device: torch.device, gradient: bool = True) -> Tensor:
    """Standard normal input."""
    return torch.randn(*shape, device=device, dtype=dtype).requires_grad_(gradient)
