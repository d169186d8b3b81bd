"""Operators on numbers that are finite but extreme, forward and backward, beside torch's own in the same dtype.

``pytest -s`` prints the worst ratio to torch's error by operator and dtype. Attention, the losses and AdamW are tested
on extreme numbers in their own folders.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need triton")

from llm_kernels.rms_norm.op import add_rms_norm, rms_norm
from llm_kernels.rope.op import rope
from llm_kernels.rope.ref import inverse_frequencies
from llm_kernels.rope.table import RopeTable
from llm_kernels.swiglu.op import swiglu
from llm_kernels.testing import default_device, grid, random, sweep_extremes

EPS = 1e-5
TABLE = RopeTable.make(inverse_frequencies(8, 10000.0, device=default_device()), 4)
Functions = tuple[Callable, Callable, Callable]


def norm_exact(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def norm_of_torch(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def added(norm: Callable) -> Callable:
    return lambda x, residual, weight: (norm(x + residual, weight), x + residual)


def swiglu_exact(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


def swiglu_of_torch(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def turned(x: Tensor) -> Tensor:
    """The framework's rotation: two products and a sum, with the table in fp32."""
    cos, sin = (half[:4, None, None].to(torch.promote_types(x.dtype, torch.float32)) for half in (TABLE.cos, TABLE.sin))
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def both(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return turned(q), turned(k)


def functions(name: str, backend: str) -> Functions:
    return {
        "rms_norm": (lambda x, w: rms_norm(x, w, EPS, backend=backend), norm_of_torch, norm_exact),
        "add_rms_norm": (
            lambda x, r, w: add_rms_norm(x, r, w, EPS, backend=backend),
            added(norm_of_torch),
            added(norm_exact),
        ),
        "swiglu": (lambda x: swiglu(x, backend=backend), swiglu_of_torch, swiglu_exact),
        "rope": (lambda q, k: rope(q, k, TABLE, backend=backend), both, both),
    }[name]


def inputs(name: str, dtype: torch.dtype, values: Callable[..., Tensor]) -> list[Tensor]:
    weight = random(24, dtype=dtype, seed=5)
    return {
        "rms_norm": lambda: [values(3, 24), weight],
        "add_rms_norm": lambda: [values(3, 24), values(3, 24, seed=1).detach().mul(0.5).requires_grad_(), weight],
        "swiglu": lambda: [values(3, 48)],
        "rope": lambda: [values(4, 1, 2, 8), values(4, 1, 1, 8, seed=1)],
    }[name]()


OPERATORS = ["rms_norm", "add_rms_norm", "swiglu", "rope"]


# bf16 has the magnitudes of fp32 and fp16 has fewer; what they add is the rounding of results near their largest
# number, which one operator with a sum over a row and one without are enough to show.
@pytest.mark.parametrize(("name", "dtype"), grid(OPERATORS, bf16=["rms_norm", "swiglu"], fp16=["swiglu"]))
def test_extremes(name: str, dtype: torch.dtype) -> None:
    hold("triton", name, dtype)


@pytest.mark.parametrize(("name", "dtype"), grid(OPERATORS, bf16=[], fp16=[]))
def test_extremes_by_torch(name: str, dtype: torch.dtype) -> None:
    hold("torch", name, dtype)


def hold(backend: str, name: str, dtype: torch.dtype) -> None:
    sweep_extremes(f"{name} ({backend})", dtype, functions(name, backend), lambda values: inputs(name, dtype, values))
