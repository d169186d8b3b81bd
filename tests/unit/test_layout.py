"""Rank arithmetic against megatron-core's own generator and against brute force."""

from __future__ import annotations

from itertools import chain

from hypothesis import given
from hypothesis import strategies as st
from megatron.core.parallel_state import RankGenerator

from llm_parallel.config.tree import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from llm_parallel.parallel.layout import AXES, Layout

sizes = st.sampled_from([1, 2, 3, 4])
layouts = st.builds(Layout, dp=sizes, tp=sizes, pp=sizes, cp=sizes, micro_batch_size=sizes)


@given(layouts)
def test_groups_are_megatrons(layout: Layout) -> None:
    generator = RankGenerator(layout.tp, 1, layout.dp, layout.pp, layout.cp, "tp-cp-ep-dp-pp")
    for axes in (("tp",), ("cp",), ("dp",), ("pp",), ("dp", "cp"), ("tp", "pp")):
        theirs = {tuple(sorted(group)) for group in generator.get_ranks("-".join(axes))}
        assert {layout.group(rank, *axes) for rank in range(layout.world_size)} == theirs


@given(layouts)
def test_rank_inverts_coordinates(layout: Layout) -> None:
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        assert layout.rank(at) == rank
        assert all(0 <= getattr(at, axis) < getattr(layout, axis) for axis in AXES)


def test_sixteen_thousand_ranks_need_no_processes() -> None:
    layout = Layout(dp=128, tp=8, pp=16, stage_layers=(8,) * 16)
    assert layout.world_size == 16384
    last = layout.coordinates(16383)
    assert (last.tp, last.cp, last.dp, last.pp) == (7, 0, 127, 15)


@given(layouts, st.integers(0, 1000), st.integers(1, 4))
def test_a_step_takes_each_sample_once(layout: Layout, first: int, per_replica: int) -> None:
    size = layout.dp * layout.micro_batch_size * per_replica
    taken = [n for dp in range(layout.dp) for part in layout.micro_batches(first, size, dp) for n in part]
    assert sorted(taken) == list(range(first, first + size))
    assert layout.num_micro_batches(size) == per_replica


@given(layouts, st.integers(0, 1000), st.integers(1, 40))
def test_uneven_replicas_share_all_samples(layout: Layout, first: int, micro_batches: int) -> None:
    size = layout.micro_batch_size * micro_batches
    parts = [list(layout.micro_batches(first, size, dp)) for dp in range(layout.dp)]
    assert sorted(n for part in parts for numbers in part for n in numbers) == list(range(first, first + size))
    counts = [len(part) for part in parts]
    assert counts == [layout.num_micro_batches(size, dp) for dp in range(layout.dp)]
    assert max(counts) - min(counts) <= 1


@given(sizes, st.integers(1, 5))
def test_context_ranks_share_tokens_and_causal_work(cp: int, unit: int) -> None:
    layout, length = Layout(cp=cp), 2 * cp * unit
    held = [list(chain(*layout.token_ranges(length, rank))) for rank in range(cp)]
    assert sorted(chain(*held)) == list(range(length))
    pairs = [sum(token + 1 for token in tokens) for tokens in held]
    assert len(set(pairs)) == 1, "every rank attends to as many pairs"


def test_uneven_interleaved_chunks() -> None:
    layout = Layout(pp=2, vpp=2, stage_layers=(3, 1, 2, 4))
    chunks = {(stage, rank): layout.layers(rank, stage) for stage in range(2) for rank in range(2)}
    assert chunks == {(0, 0): range(3), (0, 1): range(3, 4), (1, 0): range(4, 6), (1, 1): range(6, 10)}


def test_from_config_fills_what_is_open() -> None:
    config = RunConfig(
        model=ModelConfig(num_layers=8), parallel=ParallelConfig(tp=2, pp=2), train=TrainConfig(micro_batch_size=3)
    )
    layout = Layout.from_config(config, world_size=16)
    assert (layout.dp, layout.stage_layers, layout.sequence_parallel, layout.micro_batch_size) == (4, (4, 4), True, 3)
    assert Layout.from_config(config).dp == 1
    assert "TP 2 + SP" in layout.describe() and "DP 4" in layout.describe()
