"""Next-token prediction that says which loss each source of the data has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_parallel.data.batch import Batch
from llm_parallel.objectives.base import Output, Terms
from llm_parallel.objectives.likelihood import Likelihood
from llm_parallel.parallel.groups import Groups


@dataclass(frozen=True)
class LikelihoodBySource(Likelihood):
    """``Likelihood`` whose statistics are the loss of each source, ``loss/NAME``. The batch's column ``source`` holds
    the number of each label's source, in the order of ``sources``. Make it by ``by_source``."""

    sources: tuple[str, ...] = ()

    def __call__(self, batch: Batch, groups: Groups, output: Output) -> Terms:
        """See ``Objective``."""
        terms = super().__call__(batch, groups, output)
        losses = (output if isinstance(output, Tensor) else output[1]).detach()
        weighted, counted = losses * batch.weights, batch.weights != 0
        stats = {}
        for number, name in enumerate(self.sources):
            own = batch.columns["source"] == number  # no indexing by it, which would wait for a GPU
            stats[f"loss/{name}"] = torch.where(own, weighted, 0.0).sum()
            stats[f"labels/{name}"] = (counted & own).sum()
        return Terms(terms.total, terms.count, stats)


def by_source(sources: Sequence[str], label_smoothing: float = 0.0, z_loss: float = 0.0) -> Likelihood:
    """Next-token prediction with the loss of each source, where there are several."""
    if len(sources) < 2:
        return Likelihood(label_smoothing=label_smoothing, z_loss=z_loss)
    names = [(f"loss/{name}", f"labels/{name}") for name in sources]
    return LikelihoodBySource(
        reads=("source",),
        statistics=tuple(name for pair in names for name in pair),
        ratios=dict(names),
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        sources=tuple(sources),
    )
