"""The CPU platform in real ranks: its reduce-scatter and all-gather give torch's results; random streams; device
literals."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from llm_parallel.parallel.platform import open_platform
from llm_parallel.parallel.scatter import all_gather, reduce_scatter
from tests.support.harness import run_ranks

pytestmark = pytest.mark.gloo


def scattered(rank: int, world_size: int, dtype: torch.dtype) -> list[Any]:
    """What each way of asking gives for the same tensors, and torch's own answer."""
    generator = torch.Generator().manual_seed(rank)
    whole = torch.randn(world_size * 3, 5, generator=generator).to(dtype)
    found = []
    for ask in ("blocking", "asynchronous", "maximum", "coalesced"):
        out, before = torch.empty(3, 5, dtype=dtype), whole.clone()
        if ask == "blocking":
            reduce_scatter(out, whole)
        elif ask == "asynchronous":
            reduce_scatter(out, whole, async_op=True).wait()
        elif ask == "maximum":
            reduce_scatter(out, whole, op=dist.ReduceOp.MAX)
        else:
            with dist._coalescing_manager(None, async_ops=True) as manager:
                reduce_scatter(out, whole, async_op=True, group=dist.group.WORLD)
            manager.wait()
        assert torch.equal(whole, before), "the input is as it was"
        found.append(out.float().numpy())
    inside = whole.clone()
    reduce_scatter(inside.chunk(world_size)[rank], inside)  # the output is a part of the input, as in megatron-core
    everybody = [torch.empty_like(whole) for _ in range(world_size)]
    dist.all_gather(everybody, whole)
    stack = torch.stack(everybody).double()[:, 3 * rank : 3 * rank + 3]
    torchs = torch.empty(3, 5, dtype=dtype)  # torch 2.8's gloo adds where it is asked for the maximum
    dist.reduce_scatter_tensor(torchs, whole.clone(), op=dist.ReduceOp.MAX)
    return [found, inside.chunk(world_size)[rank].float().numpy(), stack.sum(0).numpy(), torchs.float().numpy()]


def policies(rank: int, world_size: int) -> dict[str, set[int]]:
    """The scheduling policy of each thread of a process with a group of its own, by the names of the threads."""
    open_platform("cpu", threads=1)
    dist.all_reduce(torch.ones(1), group=dist.new_group())
    found = {"this one": {os.sched_getscheduler(0)}}
    for task in Path("/proc/self/task").iterdir():
        found.setdefault((task / "comm").read_text().strip(), set()).add(os.sched_getscheduler(int(task.name)))
    return found


def test_a_thread_that_wakes_takes_no_core_from_one_that_writes() -> None:
    """gloo's loops too, which inherit it: they are made after it was asked for."""
    for found in run_ranks(policies, 2):
        assert os.SCHED_BATCH in found["gloo_tcp_loop"]
        assert found["this one"] == {os.SCHED_BATCH}


@pytest.mark.parametrize(
    ("world_size", "dtype", "tolerance"),
    [(2, torch.float32, 1e-6), (3, torch.float32, 1e-6), (3, torch.bfloat16, 2e-2)],
)
def test_reduce_scatter_is_torchs(world_size: int, dtype: torch.dtype, tolerance: float) -> None:
    for found, inside, total, greatest in run_ranks(scattered, world_size, dtype):
        blocking, asynchronous, maximum, coalesced = found
        for answer in (blocking, asynchronous, coalesced, inside):
            np.testing.assert_allclose(answer, total, atol=tolerance, rtol=tolerance)
        np.testing.assert_array_equal(maximum, greatest)


def gathered(rank: int, world_size: int, dtype: torch.dtype) -> list[Any]:
    """What each way of asking gives, and torch's own answer."""
    own = torch.randn(3, 5, generator=torch.Generator().manual_seed(rank)).to(dtype)
    found = []
    for ask in ("blocking", "in place", "several at once", "coalesced"):
        out = torch.full((world_size * 3, 5), 7.0, dtype=dtype)
        if ask == "blocking":
            all_gather(out, own)
        elif ask == "in place":
            out.chunk(world_size)[rank].copy_(own)
            all_gather(out, out.chunk(world_size)[rank])
        elif ask == "several at once":
            other, small = torch.empty_like(out), torch.empty(world_size, dtype=dtype)
            works = [
                all_gather(other, own + 1, async_op=True),
                all_gather(out, own, async_op=True),
                all_gather(small, own[0, :1].clone(), async_op=True),
            ]
            for work in reversed(works):
                work.wait()
            assert torch.equal(small, out.view(world_size, -1)[:, 0])
        else:
            with dist._coalescing_manager(None, async_ops=True) as manager:
                all_gather(out, own, async_op=True, group=dist.group.WORLD)
            manager.wait()
        found.append(out.float().numpy())
    everybody = [torch.empty_like(own) for _ in range(world_size)]
    dist.all_gather(everybody, own)
    return [found, torch.cat(everybody).float().numpy()]


@pytest.mark.parametrize(("world_size", "dtype"), [(2, torch.float32), (3, torch.bfloat16)])
def test_all_gather_is_torchs(world_size: int, dtype: torch.dtype) -> None:
    for found, expected in run_ranks(gathered, world_size, dtype):
        for answer in found:
            np.testing.assert_array_equal(answer, expected)


def forked_streams(rank: int, world_size: int) -> tuple[list[float], list[float], list[float]]:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    from llm_parallel.parallel.groups import open_groups
    from llm_parallel.parallel.layout import Layout

    open_groups(Layout(tp=world_size), rank, open_platform("cpu"), seed=7)
    before = torch.get_rng_state()
    with get_cuda_rng_tracker().fork():
        inside = torch.rand(3).tolist()
    assert torch.equal(torch.get_rng_state(), before), "the outer stream is where it was"
    with get_cuda_rng_tracker().fork():
        later = torch.rand(3).tolist()
    return torch.rand(3).tolist(), inside, later


def test_rng_streams_differ_over_tensor_parallel_ranks_and_go_on() -> None:
    first, second = run_ranks(forked_streams, 2)
    assert first[0] == second[0], "outside a fork all ranks draw alike"
    assert first[1] != second[1]
    assert first[1] != first[2]


def literals(rank: int, world_size: int) -> tuple[str, str]:
    open_platform("cpu")
    names = {"__name__": "megatron.somewhere", "torch": torch}
    exec("inside = str(torch.zeros(1, device='cuda').cuda().device)", names)
    try:
        outside = str(torch.zeros(1, device="cuda").device)
    except (RuntimeError, AssertionError) as error:
        outside = type(error).__name__
    return names["inside"], outside  # type: ignore[return-value]


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a CUDA device that is not there")
def test_only_megatrons_literals_are_mapped() -> None:
    inside, outside = run_ranks(literals, 1)[0]
    assert inside == "cpu"
    assert outside != "cpu"
