"""Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv 2402.01306): answers that were liked or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from llm_parallel.data.batch import Batch
from llm_parallel.objectives.base import Output, Terms, Unweighted
from llm_parallel.objectives.documents import answers_of, counted_once, fact
from llm_parallel.parallel.groups import Groups

Divergence = Callable[[Mapping[str, Any], Sequence[Batch]], float]
"""Mean of ``Gain`` over the mismatched answers of all replicas' batches of a step; collective."""


@dataclass(frozen=True)
class KTO(Unweighted):
    """Sum over documents of weight (1 - s(beta (g - z))) for those that were liked and weight (1 - s(beta (z - g))) for
    the others, with s the logistic function and g = log p - log q of an answer's weighted labels.

    The batch's column ``reference`` holds log q of each label, its fact ``score`` what is over 0.5 for liked answers.
    z, which has no gradient, is the divergence of the model from the reference, at least 0: the mean of g over answers
    to other prompts (``Batch.mismatched``), over the whole global batch, so that it does not depend on the layout.
    ``divergence`` computes that mean.
    """

    divergence: Divergence
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    unit: Literal["document"] = "document"
    reads: tuple[str, ...] = ("documents", "reference", "score", "mismatched")
    statistics: tuple[str, ...] = (
        "rewards/chosen",
        "rewards/rejected",
        "logps/chosen",
        "logps/rejected",
        "kl",
        "liked",
        "disliked",
    )

    @property
    def ratios(self) -> Mapping[str, str]:
        """See ``Objective``: means over the liked, and over the other answers."""
        return {
            "rewards/chosen": "liked",
            "logps/chosen": "liked",
            "rewards/rejected": "disliked",
            "logps/rejected": "disliked",
        }

    def prepare(self, models: Mapping[str, Any], batches: Sequence[Batch]) -> Sequence[Batch]:
        """The batches with z as the fact ``kl`` of each document."""
        z = max(self.divergence(models, batches), 0.0)
        return [with_kl(batch, z) for batch in batches]

    def __call__(self, batch: Batch, groups: Groups, output: Output) -> Terms:
        """See ``Objective``."""
        assert isinstance(output, Tensor)
        answers = answers_of(batch, groups, output, reference=True)
        liked = fact(batch, "score", output) > 0.5
        z = fact(batch, "kl", output)
        distance = self.beta * (answers.gains - z)
        losses = torch.where(
            liked,
            self.desirable_weight * (1.0 - torch.sigmoid(distance)),
            self.undesirable_weight * (1.0 - torch.sigmoid(-distance)),
        )
        rewards, logps = (self.beta * answers.gains).detach(), answers.logps.detach()
        mine, others = answers.here * liked, answers.here * ~liked
        stats = {
            "rewards/chosen": (rewards * mine).sum(),
            "rewards/rejected": (rewards * others).sum(),
            "logps/chosen": (logps * mine).sum(),
            "logps/rejected": (logps * others).sum(),
            "kl": (z * answers.here).sum(),
            "liked": mine.sum(),
            "disliked": others.sum(),
        }
        total = torch.where(answers.exists, losses, 0.0).sum()
        return Terms(counted_once(total, groups), answers.here.sum(), stats)


def with_kl(batch: Batch, z: float) -> Batch:
    """The batch with the fact ``kl``."""
    assert batch.documents is not None
    kl = torch.full((len(batch.tokens), batch.documents.most), z, dtype=torch.float32, device=batch.weights.device)
    return replace(batch, facts={**batch.facts, "kl": kl})


@dataclass(frozen=True)
class Gain(Unweighted):
    """Sum over documents of g = log p - log q of their weighted labels; its mean over samples of p is the divergence of
    p from q."""

    unit: Literal["document"] = "document"
    reads: tuple[str, ...] = ("documents", "reference")
    statistics: tuple[str, ...] = ()

    def __call__(self, batch: Batch, groups: Groups, output: Output) -> Terms:
        """See ``Objective``."""
        assert isinstance(output, Tensor)
        answers = answers_of(batch, groups, output, reference=True)
        return Terms(counted_once(answers.gains.sum(), groups), answers.here.sum())
