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
"""What the last stage hands to an objective: fp32 losses [b, s] (-log p of each label), or their weighted sum and they
without a gradient, if the objective is ``weighted_in_model``."""


@dataclass(frozen=True)
class Terms:
    """What one process found for one micro batch.

    total: differentiable, the sum over the units that this process counts; count: those units; stats: numbers that are
    summed over the job like ``total`` and reported divided by the count. All are scalars. A unit that several
    context-parallel ranks share, as a document, is counted by one of them.
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
        """Columns and facts that a batch must have."""

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of ``Terms.stats``, known beforehand because ranks without output take part in their sum."""

    @property
    def weighted_in_model(self) -> bool:
        """Whether the model may sum losses by the batch's weights itself, as the fused output loss does. Only where the
        gradient of each label's loss is its weight."""

    @property
    def loss_options(self) -> Mapping[str, float]:
        """Keywords of the loss operator, as ``label_smoothing``; empty where the output must be -log p."""

    def prepare(self, models: Mapping[str, Any], batches: Sequence[Batch]) -> Sequence[Batch]:
        """The micro batches of a step with what has to be known of all of them before the first."""

    def __call__(self, batch: Batch, groups: Groups, output: Output) -> Terms:
        """Terms of one micro batch, of which ``batch`` and ``output`` are this process's context shard."""
