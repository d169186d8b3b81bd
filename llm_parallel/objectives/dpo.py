"""Losses over pairs of a chosen and a rejected answer: direct preference optimization and its siblings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_parallel.data.batch import Batch
from llm_parallel.objectives.base import Output, Terms, Unweighted
from llm_parallel.objectives.documents import Answers, answers_of, counted_once
from llm_parallel.parallel.groups import Groups

PairLoss = Literal["sigmoid", "robust", "hinge", "ipo", "simpo", "orpo"]
REFERENCE_FREE = ("simpo", "orpo")
CERTAIN = -1e-6
"""Mean log-probability of a label that counts as the largest, so that the odds of an answer stay finite."""


@dataclass(frozen=True)
class DPO(Unweighted):
    """A loss of each pair, summed over pairs. Documents 2i and 2i + 1 of a row are the chosen and the rejected answer
    of a pair, each after its prompt; a pair in which one has no weighted label, as in padding, does not count.

    With g = log p - log q of an answer's weighted labels (p: the model, q: the reference model, whose log q of each
    label the batch's column ``reference`` holds), d = g(chosen) - g(rejected), and n labels of an answer:

    sigmoid: -(1 - e) log s(beta d) - e log s(-beta d), s the logistic function, e = ``label_smoothing`` (DPO, Rafailov
    et al. 2023, arXiv 2305.18290; with e over 0 conservative DPO, Mitchell 2023);
    robust: (-(1 - e) log s(beta d) + e log s(-beta d)) / (1 - 2 e), without bias if a share e of the labels is wrong
    (Chowdhury et al. 2024, arXiv 2403.00409);
    hinge: max(0, 1 - beta d) (SLiC, Zhao et al. 2023, arXiv 2305.10425);
    ipo: (d - 1 / (2 beta))^2 with g / n in place of g (Azar et al. 2023, arXiv 2310.12036, in the form that its authors
    confirmed to TRL's);
    simpo: -log s(beta (log p / n (chosen) - log p / n (rejected)) - gamma) (Meng et al. 2024, arXiv 2405.14734);
    orpo: -log p / n of the chosen answer - beta log s(log of the ratio of the odds p' / (1 - p') of both), p' = exp(log
    p / n) (Hong et al. 2024, arXiv 2403.07691).

    length_normalised: g / n in place of g in sigmoid, robust and hinge. sft_weight: of -log p / n of the chosen answer,
    which is added (Pang et al. 2024, arXiv 2404.19733).
    """

    beta: float = 0.1
    loss: PairLoss = "sigmoid"
    label_smoothing: float = 0.0
    length_normalised: bool = False
    sft_weight: float = 0.0
    gamma: float = 0.5
    unit: Literal["pair"] = "pair"
    statistics: tuple[str, ...] = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "nll_loss",
    )

    @property
    def reads(self) -> tuple[str, ...]:
        """See ``Objective``."""
        return ("documents",) if self.loss in REFERENCE_FREE else ("documents", "reference")

    def __call__(self, batch: Batch, groups: Groups, output: Output) -> Terms:
        """See ``Objective``. Rewards are beta g (reference-free: beta log p / n); ``nll_loss`` is -log p / n of the
        chosen answer."""
        assert isinstance(output, Tensor)
        answers = answers_of(batch, groups, output, "reference" in self.reads)
        chosen, rejected, counts, here = split_pairs(answers)
        nll = -(answers.logps * answers.per_token)[:, chosen]
        losses = self._losses(answers, chosen, rejected)
        if self.sft_weight:
            losses = losses + self.sft_weight * nll
        rewards = self.beta * (self._means(answers) if self.loss in REFERENCE_FREE else answers.gains).detach()
        margins = rewards[:, chosen] - rewards[:, rejected]
        numbers = (
            rewards[:, chosen],
            rewards[:, rejected],
            (margins > 0).to(here.dtype),
            margins,
            answers.logps[:, chosen].detach(),
            answers.logps[:, rejected].detach(),
            nll.detach(),
        )
        stats = {name: (values * here).sum() for name, values in zip(self.statistics, numbers)}
        return Terms(counted_once((losses * counts).sum(), groups), here.sum(), stats)

    def _means(self, answers: Answers) -> Tensor:
        return answers.logps * answers.per_token

    def _losses(self, answers: Answers, chosen: slice, rejected: slice) -> Tensor:
        """The loss of each pair, [b, pairs]."""
        if self.loss == "orpo":
            means = self._means(answers).clamp(max=CERTAIN)
            odds = means - log_of_rest(means)
            return -means[:, chosen] - self.beta * F.logsigmoid(odds[:, chosen] - odds[:, rejected])
        if self.loss == "simpo":
            means = self._means(answers)
            return -F.logsigmoid(self.beta * (means[:, chosen] - means[:, rejected]) - self.gamma)
        normalised = self.length_normalised or self.loss == "ipo"
        gains = answers.gains * answers.per_token if normalised else answers.gains
        difference = gains[:, chosen] - gains[:, rejected]
        if self.loss == "ipo":
            return (difference - 1.0 / (2.0 * self.beta)) ** 2
        if self.loss == "hinge":
            return torch.relu(1.0 - self.beta * difference)
        wrong = self.label_smoothing
        right_loss, wrong_loss = (F.logsigmoid(sign * self.beta * difference).neg() for sign in (1.0, -1.0))
        if self.loss == "robust":
            return ((1.0 - wrong) * right_loss - wrong * wrong_loss) / (1.0 - 2.0 * wrong)
        return (1.0 - wrong) * right_loss + wrong * wrong_loss if wrong else right_loss


def split_pairs(answers: Answers) -> tuple[slice, slice, Tensor, Tensor]:
    """Places of the chosen and of the rejected documents, and [b, pairs] 1 for a pair that counts, and that this
    process counts."""
    pairs = answers.exists.shape[1] // 2 * 2
    chosen, rejected = slice(0, pairs, 2), slice(1, pairs, 2)
    counts = (answers.exists[:, chosen] & answers.exists[:, rejected]).to(answers.here.dtype)
    return chosen, rejected, counts, counts * answers.here[:, chosen]


def log_of_rest(logs: Tensor) -> Tensor:
    """log(1 - exp(x)) for x below 0."""
    small = logs < -0.6931
    return torch.where(
        small,
        torch.log1p(-torch.exp(torch.where(small, logs, -1.0))),
        torch.log(-torch.expm1(torch.where(small, -0.1, logs))),
    )
