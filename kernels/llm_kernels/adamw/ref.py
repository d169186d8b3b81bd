"""AdamW in plain torch (Loshchilov and Hutter 2017, arXiv 1711.05101), tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AdamWStep:
    """The hyperparameters of one step, and its number, which counts from 1. Weight decay is decoupled and multiplied by
    the learning rate."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int

    @property
    def decay(self) -> float:
        """The factor by which weight decay multiplies a parameter before the update."""
        return 1.0 - self.lr * self.weight_decay

    @property
    def step_size(self) -> float:
        """The learning rate divided by the first moment's bias correction."""
        return self.lr / (1.0 - self.beta1**self.step)

    @property
    def root_correction(self) -> float:
        """The square root of the second moment's bias correction."""
        return math.sqrt(1.0 - self.beta2**self.step)


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    low: Sequence[Tensor],
    numbers: AdamWStep,
    scale: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    """One step on every tensor, in place; see op.adamw_ for the arguments."""
    for index, (p, g, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs)):
        # The device chooses between old and new values, so that the host need not read ``skip``.
        kept = [] if skip is None else [(x, x.clone()) for x in (p, m, v, *low[index : index + 1])]
        g = g.to(p.dtype)
        if scale is not None:
            g = g * scale
        m.lerp_(g, 1.0 - numbers.beta1)
        v.mul_(numbers.beta2).addcmul_(g, g, value=1.0 - numbers.beta2)
        denominator = v.sqrt().div_(numbers.root_correction).add_(numbers.eps)
        p.mul_(numbers.decay).addcdiv_(m, denominator, value=-numbers.step_size)
        if low:
            low[index].copy_(p)
        for x, old in kept:
            assert skip is not None
            x.copy_(torch.where(skip != 0, old, x))
