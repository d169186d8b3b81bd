"""How long the rows of padded samples are, and what a feed hands out of them."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_parallel.checkpoint.state import TrainState
from llm_parallel.config.tree import RunConfig
from llm_parallel.data.batch import Batch
from llm_parallel.data.pack import Packer
from llm_parallel.data.row_lengths import GPU_UNIT, RowLengths
from llm_parallel.data.samples import Sample
from llm_parallel.parallel.layout import Layout
from llm_parallel.train.feed import SampleFeed, held_out_batches, row_lengths

WHOLE = 256
TEXTS = np.random.default_rng(0).integers(1, WHOLE + 1, 40)


def config_of(packing: str = "pad", **parallel: Any) -> RunConfig:
    return RunConfig(
        model={"num_layers": 4},
        chat={"packing": packing},
        data={"seq_length_tokens": WHOLE},
        train={"global_batch_size": 12, "micro_batch_size": 3},
        parallel=parallel,
    )


class Texts:
    """Samples of one text each, with a column and a fact of each document."""

    isolate = True

    def __init__(self, together: bool = False) -> None:
        self.packer = Packer(TEXTS, WHOLE, 3, together=together)

    def sample(self, number: int) -> Sample:
        end = self.packer.filled(number)
        here = np.arange(WHOLE) < end
        starts = np.array([0, end] if end < WHOLE else [0], np.int32)
        ids = np.where(here, number, -1).astype(np.int64)
        facts = {"score": np.array([number, 0][: len(starts)], np.float32)}
        return Sample(ids, ids, here.astype(np.float32), starts, {"old": ids.astype(np.float32)}, facts)


def groups_of(layout: Layout, dp_rank: int = 0) -> Any:
    platform = SimpleNamespace(device=torch.device("cpu"))
    return SimpleNamespace(mesh=layout.mesh, at=SimpleNamespace(dp=dp_rank), platform=platform)


@given(
    st.lists(st.lists(st.integers(1, WHOLE), min_size=1, max_size=3), min_size=1, max_size=5),
    st.sampled_from([1, 2, 4, 8, 64]),
    st.booleans(),
)
def test_a_length_holds_every_row_and_no_unit_more(texts: list[list[int]], unit: int, together: bool) -> None:
    flat, starts = list(itertools.chain(*texts)), np.cumsum([0, *map(len, texts)]).tolist()
    parts = [range(*pair) for pair in itertools.pairwise(starts)]
    found = RowLengths(flat.__getitem__, WHOLE, unit, together).of(parts)
    for length, rows in zip(found, [flat] * len(texts) if together else texts):
        assert max(rows) <= length < max(rows) + unit and length % unit == 0 and length <= WHOLE


def test_lengths_are_what_the_layout_needs() -> None:
    packer = Packer(TEXTS, WHOLE, 3, together=False)

    def of(device: str, **parallel: Any) -> RowLengths | None:
        config = config_of(**parallel)
        return RowLengths.of_run(config, Layout.from_config(config, 8), packer, device)

    assert RowLengths.of_run(config_of("best_fit"), Layout(), packer, "cpu") is None
    plain = of("cpu")
    assert plain is not None and (plain.unit, plain.together, plain.whole) == (1, False, WHOLE)
    many = of("cpu", tp=2, cp=2, pp=2)
    assert many is not None and (many.unit, many.together) == (4, True)
    gpu = of("cuda", tp=2, cp=4)
    assert gpu is not None and gpu.unit % GPU_UNIT == 0 and gpu.unit % 8 == 0


def cut_batch() -> Batch:
    config = config_of()
    layout = Layout.from_config(config, 1)
    samples = Texts()
    lengths = row_lengths(config, groups_of(layout), samples.packer)
    with_feed = SampleFeed(config, groups_of(layout), 0, samples, ("old",), lengths=lengths)
    try:
        return with_feed.step(TrainState())[0]
    finally:
        with_feed.close()


def test_a_cut_batch_has_all_that_counts() -> None:
    batch, samples = cut_batch(), Texts()
    ends = [samples.packer.filled(number) for number in range(3)]
    assert batch.tokens.shape == (3, max(ends)) and batch.documents is not None
    assert batch.documents.sample_tokens == WHOLE
    assert batch.weights.sum(1).tolist() == ends
    assert [starts.tolist() for starts in batch.documents.starts] == [
        [0, end] if end < max(ends) else [0] for end in ends
    ]
    assert batch.facts["score"].shape == (3, batch.documents.most) and batch.facts["score"][:, 0].tolist() == [0, 1, 2]
    for values in (batch.labels, batch.weights, batch.columns["old"]):
        assert values.shape == batch.tokens.shape and values.is_contiguous()
    again = batch.cut(WHOLE)
    assert again is batch, "nothing to cut"
    assert batch.cut(max(ends) - 1).documents.sample_tokens == WHOLE, "the whole sample, after a second cut too"  # type: ignore[union-attr]


@pytest.mark.parametrize("parallel", [{}, {"dp": 2}, {"pp": 2}, {"dp": 2, "pp": 2}])
def test_a_feed_that_goes_on_hands_out_the_same_rows(parallel: dict[str, int]) -> None:
    """And counts the tokens that all replicas compute."""
    config = config_of(**parallel)
    layout = Layout.from_config(
        config, 4 if parallel.get("dp") and parallel.get("pp") else max(parallel.values(), default=1)
    )
    computed: dict[int, list[int]] = {step: [] for step in range(3)}
    said: dict[int, set[int]] = {step: set() for step in range(3)}
    for replica in range(layout.dp):
        groups, by_start = groups_of(layout, replica), []
        for start in (0, 1):
            samples = Texts()
            lengths = row_lengths(config, groups, samples.packer)
            feed = SampleFeed(config, groups, 12 * start, samples, ("old",), lengths=lengths)
            try:
                steps = []
                for step in range(start, 3):
                    steps.append(feed.step(TrainState(step=step, consumed_samples=12 * step)))
                    if not start:
                        computed[step].append(sum(batch.tokens.numel() for batch in steps[-1]))
                        assert feed.step_tokens is not None and feed.step_tokens < 12 * WHOLE
                        said[step].add(feed.step_tokens)
                by_start.append(steps)
            finally:
                feed.close()
        for one, two in zip(by_start[0][1:], by_start[1]):
            assert [batch.tokens.tolist() for batch in one] == [batch.tokens.tolist() for batch in two]
            if layout.pp > 1:
                assert len({batch.tokens.shape for batch in one}) == 1
    assert said == {step: {sum(counts)} for step, counts in computed.items()}, "of all replicas, on each"


def test_held_out_rows_are_cut_alike() -> None:
    config = config_of()
    samples, groups = Texts(), groups_of(Layout.from_config(config, 1))
    held = held_out_batches(config, groups, samples, 5, row_lengths(config, groups, samples.packer))
    ends = [max(samples.packer.filled(number) for number in part) for part in (range(3), range(3, 6))]
    assert [batch.tokens.shape[1] for batch in held.batches] == ends
    assert float(held.batches[1].weights[2].sum()) == 0.0, "the sixth only completes the micro batch"
