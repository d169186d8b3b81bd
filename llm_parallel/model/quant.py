"""Frozen matrices in 4 or 8 bits: NF4 (QLoRA; Dettmers et al. 2023, arXiv 2305.14314), and int8 with a scale by row.

A number is a code times the scale of its block. Blocks are parts of a row: 64 numbers in NF4, the whole row in int8. A
block that tensor parallelism cuts has the scale of all its numbers, so that every layout holds the same model. Where
rows are a multiple of 64 wide, codes and scales are those of bitsandbytes (without its second quantization, of the
scales, whose groups run over rows and so depend on the layout).

Shapes: O outputs and I inputs of the matrix on this rank.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The values of NF4's codes: quantiles of a normal distribution, scaled to [-1, 1] (appendix E of the paper)."""

Kind = Literal["int8", "nf4"]


class QuantizedMatrix:
    """One process's part [O, I] of a frozen matrix.

    columns: those of the whole matrix that this part has; width: all columns; group: the processes that hold the other
    columns, None if there are none. ``codes``: int8 [O, I], or uint8 [O, I/2] with the first of two numbers in the high
    bits; ``scales``: fp32 [O, blocks]; empty until values are taken.
    """

    def __init__(
        self, kind: Kind, rows: int, columns: range, width: int, device: torch.device, group: dist.ProcessGroup | None
    ) -> None:
        assert kind == "int8" or len(columns) % 2 == 0, "a byte holds two numbers of a row"
        self.kind, self.shape, self.width, self._group = kind, torch.Size((rows, len(columns))), width, group
        block = width if kind == "int8" else BLOCK
        self._block, self._first = block, columns.start % block
        self._blocks = range(columns.start // block, -(-columns.stop // block))
        self.codes = torch.empty(0, dtype=torch.uint8, device=device)
        self.scales = torch.empty(0, device=device)

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """What is held."""
        return self.codes, self.scales

    @property
    def _whole_blocks(self) -> bool:
        return not self._first and not self.shape[1] % self._block

    @torch.no_grad()
    def copy_(self, values: Tensor) -> QuantizedMatrix:
        """Takes values [O, I] of whatever dtype. Collective over the group where a block is cut."""
        assert values.shape == self.shape, (values.shape, self.shape)
        device = self.codes.device
        x = values.to(device, torch.float32)
        largest = self._shared(self._in_blocks(x).abs().amax(-1))
        if self.kind == "int8":
            self.scales = largest / 127
            self.codes = (x / self._spread(torch.where(self.scales == 0, 1.0, self.scales))).round_().to(torch.int8)
            return self
        self.scales = largest
        x = x / self._spread(torch.where(largest == 0, 1.0, largest))
        values_of_codes = torch.tensor(NF4, device=device)
        edges = (values_of_codes[1:] + values_of_codes[:-1]) / 2
        codes = torch.bucketize(x, edges, out_int32=True).to(torch.uint8)
        self.codes = codes[:, 0::2] << 4 | codes[:, 1::2]
        return self

    def _in_blocks(self, x: Tensor) -> Tensor:
        """[O, I] → [O, blocks, numbers of a block], with zeros where this part does not have all of a block."""
        after = len(self._blocks) * self._block - self._first - self.shape[1]
        return F.pad(x, (self._first, after)).unflatten(1, (len(self._blocks), self._block))

    def _shared(self, largest: Tensor) -> Tensor:
        """The largest numbers of blocks over all processes that have a part of them."""
        if self._group is None or (self.kind == "nf4" and not self.shape[1] % self._block):
            return largest
        whole = largest.new_zeros(self.shape[0], -(-self.width // self._block))
        whole[:, self._blocks.start : self._blocks.stop] = largest
        dist.all_reduce(whole, dist.ReduceOp.MAX, group=self._group)
        return whole[:, self._blocks.start : self._blocks.stop].contiguous()

    def _spread(self, scales: Tensor) -> Tensor:
        """Scales by block → by number, as a view [O, I] if the blocks are whole."""
        if scales.shape[1] == 1:
            return scales
        each = scales.repeat_interleave(self._block, dim=1)
        return each[:, self._first : self._first + self.shape[1]]

    def values(self, dtype: torch.dtype) -> Tensor:
        """[O, I]: the numbers that the codes stand for."""
        if self.kind == "int8":
            return (self.codes.float() * self._spread(self.scales)).to(dtype)
        if self.codes.is_cuda and self._whole_blocks and _has_bitsandbytes():
            return self._by_bitsandbytes(dtype)
        x = F.embedding(self.codes.int(), _pairs(self.codes.device)).flatten(1)
        if self._whole_blocks:
            return (x.unflatten(1, (-1, self._block)) * self.scales[:, :, None]).flatten(1).to(dtype)
        return (x * self._spread(self.scales)).to(dtype)

    def _by_bitsandbytes(self, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        code = torch.tensor(NF4, device=self.codes.device)
        state = QuantState(self.scales.flatten(), self.shape, code, BLOCK, "nf4", dtype)
        return dequantize_4bit(self.codes.view(-1, 1), state)


@cache
def _has_bitsandbytes() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


@cache
def _pairs(device: torch.device) -> Tensor:
    """fp32 [256, 2]: the two numbers that a byte of NF4 codes stands for, before they are scaled."""
    codes, values = torch.arange(256), torch.tensor(NF4)
    return torch.stack((values[codes >> 4], values[codes & 15]), dim=1).to(device)


class FrozenProduct(torch.autograd.Function):
    """x Wᵀ. Nothing but the codes is kept for backward, which makes the numbers once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: QuantizedMatrix) -> Tensor:
        """x [..., I] → [..., O]."""
        ctx.matrix = matrix
        return F.linear(x, matrix.values(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        """dy [..., O] → [..., I]."""
        return dy @ ctx.matrix.values(dy.dtype), None
