"""How an operator describes its benchmark: shapes, providers, and the least bytes or FLOPs of each shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Shape = Mapping[str, Any]


@dataclass(frozen=True)
class Llama:
    """Dimensions of a published model, whose heads are 128 wide."""

    hidden: int
    ffn: int
    heads: int
    groups: int
    vocab_size: int


LLAMAS = {
    "llama2-7b": Llama(4096, 11008, 32, 32, 32000),
    "llama3-8b": Llama(4096, 14336, 32, 8, 128256),
    "llama2-13b": Llama(5120, 13824, 40, 40, 32000),
    "llama2-70b": Llama(8192, 28672, 64, 8, 32000),
    "llama3-70b": Llama(8192, 28672, 64, 8, 128256),
    "llama3-405b": Llama(16384, 53248, 128, 8, 128256),
}
TENSOR_PARALLEL = (1, 2, 4, 8)


def sharded(shape_of: Callable[[Llama, int], Shape]) -> list[Shape]:
    """The shapes that a rank of each published model has at tensor-parallel sizes 1 to 8, each different shape once.

    A shape is named after the first model and TP size that have it; its ``models`` lists all of them. Shapes of TP 1
    come first.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for tp in TENSOR_PARALLEL:
        for name, llama in LLAMAS.items():
            shape, label = shape_of(llama, tp), name if tp == 1 else f"{name} tp{tp}"
            entry = found.setdefault(tuple(shape.values()), {"name": label, "models": [], **shape})
            entry["models"].append(label)
    return list(found.values())


@dataclass(frozen=True)
class Work:
    """The least bytes moved, or FLOPs done, in forward and in backward."""

    forward: int
    backward: int


@dataclass(frozen=True)
class Benchmark:
    """The benchmark of one operator.

    shapes: shapes of real models, each with a ``name``. make: makes the inputs of a shape, leaves that require a
    gradient where the operator is differentiable. providers: name → function that imports what the provider needs
    (ImportError means that it is not installed) and returns the callable to measure, which takes the inputs of
    ``make``. bytes_moved: each input read once and each output written once; None for operators that are not bound by
    memory. flops: None for operators that are. small: an aligned shape, small enough for the interpreter, on which
    bytes are counted. inplace: the operator overwrites its inputs.
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
    """An input of standard normal numbers, which requires a gradient by default."""
    return torch.randn(*shape, device=device, dtype=dtype).requires_grad_(gradient)
