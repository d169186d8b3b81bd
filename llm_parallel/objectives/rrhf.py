"""Rank responses to align with human feedback (RRHF; Yuan et al. 2023, arXiv 2304.05302)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llm_parallel.data.batch import Batch
from llm_parallel.objectives.base import Output, Terms, Unweighted
from llm_parallel.objectives.documents import answers_of, counted_once, fact
from llm_parallel.parallel.groups import Groups


@dataclass(frozen=True)
class RRHF(Unweighted):
    """For each group of answers to a prompt, with m = log p / n of an answer's n weighted labels: the sum over all
    pairs with score i < score j of max(0, m_i - m_j), plus ``best_weight`` times -log p of the answer with the best
    score (the first of equals).

    Facts of the batch: ``group``, the number of a document's group within its row, from 1, and ``score``.
    ``mean_best``: -log p / n of the best answer instead, as the paper's program has it; the paper has the sum.
    """

    best_weight: float = 1.0
    mean_best: bool = False
    unit: Literal["group"] = "group"
    reads: tuple[str, ...] = ("documents", "group", "score")
    statistics: tuple[str, ...] = (
        "rank_loss",
        "best_loss",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "compared",
    )

    @property
    def ratios(self) -> dict[str, str]:
        """See ``Objective``: of all pairs with different scores."""
        return {"rewards/accuracies": "compared", "rewards/margins": "compared"}

    def __call__(self, batch: Batch, groups: Groups, output: Output) -> Terms:
        """See ``Objective``. ``rewards/accuracies`` and ``rewards/margins`` compare m of the answers of each pair."""
        assert isinstance(output, Tensor)
        answers = answers_of(batch, groups, output, reference=False)
        means = answers.logps * answers.per_token
        number, score = fact(batch, "group", output), fact(batch, "score", output)
        together = (number[:, :, None] == number[:, None, :]) & answers.exists[:, :, None] & answers.exists[:, None, :]
        worse = together & (score[:, :, None] < score[:, None, :])
        gaps = means[:, None, :] - means[:, :, None]  # of the better one, j, over the worse one, i
        ranks = torch.where(worse, torch.relu(-gaps), 0.0)
        places = torch.arange(score.shape[1], device=score.device)
        earlier = together & (score[:, :, None] == score[:, None, :]) & (places[None, :] < places[:, None])
        best = answers.exists & ~(worse | earlier).any(2)
        best_loss = -(means if self.mean_best else answers.logps) * best
        here = float(groups.at.cp == 0)
        compared = worse * here
        stats = {
            "rank_loss": ranks.detach().sum() * here,
            "best_loss": best_loss.detach().sum() * here,
            "rewards/accuracies": ((gaps.detach() > 0) * compared).sum(),
            "rewards/margins": (gaps.detach() * compared).sum(),
            "logps/chosen": (answers.logps.detach() * best).sum() * here,
            "compared": compared.sum(),
        }
        total = ranks.sum() + self.best_weight * best_loss.sum()
        return Terms(counted_once(total, groups), (best * answers.here).sum(), stats)
