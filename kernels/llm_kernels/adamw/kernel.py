"""AdamW over many fp32 tensors in one launch.

    g = grad * scale;  m += (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g^2
    p = decay p - step_size m / (sqrt(v) / root_correction + eps);  low = p rounded

Every program steps one chunk of one tensor, whose addresses it reads from a table. Computed in fp32, element by
element, so the result does not depend on how tensors are divided into chunks. Bytes per element: p, m, v read and
written (24), the gradient read (4 or 2), the low-precision copy written (2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 16384
BLOCK = 1024
NUM_WARPS = 4
FIELDS = 5


@triton.jit
def _pointer(addresses_ptr, field: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(addresses_ptr + field).to(tl.pointer_type(dtype))
    if ALIGNED:
        # Four elements a thread for every dtype. If 2-byte tensors were accessed 16 bytes at a time, a thread would
        # hold eight elements of them, and fp32 tensors would need a change of layout through shared memory, with two
        # barriers, before each store.
        pointer = tl.multiple_of(pointer, 4 * dtype.primitive_bitwidth // 8)
    return pointer


@triton.jit
def _adamw_kernel(
    addresses_ptr,  # int64 [tensors, 5]: p, grad, m, v, low
    sizes_ptr,  # int64 [tensors]
    chunk_tensor_ptr,  # int32 [chunks]
    chunk_number_ptr,  # int32 [chunks], the chunk's number within its tensor
    scale_ptr,
    skip_ptr,
    decay,
    beta2,
    one_minus_beta1,
    one_minus_beta2,
    step_size,
    root_correction,
    eps,
    GRAD: tl.constexpr,
    LOW: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if skip_ptr is not None:  # noqa: SIM102 - the outer test is the compiler's, the inner one the GPU's
        if tl.load(skip_ptr) != 0:
            return
    program = tl.program_id(0)
    tensor = tl.load(chunk_tensor_ptr + program).to(tl.int64)
    start = tl.load(chunk_number_ptr + program).to(tl.int64) * CHUNK
    size = tl.load(sizes_ptr + tensor)
    row_ptr = addresses_ptr + tensor * 5
    p_ptr = _pointer(row_ptr, 0, tl.float32, ALIGNED)
    grad_ptr = _pointer(row_ptr, 1, GRAD, ALIGNED)
    m_ptr = _pointer(row_ptr, 2, tl.float32, ALIGNED)
    v_ptr = _pointer(row_ptr, 3, tl.float32, ALIGNED)
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float32)
    if ALIGNED:
        size = tl.multiple_of(size, 16)  # so the mask is the same for a whole vector
    for offset in range(0, CHUNK, BLOCK):
        at = start + offset + tl.arange(0, BLOCK)
        mask = at < size
        g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32) * scale
        m = tl.load(m_ptr + at, mask=mask, other=0.0)
        v = tl.load(v_ptr + at, mask=mask, other=0.0)
        p = tl.load(p_ptr + at, mask=mask, other=0.0)
        m += one_minus_beta1 * (g - m)
        v = v * beta2 + one_minus_beta2 * g * g  # multiplied from the left: g * g alone may overflow
        denominator = tl.sqrt_rn(v) / root_correction + eps
        p = p * decay - step_size * m / denominator
        tl.store(m_ptr + at, m, mask=mask)
        tl.store(v_ptr + at, v, mask=mask)
        tl.store(p_ptr + at, p, mask=mask)
        if LOW is not None:
            low_ptr = _pointer(row_ptr, 4, LOW, ALIGNED)
            tl.store(low_ptr + at, p.to(LOW), mask=mask)


@dataclass(frozen=True)
class Table:
    """Addresses, sizes and chunks of the tensors of one launch, on the device. ``aligned``: all addresses and sizes are
    multiples of 16."""

    addresses: Tensor
    sizes: Tensor
    chunk_tensor: Tensor
    chunk_number: Tensor
    aligned: bool


def make_table(columns: Sequence[Sequence[Tensor]]) -> Table:
    """The table for ``columns``: lists of equal length of p, grad, m, v and, if there are copies, low."""
    first = columns[0]
    device = first[0].device
    rows = [[x.data_ptr() for x in row] + [0] * (FIELDS - len(columns)) for row in zip(*columns)]
    sizes = [x.numel() for x in first]
    counts = torch.tensor([-(-size // CHUNK) for size in sizes])
    owner = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    number = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
    aligned = all(value % 16 == 0 for row in rows for value in row) and all(size % 16 == 0 for size in sizes)
    return Table(
        torch.tensor(rows, dtype=torch.int64).to(device),
        torch.tensor(sizes, dtype=torch.int64).to(device),
        owner.to(device, torch.int32),
        number.to(device, torch.int32),
        aligned,
    )


def launch(
    table: Table,
    dtypes: tuple[torch.dtype, torch.dtype | None],
    scale: Tensor | None,
    skip: Tensor | None,
    scalars: Sequence[float],
) -> None:
    """One step on the tensors of the table. dtypes: of the gradients, and of the low-precision copies (None if there
    are none). scalars: decay, beta2, 1 - beta1, 1 - beta2, step size, root of the second bias correction, eps."""
    kinds = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    grad, low = dtypes
    _adamw_kernel[(table.chunk_tensor.numel(),)](
        table.addresses,
        table.sizes,
        table.chunk_tensor,
        table.chunk_number,
        scale,
        skip,
        *scalars,
        GRAD=kinds[grad],
        LOW=None if low is None else kinds[low],
        ALIGNED=table.aligned,
        CHUNK=CHUNK,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
