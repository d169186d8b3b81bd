"""Memory of a process on a CPU, where glibc is told to keep what is freed: it does not grow with rounds."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace as Fake

import psutil
import torch

from llm_parallel.tune.rounds import RoundFeed
from tests.support.harness import run_ranks

MIB = 2**20


def resident(rank: int, world_size: int) -> list[float]:
    """MiB of this process: at first, after eight freed tensors of 16 MiB with small ones between them, and after the
    memory was returned."""
    from llm_parallel.parallel.platform import open_platform

    platform, process = open_platform("cpu", threads=1), psutil.Process()
    found = [process.memory_info().rss / MIB]
    large = []
    small = []
    for _ in range(8):
        large.append(torch.ones(16 * MIB // 4))
        small.append(torch.ones(2**10))
    large.clear()
    found.append(process.memory_info().rss / MIB)
    platform.return_freed_memory()
    found.append(process.memory_info().rss / MIB)
    assert len(small) == 8
    return found


def test_freed_memory_is_kept_until_it_is_returned() -> None:
    ((before, freed, returned),) = run_ranks(resident, 1)
    assert freed - before > 100 and returned - before < 50


def test_a_round_begins_and_its_steps_begin_with_memory_returned() -> None:
    """Generation and training have tensors of other sizes: without this, SmolLM2-135M took 40 MB more each round."""
    told: list[str] = []
    rollout = Fake(prompts=2, answers=2, epochs=2)
    config = Fake(trains="grpo", method=Fake(rollout=rollout), train=Fake(global_batch_size=4))
    platform = Fake(return_freed_memory=lambda: told.append("returned"))

    def collect(number: int, within: int) -> Fake:
        told.append(f"round {number}")
        return Fake(number=number, texts=())

    feed = Fake(
        _run=Fake(config=config, long=nullcontext, groups=Fake(platform=platform)), _round=None, _collect=collect,
        _chosen=lambda *_: [], _rows=lambda *_: Fake(of_row=(), length=8), _batches=lambda _: told.append("step"),
    )  # fmt: skip
    for step in range(3):
        RoundFeed.step(feed, Fake(step=step))  # type: ignore[arg-type]
    assert told == ["returned", "round 0", "returned", "step", "step", "returned", "round 1", "returned", "step"]
