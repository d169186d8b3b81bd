"""Reward model: a value of a whole answer, learned from pairs (Bradley and Terry 1952; Ouyang et al. 2022, arXiv
2203.02155)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_parallel.data.batch import Batch
from llm_parallel.objectives.base import Output, Terms, Unweighted
from llm_parallel.objectives.documents import counted_once, fact, sum_by_document
from llm_parallel.parallel.groups import Groups


@dataclass(frozen=True)
class RewardPairs(Unweighted):
    """-log s(v(chosen) - v(rejected) - margin), summed over pairs, with s the logistic function and v the model's value
    of an answer, plus ``center_weight`` (v(chosen) + v(rejected))^2 (Eisenstein et al. 2023, arXiv 2312.09244).

    Documents 2i and 2i + 1 of a row are a pair. The batch's weights are 1 at the one token of a document at which its
    value is read, the last one, and 0 elsewhere. ``margins``: the fact ``margin`` of the chosen document says by how
    much its value must be larger (Touvron et al. 2023, arXiv 2307.09288); else the margin is 0.
    """

    center_weight: float = 0.0
    margins: bool = False
    unit: Literal["pair"] = "pair"
    statistics: tuple[str, ...] = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")

    @property
    def reads(self) -> tuple[str, ...]:
        """See ``Objective``."""
        return ("documents", "margin") if self.margins else ("documents",)

    def __call__(self, batch: Batch, groups: Groups, output: Output) -> Terms:
        """See ``Objective``."""
        assert isinstance(output, Tensor)
        values, exists = document_values(batch, groups, output)
        pairs = values.shape[1] // 2 * 2
        chosen, rejected = values[:, 0:pairs:2], values[:, 1:pairs:2]
        counts = (exists[:, 0:pairs:2] & exists[:, 1:pairs:2]).to(values.dtype)
        gap = chosen - rejected
        margin = fact(batch, "margin", output)[:, 0:pairs:2] if self.margins else 0.0
        losses = -F.logsigmoid(gap - margin)
        if self.center_weight:
            losses = losses + self.center_weight * (chosen + rejected) ** 2
        here = counts * float(groups.at.cp == 0)
        numbers = (chosen, rejected, (gap > 0).to(here.dtype), gap)
        stats = {name: (number.detach() * here).sum() for name, number in zip(self.statistics, numbers)}
        return Terms(counted_once((losses * counts).sum(), groups), here.sum(), stats)


def document_values(batch: Batch, groups: Groups, values: Tensor) -> tuple[Tensor, Tensor]:
    """Of values [b, s] the one of each document, [b, d], where its only weighted token is; and whether it has one."""
    used = batch.weights != 0
    parts = torch.stack((torch.where(used, values, 0.0), used.to(values.dtype)))
    sums = sum_by_document(parts, batch, groups)
    return sums[0], sums[1] > 0
