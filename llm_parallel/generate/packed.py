"""A matrix in 8 or 4 bits and its product with activations on a CPU, by the C++ extension, or by torch's packed
products where it was not built.

The extension rounds activations as well, to 8 bits with a scale for each 32 numbers of a row, and multiplies whole
numbers, of which a processor does four times as many in an instruction. On an AMD EPYC (one thread) all int4 products
of SmolLM2-135M take 3 ms for one token and 12 ms for 16 then, instead of 7 and 59; what it adds to the rounding of the
weights is said when a model is loaded. torch's products take activations in bf16.

Shapes: T tokens of a pass, O outputs and I inputs of a matrix on this process.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from llm_parallel.generate import extension

GROUP = 32
"""Numbers of a row that share a scale in int4."""
MANY_TOKENS = 24
"""From so many tokens on, torch's product with an int8 matrix makes it bf16 first: for 3,072 x 576 numbers on an AMD
EPYC, 64 tokens take 0.72 ms instead of 1.44, and 16 tokens 0.38 instead of 0.36."""


class PackedMatrix:
    """A matrix [O, I] in 8 or 4 bits, to be called with x [T, I] in bf16."""

    def __init__(self, values: Tensor, bits: Literal[4, 8], group: dist.ProcessGroup | None = None) -> None:
        """group: the processes that hold the other columns, None if there are none."""
        self.bits, self.shape = bits, values.shape
        if bits == 8:
            codes, scales = _int8(values, group)
        else:
            codes, scales = _int4(values)
        self.native: Any = None
        if extension.is_built():
            self.codes = _blocks(codes) if bits == 8 else _interleaved(codes, scales)
            self.scales = scales.float() if bits == 8 else scales.new_empty(0)  # int4's lie among the codes
            self.native = extension.packed(bits, self.codes, self.scales, *self.shape)
        elif bits == 8:
            self.codes, self.scales = codes, scales
        else:
            self.codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
            self.scales = scales.transpose(0, 1).contiguous()

    @property
    def bytes(self) -> int:
        """Memory that the matrix takes."""
        return sum(x.numel() * x.element_size() for x in (self.codes, self.scales))

    def __call__(self, x_TI: Tensor) -> Tensor:
        if self.native is not None:
            return extension.multiplied(self.native, x_TI, self.shape[0])
        x_TI = x_TI.contiguous()
        if self.bits == 8:
            if x_TI.shape[0] >= MANY_TOKENS:
                return F.linear(x_TI, self.codes.to(x_TI.dtype)).mul_(self.scales)
            return torch._weight_int8pack_mm(x_TI, self.codes, self.scales)
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x_TI, self.codes, GROUP, self.scales)
        return out


def fits(weight: Tensor, bits: int) -> bool:
    """Whether a matrix of this shape can be packed."""
    rows, columns = weight.shape
    return columns % 32 == 0 and (bits == 8 or rows % 16 == 0)


def _int8(values: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Codes int8 [O, I] and scales bf16 [O]."""
    largest = values.abs().amax(1)
    if group is not None and group.size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    scales = (largest / 127).clamp(min=1e-30).bfloat16()
    codes = (values / scales.float().unsqueeze(1)).round_().clamp_(-127, 127)
    return codes.to(torch.int8), scales


def _int4(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 [O, I], and scale and offset of each group, bf16 [O, I/GROUP, 2]. A code c stands for
    (c - 8) · scale + offset, chosen for scale and offset as bf16 holds them."""
    grouped = values.unflatten(1, (-1, GROUP))
    low, high = grouped.amin(2), grouped.amax(2)
    scales = ((high - low) / 15).clamp(min=1e-30).bfloat16()
    offsets = (low + 8 * scales.float()).bfloat16()
    codes = (grouped - offsets.float().unsqueeze(2)).div_(scales.float().unsqueeze(2)).add_(8).round_().clamp_(0, 15)
    return codes.flatten(1).to(torch.uint8), torch.stack((scales, offsets), 2)


def _blocks(codes_OI: Tensor) -> Tensor:
    """int8 codes as the extension reads them: 128 stands for 0, and blocks of 16 rows are filled up with zeros."""
    rows = codes_OI.shape[0]
    codes = torch.full((-(-rows // 16) * 16, codes_OI.shape[1]), 128, dtype=torch.uint8)
    codes[:rows] = (codes_OI.to(torch.int16) + 128).to(torch.uint8)
    # [blocks, 16 rows, groups, 8 runs, 4 columns] → rows next to the columns of a run
    return codes.view(-1, 16, codes.shape[1] // GROUP, 8, 4).permute(0, 2, 3, 1, 4).contiguous()


def _interleaved(codes_OI: Tensor, scales_OG2: Tensor) -> Tensor:
    """int4 codes as the extension reads them, with the scales and offsets of a block's group behind its codes."""
    groups = codes_OI.shape[1] // GROUP
    # [blocks, 16 rows, groups, 4 pairs of runs, 2, 4 columns]
    pairs = codes_OI.view(-1, 16, groups, 4, 2, 4).permute(0, 2, 3, 4, 1, 5)
    codes = (pairs[:, :, :, 0] | (pairs[:, :, :, 1] << 4)).flatten(2)
    scales = scales_OG2.view(-1, 16, groups, 2).permute(0, 2, 3, 1).contiguous().view(torch.uint8).flatten(2)
    return torch.cat((codes, scales), 2).contiguous()
