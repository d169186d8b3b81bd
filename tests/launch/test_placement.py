"""Layouts and placements for the devices that are left, against the rules of configurations and brute force."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_launch.blame import Device
from llm_launch.placement import Trained, crowded, fingerprint, other_copies, place, recoverable_step
from llm_parallel.config.load import load_config
from llm_parallel.config.tree import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from llm_parallel.parallel.layout import Layout
from llm_parallel.planner.memory import memory
from llm_parallel.planner.shapes import Strategy, shape_of


def config(batch: int = 8, **parallel: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(vocab_size=100, num_layers=4),
        parallel=ParallelConfig(**parallel),
        train=TrainConfig(global_batch_size=batch),
    )


def devices(nodes: int, each: int) -> list[Device]:
    return [Device(f"n{node}", index) for node in range(nodes) for index in range(each)]


@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.integers(1, 6), st.integers(1, 4), st.integers(1, 4))
def test_a_placement_is_legal_and_keeps_sizes_where_one_replica_fits(
    tp: int, pp: int, dp: int, nodes: int, each: int
) -> None:
    here = devices(nodes, each)
    placement = place(config(tp=tp, pp=pp, dp=dp), here, "cpu")
    assert placement is not None, "one device always suffices for this model"
    layout = placement.layout
    assert len(set(placement.devices)) == len(placement.devices) == layout.world_size <= len(here)
    if tp * pp <= len(here):
        assert (layout.tp, layout.pp, layout.dp) == (tp, pp, min(dp, len(here) // (tp * pp), 8))
    taken = [n for rank in range(layout.dp) for part in layout.micro_batches(0, 8, rank) for n in part]
    assert sorted(taken) == list(range(8)), "every sample once, however many replicas are left"
    if layout.tp <= each:
        for start in range(layout.world_size // layout.tp):
            group = placement.devices[start * layout.tp : (start + 1) * layout.tp]
            if len({device.node for device in group}) > 1:
                # Only when no node has enough left for a whole group.
                assert layout.world_size > nodes * (each // layout.tp) * layout.tp


def test_survivors_keep_their_ranks_and_a_spare_takes_the_hole() -> None:
    here = devices(4, 2)
    before = place(config(tp=2, dp=3), here, "cpu")
    assert before is not None and before.devices == tuple(here[:6])
    left = [device for device in here if device != Device("n1", 0)]
    after = place(config(tp=2, dp=3), left, "cpu", before)
    assert after is not None and after.layout == before.layout
    assert after.devices == (*here[0:2], *here[6:8], *here[4:6])


def test_turned_work_lies_on_other_devices() -> None:
    here = devices(2, 2)
    before = place(config(dp=4), here, "cpu")
    assert before is not None
    turned = place(config(dp=4), here, "cpu", before, turn=True)
    assert turned is not None and set(turned.devices) == set(here)
    assert all(a != b for a, b in zip(before.devices, turned.devices))


def test_fewer_devices_than_a_replica_takes_the_legal_layout_with_least_work() -> None:
    """By hand, in units of a whole micro batch, of which there are 8: two or three stages, or tensor parallelism over
    two, take (8 + 1) / 2, (8 + 2) * 2 / 4 and 8 / 2 * 1.1; three replicas of the whole model take 3."""
    asked = config(tp=4, dp=3)
    placement = place(asked, devices(1, 3), "cpu")
    assert placement is not None
    layout = placement.layout
    assert (layout.tp, layout.pp, layout.dp) == (1, 1, 3)
    assert placement.overrides == ("parallel.tp=1",)
    said = crowded(asked, layout)
    assert said is not None and "4 times as much of the model" in said and "elastic.min_devices=4" in said
    model = shape_of(asked.model)
    expected = [memory(model, Strategy(n, 8, 1, 256, tp=tp, precision="fp32", overlap_dp=True)).total / 2**30
                for n, tp in ((3, 1), (4, 4))]  # fmt: skip
    named = re.search(r"by prediction (\S+) GiB of tensors instead of (\S+) GiB", said)
    assert named is not None and [float(value) for value in named.groups()] == pytest.approx(expected, rel=5e-3)
    kept = place(asked, devices(1, 5), "cpu")
    assert kept is not None and crowded(asked, kept.layout) is None


@pytest.mark.parametrize(
    ("field", "named"),
    [("seed=5", "seed"), ("data.seq_length_tokens=64", "section data"), ("model.rope_base=5", "section model")],
)
def test_it_is_said_why_copies_in_memory_are_not_used(field: str, named: str) -> None:
    before, now = fingerprint(load_config(None)), fingerprint(load_config(None, [field]))
    assert before != now
    said = other_copies(now, json.loads(json.dumps(before)))
    assert f"another {named} than" in said and "last checkpoint" in said
    assert "another content than" in other_copies(now, "the hash of an earlier version")


def test_sixteen_thousand_ranks_are_placed_in_a_linear_number_of_calls() -> None:
    """Four times the nodes take about four times the calls, those of lists and dictionaries included."""
    large = config(batch=16384, tp=8, dp=None).model_copy(
        update={"model": ModelConfig(preset=None, vocab_size=100, num_layers=4, num_attention_heads=8)}
    )
    calls = []
    for nodes in (512, 2048):
        here = devices(nodes, 8)
        with counted() as count:
            before = place(large, here, "cuda")
            assert before is not None and before.layout.world_size == 8 * nodes
            after = place(large, here[:-8], "cuda", before)
            assert after is not None and after.layout == Layout.from_config(large, 8 * nodes - 8)
        calls.append(count[0])
    assert calls[1] < 4.5 * calls[0]


@contextmanager
def counted() -> Iterator[list[int]]:
    """Calls of Python and C functions in the block."""
    count = [0]

    def note(_frame: Any, event: str, _argument: Any) -> None:
        count[0] += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield count
    finally:
        sys.setprofile(before)


def entry(kind: str, rank: int, *steps: int) -> dict[str, Any]:
    return {"kind": kind, "generation": 3, "rank": rank, "steps": list(steps)}


def test_the_newest_step_that_every_rank_has_somewhere() -> None:
    held = {"a": [entry("own", 0, 4, 5), entry("kept", 1, 3, 4)], "b": [entry("own", 1, 4, 5)]}
    assert recoverable_step(2, 3, held) == (5, {0: ("a", "own"), 1: ("b", "own")})
    assert recoverable_step(2, 3, {"a": held["a"]}) == (4, {0: ("a", "own"), 1: ("a", "kept")})
    assert recoverable_step(3, 3, held) is None
    assert recoverable_step(2, 4, held) is None


@given(*[st.integers(1, 4)] * 5)
def test_each_rank_reads_from_those_that_held_its_part_of_the_model(
    tp: int, cp: int, pp: int, dp: int, now: int
) -> None:
    """In megatron-core's order of ranks a tensor-parallel place is a rank modulo TP, a stage one of PP equal blocks."""
    before, after = (Layout(tp=tp, cp=cp, pp=pp, dp=size, stage_layers=(1,) * pp) for size in (dp, now))
    groups, needed = Trained.of(3, before).needed_by(after)
    assert sorted(rank for group in groups for rank in group) == list(range(before.world_size))
    for rank, number in enumerate(needed):
        here = (rank % tp, rank // (tp * cp * now))
        assert {(other % tp, other // (tp * cp * dp)) for other in groups[number]} == {here}


def test_under_another_cut_everyone_may_be_asked() -> None:
    before, after = Layout(tp=2, dp=2), Layout(dp=3)
    assert Trained.of(3, before).needed_by(after) == ([[0, 1, 2, 3]], [0, 0, 0])
