"""Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_parallel.data.batch import Batch
from llm_parallel.objectives.base import Output, Terms
from llm_parallel.objectives.documents import counted_once, sum_by_document
from llm_parallel.parallel.groups import Groups


@dataclass(frozen=True)
class DPO:
    """-log sigmoid(beta ((log p(chosen) - log q(chosen)) - (log p(rejected) - log q(rejected)))), summed over pairs.

    Documents 2i and 2i + 1 of a row are the chosen and the rejected answer of a pair, each after its prompt; a pair
    without any weighted label, as in padding, does not count. p is the probability that the model gives to a document's
    weighted labels, q that of the reference model; the batch's column ``reference`` holds log q of each label.
    """

    beta: float = 0.1
    unit: Literal["pair"] = "pair"
    reads: tuple[str, ...] = ("documents", "reference")
    statistics: tuple[str, ...] = ("accuracy", "chosen_reward", "rejected_reward")
    ratios: Mapping[str, str] = field(default_factory=dict)
    weighted_in_model: bool = False
    loss_options: Mapping[str, float] = field(default_factory=dict)

    def prepare(self, models: Mapping[str, Any], batches: Sequence[Batch]) -> Sequence[Batch]:
        """The batches as they are."""
        return batches

    def __call__(self, batch: Batch, groups: Groups, output: Output) -> Terms:
        """See ``Objective``. Rewards are beta (log p - log q)."""
        assert isinstance(output, Tensor)
        gained = torch.where(batch.weights != 0, (-output - batch.columns["reference"]) * batch.weights, 0.0)
        sums = sum_by_document(torch.stack((gained, (batch.weights != 0).to(gained.dtype))), batch, groups)
        rewards, weighted = self.beta * sums[0], sums[1] > 0
        pairs = rewards.shape[1] // 2 * 2
        chosen, rejected = rewards[:, 0:pairs:2], rewards[:, 1:pairs:2]
        counts = (weighted[:, 0:pairs:2] & weighted[:, 1:pairs:2]).float()
        total = (-F.logsigmoid(chosen - rejected) * counts).sum()
        here = counts * float(groups.at.cp == 0)
        stats = {
            "accuracy": ((chosen > rejected) * here).sum(),
            "chosen_reward": (chosen.detach() * here).sum(),
            "rejected_reward": (rejected.detach() * here).sum(),
        }
        return Terms(counted_once(total, groups), here.sum(), stats)
