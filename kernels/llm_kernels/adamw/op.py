"""AdamW over lists of tensors (Loshchilov and Hutter 2017, arXiv 1711.05101)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llm_kernels import dispatch
from llm_kernels.adamw import ref
from llm_kernels.adamw.ref import AdamWStep

if TYPE_CHECKING:  # the kernel imports Triton
    from llm_kernels.adamw.kernel import Table


class Addresses:
    """Caches the kernel's table of addresses, so that it is copied to the device only when a tensor has moved."""

    def __init__(self) -> None:
        self._key: list[Any] = []
        self._table: Table | None = None

    def of(self, columns: Sequence[Sequence[Tensor]], sizes: list[int]) -> Table:
        """The kernel's table for these tensors. ``sizes``: number of elements of each tensor of a column."""
        from llm_kernels.adamw import kernel

        # Sizes are part of the key, because views of different lengths may begin at the same address.
        key: list[Any] = [sizes, *([x.data_ptr() for x in column] for column in columns)]
        if self._table is None or key != self._key:
            self._key, self._table = key, kernel.make_table(columns)
        return self._table


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
    """One AdamW step in place, in one launch for all tensors. How tensors are grouped into calls changes no bit.

    params, exp_avgs, exp_avg_sqs: fp32, contiguous, on one device. grads: fp32, bf16 or fp16. low: bf16 or fp16 tensors
    to which the step also writes the rounded parameters, or none. scale: fp32 scalar on the device by which gradients
    are multiplied (for example the clip factor over the loss scale, which the host then need not read). skip: scalar on
    the device; if it is not 0, nothing is changed. addresses: a cache that a caller passes again at every step of the
    same tensors. fp64 parameters and moments, or fp64 gradients, run the reference. Parameters that require a gradient
    are written only under torch.no_grad(), as by any optimizer. Raises ValueError if lists, shapes or dtypes do not
    match.
    """
    columns = [list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), *([list(low)] if low else [])]
    if not columns[0]:
        return
    sizes = _check(columns)
    if dispatch.backend_for(columns[0][0], backend, columns[1][0], *(columns[4][:1] if low else ())) == "torch":
        ref.adamw_(params, grads, exp_avgs, exp_avg_sqs, low, numbers, scale, skip)
        return
    scalars = [
        numbers.decay, numbers.beta2, 1.0 - numbers.beta1, 1.0 - numbers.beta2, numbers.step_size,
        numbers.root_correction, numbers.eps,
    ]  # fmt: skip
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        torch.ops.llm_kernels.adamw_(*columns[:4], list(low), scale, skip, scalars)
    else:  # not through torch.library, where passing a thousand tensors costs a millisecond
        _launch(columns, (addresses or Addresses()).of(columns, sizes), scale, skip, scalars)


def _check(columns: Sequence[list[Tensor]]) -> list[int]:
    """The number of elements of each parameter. Raises ValueError if the lists do not match each other."""
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "low")
    params = columns[0]
    sizes, device, state = [p.numel() for p in params], params[0].device, params[0].dtype
    devices = [params[0].get_device()] * len(params)
    if state not in (torch.float32, torch.float64):
        raise ValueError(
            f"params[0] is {state}; AdamW steps float32 parameters (float64 too with the torch back end); bf16 or "
            "fp16 copies of them are passed as low"
        )
    for name, column in zip(names, columns):
        if len(column) != len(params):
            raise ValueError(f"{name} has {len(column)} tensors, params has {len(params)}")
        # Compares whole lists first: with hundreds of tensors, a loop in Python costs more than the launch.
        if [x.numel() for x in column] != sizes or not all(map(Tensor.is_contiguous, column)):
            index = next(i for i, x in enumerate(column) if x.numel() != sizes[i] or not x.is_contiguous())
            raise ValueError(
                f"{name}[{index}] is {tuple(column[index].shape)} with strides {column[index].stride()}; it must be "
                f"contiguous and have as many elements as params[{index}], {tuple(params[index].shape)}"
            )
        if [x.get_device() for x in column] != devices:
            index = next(i for i, x in enumerate(column) if x.device != device)
            raise ValueError(f"{name}[{index}] is on {column[index].device}, params[0] on {device}")
        dtypes = {x.dtype for x in column}
        if len(dtypes) > 1:
            raise ValueError(f"{name} mixes {' and '.join(sorted(map(str, dtypes)))}; one call takes one dtype")
        if name in ("exp_avgs", "exp_avg_sqs") and dtypes != {state}:
            raise ValueError(f"{name}[0] is {column[0].dtype}; it must be {state} as the parameters are")
        if name != "grads" and torch.is_grad_enabled() and any(x.requires_grad for x in column):
            raise ValueError(
                f"{name} requires a gradient and would be written in place; call adamw_ in torch.no_grad()"
            )
    return sizes


def _launch(
    columns: Sequence[list[Tensor]],
    table: Table,
    scale: Tensor | None,
    skip: Tensor | None,
    scalars: Sequence[float],
) -> None:
    from llm_kernels.adamw import kernel

    dtypes = columns[1][0].dtype, columns[4][0].dtype if len(columns) > 4 else None
    kernel.launch(table, dtypes, scale, skip, scalars)
    # Lets autograd raise in a backward that saved one of these tensors before it was changed.
    torch.autograd.graph.increment_version([x for i, column in enumerate(columns) if i != 1 for x in column])


# Tables for calls that pass no Addresses, such as those of a compiled graph, by first address and number of tensors.
_REMEMBERED = 64
_tables: dict[tuple[int, int], Addresses] = {}


def _step(params, grads, exp_avgs, exp_avg_sqs, low, scale, skip, scalars) -> None:
    columns = [params, grads, exp_avgs, exp_avg_sqs, *([low] if low else [])]
    if len(_tables) >= _REMEMBERED:
        _tables.clear()
    addresses = _tables.setdefault((params[0].data_ptr(), len(params)), Addresses())
    _launch(columns, addresses.of(columns, [p.numel() for p in params]), scale, skip, scalars)


dispatch.define(
    "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] low, "
    "Tensor? scale, Tensor? skip, float[] scalars) -> ()",
    _step,
    lambda *_: None,
)
