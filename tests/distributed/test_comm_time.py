"""Every collective and message of a step is seen, and a delay shows in the column of the group that it was put into."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.distributed.job import GLOBAL_BATCH, base_config, changed, make_batch, open_engine
from tests.harness import run_ranks

pytestmark = pytest.mark.gloo

PROFILED = {
    "c10d::_allgather_base_": "_allgather_base", "c10d::_reduce_scatter_base_": "_reduce_scatter_base",
    "c10d::allgather_": "allgather", "c10d::allgather_into_tensor_coalesced_": "allgather_into_tensor_coalesced",
    "c10d::allreduce_": "allreduce", "c10d::allreduce_coalesced_": "allreduce_coalesced",
    "c10d::alltoall_base_": "alltoall_base", "c10d::barrier": "barrier", "c10d::broadcast_": "broadcast",
    "c10d::recv_": "recv", "c10d::reduce_scatter_": "reduce_scatter",
    "c10d::reduce_scatter_tensor_coalesced_": "reduce_scatter_tensor_coalesced", "c10d::send": "send",
}  # fmt: skip
"""What torch's dispatcher calls a collective → method that it came through."""

NEWER_NAMES = {
    "all_gather_single": "_allgather_base", "all_gather_single_coalesced": "allgather_into_tensor_coalesced",
    "reduce_scatter_single": "_reduce_scatter_base", "all_to_all_single": "alltoall_base",
    "reduce_scatter_single_coalesced": "reduce_scatter_tensor_coalesced",
}  # fmt: skip
"""Methods of torch 2.13 → what older ones, and the dispatcher still, call them."""

LAYOUTS = {
    "tp 2 x pp 2 with sp": (4, {"parallel.tp": 2, "parallel.pp": 2, "parallel.sequence_parallel": True}),
    "tp 2 without sp": (2, {"parallel.tp": 2, "parallel.sequence_parallel": False}),
    "cp 2": (2, {"parallel.cp": 2}),
    "dp 2": (2, {"parallel.dp": 2}),
    "pp 2, tied, interleaved": (2, {"parallel.pp": 2, "parallel.vpp": 2, "model.tie_embeddings": True}),
}
AXES = {
    "tp 2 x pp 2 with sp": {"tp", "pp", "other"},
    "tp 2 without sp": {"tp", "other"},
    "cp 2": {"cp", "dp", "other"},
    "dp 2": {"dp", "other"},
    "pp 2, tied, interleaved": {"pp", "other"},
}


def one_step(engine: Any, config: Any) -> None:
    from llm_parallel.train.step import apply_gradient, forward_backward

    numbers = engine.groups.layout.micro_batches(0, GLOBAL_BATCH, engine.groups.at.dp)
    outcome = forward_backward(engine, [make_batch(config, part) for part in numbers])
    apply_gradient(engine, outcome, config.optim.lr, config.optim.clip_grad)


def profiled_step(rank: int, world_size: int, changes: dict[str, Any]) -> tuple[Counter[str], Counter[tuple[str, str]]]:
    """Collectives of the second step by torch's dispatcher, and as recorded."""
    import torch

    from llm_parallel.parallel.comm_time import open_comm_time
    from llm_parallel.parallel.groups import close_groups

    config = changed(base_config(), changes)
    engine = open_engine(config, rank, world_size)
    comm = open_comm_time(engine.groups, message_bytes=1 << 12)
    one_step(engine, config)
    with comm.recording(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        one_step(engine, config)
    events = Counter(event.name for event in profile.events() if event.name.startswith("c10d::"))
    close_groups(world=False)
    return events, comm.calls


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_call_is_seen(name: str) -> None:
    processes, changes = LAYOUTS[name]
    axes: set[str] = set()
    for events, calls in run_ranks(profiled_step, processes, changes):
        assert set(events) <= set(PROFILED), "a collective that this test has no name for"
        seen: Counter[str] = Counter()
        for (axis, method), count in calls.items():
            seen[NEWER_NAMES.get(method, method)] += count
            axes |= {axis} - {"self"}
        assert seen == {PROFILED[event]: count for event, count in events.items()}
        assert sum(seen.values()) >= 5
    assert axes == AXES[name]
