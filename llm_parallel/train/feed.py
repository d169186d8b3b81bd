"""Where the micro batches of a step come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch

from llm_parallel.checkpoint.state import TrainState
from llm_parallel.config.tree import RunConfig
from llm_parallel.data.batch import Batch
from llm_parallel.data.loader import MicroBatchLoader, Samples
from llm_parallel.data.pack import Packer
from llm_parallel.data.row_lengths import RowLengths
from llm_parallel.data.samples import SampleSource
from llm_parallel.parallel.groups import Groups
from llm_parallel.parallel.layout import Layout
from llm_parallel.train.step_settings import global_batch_size


class Feed(Protocol):
    """Hands out the micro batches of each step."""

    @property
    def offers(self) -> tuple[str, ...]:
        """Columns and facts that its batches have, and ``documents`` if they have those."""

    @property
    def notices(self) -> Sequence[str]:
        """What a resumed run's data do otherwise than before."""

    @property
    def step_tokens(self) -> int | None:
        """Tokens that the last step computed, where its rows were not all of ``data.seq_length_tokens``; else None."""

    @property
    def has_whole_samples(self) -> bool:
        """Whether the number of samples says how many tokens were trained on: each is ``data.seq_length_tokens``, with
        its padding."""

    def progress(self, state: TrainState) -> Mapping[str, float]:
        """Numbers that are recorded with the step that led to ``state``, such as the epoch."""

    def step(self, state: TrainState) -> Sequence[Batch]:
        """This replica's micro batches of the step that begins in ``state``. Every process of the job calls this."""

    def close(self) -> None:
        """Ends what runs in the background."""


class FeedToCome:
    """What a run has until its method's ``begin`` gives it the feed, which needs the run: it promises what that will
    offer. See ``Feed``."""

    notices: Sequence[str] = ()
    step_tokens = None
    has_whole_samples = True

    def __init__(self, offers: tuple[str, ...]) -> None:
        self.offers = offers

    def step(self, state: TrainState) -> Sequence[Batch]:
        """Not called before the run has begun."""
        raise AssertionError("the run has not begun")

    def progress(self, state: TrainState) -> Mapping[str, float]:
        """Nothing yet."""
        return {}

    def close(self) -> None:
        """Nothing runs yet."""


class SampleFeed:
    """Samples by number, without end, read ahead in the background. ``step`` must be called for consecutive steps, from
    the state with which the feed was opened. ``columns``: those that the samples have; ``notices``: see ``Feed``;
    ``lengths``: how long rows are, if they are not whole samples."""

    has_whole_samples = True

    def __init__(
        self,
        config: RunConfig,
        groups: Groups,
        consumed_samples: int,
        samples: Samples,
        columns: tuple[str, ...] = (),
        notices: Sequence[str] = (),
        lengths: RowLengths | None = None,
    ) -> None:
        self.notices, self._lengths = notices, lengths
        self.step_tokens: int | None = None
        self._train = config.train
        self._layout = Layout.from_config(config, groups.mesh.world_size)
        self._dp_rank = groups.at.dp
        self.offers = (*(("documents",) if samples.isolate else ()), *columns)
        self._loader = MicroBatchLoader(
            samples, self._numbers(consumed_samples), groups.platform.device, config.data.prefetch_batches
        )

    def _numbers(self, consumed: int) -> Iterator[range]:
        """Sample numbers of each micro batch of this replica from ``consumed`` on, without end."""
        while True:
            size = global_batch_size(self._train, consumed)
            yield from self._layout.micro_batches(consumed, size, self._dp_rank)
            consumed += size

    def step(self, state: TrainState) -> list[Batch]:
        """See ``Feed``."""
        first, layout = state.consumed_samples, self._layout
        size = global_batch_size(self._train, first)
        batches = [next(self._loader) for _ in range(layout.num_micro_batches(size, self._dp_rank))]
        if self._lengths is None:
            return batches
        parts = [list(layout.micro_batches(first, size, replica)) for replica in range(layout.dp)]
        rows = layout.micro_batch_size
        self.step_tokens = rows * sum(sum(self._lengths.of(part)) for part in parts)
        return self._lengths.cut(batches, parts[self._dp_rank])

    def progress(self, state: TrainState) -> Mapping[str, float]:
        """Nothing but what every step records."""
        return {}

    def close(self) -> None:
        """Ends the reading thread."""
        self._loader.close()


def row_lengths(config: RunConfig, groups: Groups, packer: Packer) -> RowLengths | None:
    """How long the rows of a run's packed or padded samples are, if they are not whole samples."""
    layout = Layout.from_config(config, groups.mesh.world_size)
    return RowLengths.of_run(config, layout, packer, groups.platform.device.type)


def token_feed(config: RunConfig, groups: Groups, state: TrainState) -> SampleFeed:
    """The feed of pretraining: samples of token files. Every source goes on where ``state.segments`` left it, and the
    present settings become the last of these."""
    consumed = state.consumed_samples
    source = SampleSource(config.data, config.seed, "train", config.model.vocab_size, state.segments, consumed)
    state.segments = source.history
    return SampleFeed(config, groups, consumed, source, notices=source.notices)


def evaluation_batches(config: RunConfig, groups: Groups, state: TrainState) -> HeldOut:
    """Held-out samples of token files."""
    data = config.data
    if not data.eval and not data.eval_fraction:
        return HeldOut()
    source = SampleSource(data, config.seed, "eval", config.model.vocab_size, state.segments)
    return held_out_batches(config, groups, source, config.train.eval_samples)


@dataclass(frozen=True)
class HeldOut:
    """What is evaluated on: this replica's micro batches, and the number of samples over all replicas. No batches if
    nothing is held out."""

    batches: Sequence[Batch] = ()
    samples: int = 0


def held_out_batches(
    config: RunConfig, groups: Groups, source: Samples, wanted: int, lengths: RowLengths | None = None
) -> HeldOut:
    """The first ``wanted`` samples: the same ones in every layout. Micro batches that only complete the number that the
    replicas or the interleaved schedule need have weight 0. ``lengths``: how long rows are, if not whole samples."""
    layout = Layout.from_config(config, groups.mesh.world_size)
    unit = layout.micro_batch_size * layout.dp * (layout.pp if layout.vpp > 1 else 1)
    filled = -(-wanted // unit) * unit
    numbers = list(layout.micro_batches(0, filled, groups.at.dp))
    prefetch = config.data.prefetch_batches
    with MicroBatchLoader(source, iter(numbers), groups.platform.device, prefetch) as loader:
        batches = list(islice(loader, len(numbers)))
    batches = batches if lengths is None else lengths.cut(batches, numbers)
    return HeldOut([_without_surplus(batch, part, wanted) for batch, part in zip(batches, numbers)], wanted)


def _without_surplus(batch: Batch, numbers: range, wanted: int) -> Batch:
    keep = torch.tensor([float(number < wanted) for number in numbers], device=batch.weights.device)
    return batch.without_rows(keep)


def no_held_out(config: RunConfig, groups: Groups, state: TrainState) -> HeldOut:
    """For methods that evaluate by themselves, or whose ``begin`` says what is held out."""
    return HeldOut()
