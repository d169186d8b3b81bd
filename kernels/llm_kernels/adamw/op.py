"""AdamW over lists of tensors (Loshchilov and Hutter 2017, arXiv 1711.05101)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llm_kernels import dispatch
from llm_kernels.adamw import ref
from llm_kernels.adamw.ref import AdamWStep


class Addresses:
    """Remembers where tensors lie, so that the table goes to the device only when one has moved."""

    def __init__(self) -> None:
        self._key: tuple[int, ...] = ()
        self._table: list[Tensor] = []
        self._aligned = False

    def of(self, columns: Sequence[Sequence[Tensor]]) -> tuple[list[Tensor], bool]:
        """The table's tensors, and whether all is aligned to 16."""
        from llm_kernels.adamw import kernel

        # With sizes: views of different lengths may begin at one address.
        key = (*(x.data_ptr() for column in columns for x in column), *(x.numel() for x in columns[0]))
        if key != self._key:
            table = kernel.make_table(columns)
            self._table = [table.addresses, table.sizes, table.chunk_tensor, table.chunk_number]
            self._key, self._aligned = key, table.aligned
        return self._table, self._aligned


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    numbers: AdamWStep,
    *,
    low: Sequence[Tensor] = (),
    scale: Tensor | None = None,
    skip: Tensor | None = None,
    addresses: Addresses | None = None,
    backend: str = "auto",
) -> None:
    """One AdamW step in place, in one launch for all tensors; bit for bit the same however they are grouped.

    params, exp_avgs, exp_avg_sqs: fp32, contiguous, on one device; grads: fp32 or bf16; low: bf16 or fp16 copies of the
    parameters that are written with the step, or none. scale: fp32 scalar on the device that gradients are multiplied
    by (one over the loss scale, times the clip factor: no value goes through the host); skip: scalar on the device,
    nothing is changed if it is not 0. addresses: kept by a caller that steps the same tensors again and again. Raises
    ValueError if lists or shapes do not match.
    """
    columns = [list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), *([list(low)] if low else [])]
    if not columns[0]:
        return
    _check(columns)
    if dispatch.backend_for(columns[0][0], backend) == "torch":
        ref.adamw_(params, grads, exp_avgs, exp_avg_sqs, low, numbers, scale, skip)
        return
    table, aligned = (addresses or Addresses()).of(columns)
    scalars = [
        numbers.decay, numbers.beta2, 1.0 - numbers.beta1, 1.0 - numbers.beta2, numbers.step_size,
        numbers.root_correction, numbers.eps,
    ]  # fmt: skip
    torch.ops.llm_kernels.adamw_(*columns[:4], list(low), scale, skip, table, aligned, scalars)


def _check(columns: Sequence[Sequence[Tensor]]) -> None:
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "low")
    for name, column in zip(names, columns):
        if len(column) != len(columns[0]):
            raise ValueError(f"{name} has {len(column)} tensors, params has {len(columns[0])}")
        for index, (x, p) in enumerate(zip(column, columns[0])):
            if x.numel() != p.numel() or not x.is_contiguous() or x.device != p.device:
                raise ValueError(f"{name}[{index}] is {tuple(x.shape)} on {x.device}; it must match params, contiguous")
            if name not in ("grads", "low") and x.dtype != torch.float32:
                raise ValueError(f"{name}[{index}] is {x.dtype}; it must be float32")
            if x.dtype != column[0].dtype:
                raise ValueError(f"{name} mixes {column[0].dtype} and {x.dtype}; one call takes one of them")


def _step(params, grads, exp_avgs, exp_avg_sqs, low, scale, skip, table, aligned, scalars) -> None:
    from llm_kernels.adamw import kernel

    addresses, sizes, owners, numbers = table
    dtypes = grads[0].dtype, low[0].dtype if low else None
    kernel.launch(kernel.Table(addresses, sizes, owners, numbers, aligned), dtypes, scale, skip, scalars)


dispatch.define(
    "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] low, "
    "Tensor? scale, Tensor? skip, Tensor[] table, bool aligned, float[] scalars) -> ()",
    _step,
    lambda *_: None,
)
