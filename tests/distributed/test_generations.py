"""What a generation of an elastic run held is free when the next one begins: weights, optimizer, groups, threads; the
gloo device alone stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_checkpoint import _p
from tests.support.harness import run_ranks
from tests.support.job import base_config, changed, open_engine, train_steps

pytestmark = pytest.mark.gloo


def generations_job(rank: int, world_size: int, changes: dict[str, Any], folder: str) -> list[tuple[int, ...]]:
    """Of each generation: its weights and gradients that still live after it, threads while it ran and after it, and
    threads of gloo devices while it ran."""
    import gc
    import time
    import weakref

    import torch.distributed as dist

    from llm_parallel.parallel.gloo_device import share_gloo_device
    from llm_parallel.parallel.groups import close_groups

    def threads() -> int:
        return sum(1 for _ in Path("/proc/self/task").iterdir())

    def devices() -> int:
        names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
        return sum(name.startswith("gloo_tcp_loop") for name in names)

    dist.destroy_process_group()
    share_gloo_device()  # as open_platform does before a worker's first group
    config, found = changed(base_config(), changes), []
    for generation in range(3):
        store = dist.FileStore(f"{folder}/{generation}", world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        engine = open_engine(config, rank, world_size)
        train_steps(engine, config, 0, 2)
        held = [weakref.ref(p) for model in engine.models for p in model.parameters()]
        held += [weakref.ref(buffer.grad_data) for chunk in engine.chunks for buffer in chunk.buffers]
        during, looping = threads(), devices()
        close_groups()
        del engine
        gc.collect()
        most = found[0][2] + 2 if found else during / 2
        deadline = time.monotonic() + 60.0
        while threads() > most and time.monotonic() < deadline:
            time.sleep(0.02)
        found.append((sum(reference() is not None for reference in held), during, threads(), looping))
    return found


@pytest.mark.parametrize(
    ("changes", "processes"),
    [
        pytest.param(_p(dp=2), 2, id="fp32 DP2", marks=pytest.mark.slow),
        pytest.param(_p(tp=2, pp=2), 4, id="fp32 TP2 PP2"),
        pytest.param({**_p(dp=2), "train.precision": "bf16"}, 2, id="bf16 DP2"),
        pytest.param({**_p(dp=2), "optim.implementation": "triton"}, 2, id="our AdamW DP2", marks=pytest.mark.slow),
        pytest.param(
            {**_p(dp=2), "parallel.distributed_optimizer": False}, 2, id="whole optimizer DP2", marks=pytest.mark.slow
        ),
    ],
)
def test_nothing_of_a_generation_outlives_it(changes: dict[str, Any], processes: int, tmp_path: Path) -> None:
    for first, *later in run_ranks(generations_job, processes, changes, str(tmp_path)):
        assert all(alive == 0 and looping == 1 for alive, _, _, looping in (first, *later))
        assert all(during == first[1] for _, during, _, _ in later) and first[2] < first[1] / 2
        assert later[-1][2] <= first[2] + 2
