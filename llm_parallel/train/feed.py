"""The micro batches of one process, in the order in which the run consumes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import torch

from llm_parallel.config.tree import RunConfig
from llm_parallel.data.loader import Batch, MicroBatchLoader
from llm_parallel.data.samples import SampleSource
from llm_parallel.parallel.groups import Groups
from llm_parallel.train.step_settings import global_batch_size


def training_samples(config: RunConfig, groups: Groups, consumed: int) -> Iterator[range]:
    """Sample numbers of each micro batch of this replica from ``consumed`` on, without end."""
    while True:
        size = global_batch_size(config.train, consumed)
        yield from groups.layout.micro_batches(consumed, size, groups.at.dp)
        consumed += size


def open_training_data(config: RunConfig, groups: Groups, consumed: int) -> MicroBatchLoader:
    """Loader of this replica's micro batches, reading ahead in the background."""
    source = SampleSource(config.data, config.seed, "train", config.model.vocab_size)
    numbers = training_samples(config, groups, consumed)
    return MicroBatchLoader(source, numbers, groups.platform.device, config.data.prefetch_batches)


def evaluation_batches(config: RunConfig, groups: Groups) -> list[Batch]:
    """This replica's held-out micro batches: the same samples in every layout. Micro batches that only fill up the
    replicas' or the interleaved schedule's count have an empty loss mask. Empty if there is no held-out data."""
    data = config.data
    if not data.eval and not data.eval_fraction:
        return []
    layout, wanted = groups.layout, config.train.eval_samples
    unit = layout.micro_batch_size * layout.dp * (layout.pp if layout.vpp > 1 else 1)
    filled = -(-wanted // unit) * unit
    numbers = list(layout.micro_batches(0, filled, groups.at.dp))
    source = SampleSource(data, config.seed, "eval", config.model.vocab_size)
    loader = MicroBatchLoader(source, iter(numbers), groups.platform.device, data.prefetch_batches)
    try:
        batches = list(islice(loader, len(numbers)))
    finally:
        loader.close()
    return [_without_surplus(batch, part, wanted) for batch, part in zip(batches, numbers)]


def _without_surplus(batch: Batch, numbers: range, wanted: int) -> Batch:
    keep = torch.tensor([float(number < wanted) for number in numbers], device=batch.loss_mask.device)
    return replace(batch, loss_mask=batch.loss_mask * keep.unsqueeze(1))
