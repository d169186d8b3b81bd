"""What an objective is. It knows neither models nor training: it turns the last stage's output into a sum to minimise
and a count to divide by, so that the gradient is the same in every layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from torch import Tensor

from llm_parallel.data.batch import Batch
from llm_parallel.parallel.groups import Groups

Output: TypeAlias = "Tensor | tuple[Tensor, Tensor]"
"""What the last stage hands to an objective: fp32 losses [b, s] (-log p of each label); of a model with a value head
fp32 values [b, s], each of the text up to and with a token; if the objective is ``weighted_in_model``, the losses'
weighted sum and the losses without gradient; if its ``loss_options`` ask for ``entropy``, losses and entropies."""


@dataclass(frozen=True)
class Terms:
    """The result of an objective for one micro batch on one process.

    total: the differentiable sum over the units that this process counts; count: how many these are; stats: numbers
    that are summed over all processes like ``total`` and reported divided by the count. All are scalars. A unit that
    several context-parallel ranks share, such as a document, is counted by one of them.
    """

    total: Tensor
    count: Tensor
    stats: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """What a training step minimises: the sum of all totals divided by the sum of all counts."""

    @property
    def unit(self) -> Literal["token", "document", "pair", "group"]:
        """What ``count`` counts, and the unit of the reported loss."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Columns and facts that a batch must have, and ``documents`` if it must have those."""

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of ``Terms.stats``, known beforehand because ranks without output take part in their sum."""

    @property
    def ratios(self) -> Mapping[str, str]:
        """Statistics that are reported divided by another statistic, by name, and not by the count; the divisors are
        not reported."""

    @property
    def weighted_in_model(self) -> bool:
        """Whether the model may sum losses by the batch's weights itself, as the fused output loss does. True only
        where ``total`` is that weighted sum, so that its gradient by each label's loss is the weight."""

    @property
    def loss_options(self) -> Mapping[str, float]:
        """Keyword arguments of the loss operator, such as ``label_smoothing``; empty where the output must be exactly
        -log p."""

    def prepare(self, models: Mapping[str, Any], batches: Sequence[Batch]) -> Sequence[Batch]:
        """Called once for each step; returns its micro batches, completed by whatever must be computed over all of them
        before the first one runs."""

    def __call__(self, batch: Batch, groups: Groups, output: Output) -> Terms:
        """Terms of one micro batch, of which ``batch`` and ``output`` are this process's context shard."""


class Unweighted:
    """The members of ``Objective`` that most objectives over documents share: they need the model's output as it is,
    weigh it themselves, and compute nothing before the first micro batch."""

    @property
    def ratios(self) -> Mapping[str, str]:
        """See ``Objective``."""
        return {}

    @property
    def weighted_in_model(self) -> bool:
        """See ``Objective``."""
        return False

    @property
    def loss_options(self) -> Mapping[str, float]:
        """See ``Objective``."""
        return {}

    def prepare(self, models: Mapping[str, Any], batches: Sequence[Batch]) -> Sequence[Batch]:
        """The batches as they are."""
        return batches


def reported(objective: Objective, totals: Mapping[str, float], count: float) -> dict[str, float]:
    """An objective's statistics as they are reported, from their sums over all processes. A ratio whose divisor is 0,
    as that of a kind of data that a step does not contain, is left out."""
    divisors = {name: totals[other] for name, other in objective.ratios.items()}
    hidden = set(objective.ratios.values())
    found = {name: (total, divisors.get(name, max(count, 1))) for name, total in totals.items() if name not in hidden}
    return {name: total / divisor for name, (total, divisor) in found.items() if divisor}
