"""Next-token prediction: pretraining, and supervised fine-tuning by weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from llm_parallel.data.batch import Batch
from llm_parallel.objectives.base import Output, Terms
from llm_parallel.parallel.groups import Groups


@dataclass(frozen=True)
class Likelihood:
    """Sum of weight · (-log p) over the labels; the count is that of labels whose weight is not 0.

    label_smoothing: share of a label's probability that goes to the whole vocabulary (Szegedy et al. 2016, arXiv
    1512.00567); z_loss: weight of the squared log of the softmax's denominator (Chowdhery et al. 2022, arXiv
    2204.02311)."""

    unit: Literal["token"] = "token"
    reads: tuple[str, ...] = ()
    statistics: tuple[str, ...] = ()
    ratios: Mapping[str, str] = field(default_factory=dict)
    weighted_in_model: bool = True
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    @property
    def loss_options(self) -> Mapping[str, float]:
        """See ``Objective``."""
        options = {"label_smoothing": self.label_smoothing, "z_loss": self.z_loss}
        return {name: value for name, value in options.items() if value}

    def prepare(self, models: Mapping[str, Any], batches: Sequence[Batch]) -> Sequence[Batch]:
        """The batches as they are."""
        return batches

    def __call__(self, batch: Batch, groups: Groups, output: Output) -> Terms:
        """See ``Objective``."""
        total = (output * batch.weights).sum() if isinstance(output, Tensor) else output[0]
        return Terms(total, batch.weights.count_nonzero())
