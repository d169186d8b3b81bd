"""The loss of a critic: values of the text up to each token, compared with what was earned after it (Schulman et al.
2017, arXiv 1707.06347)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llm_parallel.data.batch import Batch
from llm_parallel.objectives.base import Output, Terms, Unweighted
from llm_parallel.parallel.groups import Groups


@dataclass(frozen=True)
class ClippedValue(Unweighted):
    """For every weighted label, with the model's value v at the token before it: max((v - R)^2, (clip(v, V - clip, V +
    clip) - R)^2) / 2. Columns of the batch: ``return``, R, and ``value``, V, the value before this round's first step.
    ``clip`` None: (v - R)^2 / 2."""

    clip: float | None = 0.2
    unit: Literal["token"] = "token"
    statistics: tuple[str, ...] = ("loss/value_avg", "val/clipfrac_avg", "val/mean", "val/error", "val/return")

    @property
    def reads(self) -> tuple[str, ...]:
        """See ``Objective``."""
        return ("return",) if self.clip is None else ("return", "value")

    @property
    def ratios(self) -> Mapping[str, str]:
        """See ``Objective``."""
        return {}

    def __call__(self, batch: Batch, groups: Groups, output: Output) -> Terms:
        """See ``Objective``. ``val/error`` is the mean of (v - R)^2."""
        assert isinstance(output, Tensor)
        used = batch.weights != 0
        earned = torch.where(used, batch.columns["return"], 0.0).to(output)
        plain = (output - earned) ** 2
        squares, acts = plain, torch.zeros_like(used)
        if self.clip is not None:
            before = torch.where(used, batch.columns["value"], 0.0).to(output)
            bounded = (before + (output - before).clamp(-self.clip, self.clip) - earned) ** 2
            squares, acts = torch.maximum(plain, bounded), bounded > plain
        numbers = (0.5 * squares, acts.to(output.dtype), output, plain, earned)
        stats = {name: torch.where(used, number.detach(), 0.0).sum() for name, number in zip(self.statistics, numbers)}
        total = torch.where(used, 0.5 * squares * batch.weights, 0.0).sum()
        return Terms(total, used.sum(), stats)
