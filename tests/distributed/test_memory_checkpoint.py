"""State copied to memory under one layout goes on under any other as the undisturbed run does."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_checkpoint import PAIRS, _p
from tests.support.harness import run_ranks
from tests.support.job import base_config, changed, open_engine, train_steps

pytestmark = pytest.mark.gloo
SECRET = "of this test"
WITNESSES = ("PP2 VPP2", "CP2 DP2", "bf16 our AdamW DP2", "plain optimizer DP2")
"""Chunks of a stage; shards over replicas and context ranks, with uneven stages; bf16 with its main weights, under our
own optimizer; an optimizer that is whole on every replica. The other pairs are slow tests."""
CASES = [pytest.param(*pair, id=pair[0], marks=[] if pair[0] in WITNESSES else pytest.mark.slow) for pair in PAIRS]


def save_job(rank: int, world_size: int, changes: dict[str, Any], folder: str, partner: Any) -> list[Any]:
    """Five steps, a copy after the third, and what the last two steps were."""
    from llm_parallel.checkpoint.copies import MemoryCopies
    from llm_parallel.checkpoint.state import TrainState

    config = changed(base_config(), changes)
    engine = open_engine(config, rank, world_size)
    memory = MemoryCopies({"policy": engine}, Path(folder), 7, partner, SECRET)
    for step in (1, 2, 3):
        train_steps(engine, config, step - 1, 1)
        memory.start(TrainState(step=step, consumed_samples=8 * step))
        memory.finish()
    memory.close()
    return train_steps(engine, config, 3, 2)


def load_job(rank: int, world_size: int, changes: dict[str, Any], saved: int, folder: str, remote: Any) -> list[Any]:
    """Two steps from the copy."""
    from llm_launch.copy_files import copy_name
    from llm_parallel.checkpoint.copies import LocalSource, RemoteSource, restore

    config = changed(base_config(), changes)
    engine = open_engine(config, rank, world_size)
    if remote is None:
        sources: list[Any] = [partial(LocalSource, Path(folder) / "own" / copy_name(7, r), 3) for r in range(saved)]
    else:
        sources = [partial(RemoteSource, remote, SECRET, "kept", 7, r, 3) for r in range(saved)]
    state = restore({"policy": engine}, sources)
    assert (state.step, state.consumed_samples) == (3, 24)
    return train_steps(engine, config, state.step, 2)


@pytest.mark.parametrize(("name", "saved", "processes", "loads"), CASES)
def test_any_layout_goes_on_from_memory(
    name: str, saved: dict[str, Any], processes: int, loads: list[Any], tmp_path: Path
) -> None:
    undisturbed = run_ranks(save_job, processes, saved, str(tmp_path), None)[0]
    for target, layout, ranks in loads:
        resumed = run_ranks(load_job, ranks, layout, processes, str(tmp_path), None)[0]
        worst = max(abs(a - b) for (a, _), (b, _) in zip(undisturbed, resumed))
        print(f"| {name} -> {target} | {worst:.1e} |")
        assert worst <= (1e-5 if "bf16" not in name else 0.0), target


def test_the_same_layout_goes_on_bit_for_bit_from_the_partners_copies(tmp_path: Path) -> None:
    """The copies that another node keeps are the ones that a lost node is restored from."""
    from llm_launch.copy_transfer import CopyServer

    server = CopyServer("127.0.0.1", tmp_path / "there", SECRET)
    try:
        layout = _p(tp=2, dp=2)
        undisturbed = run_ranks(save_job, 4, layout, str(tmp_path / "here"), server.address)[0]
        assert run_ranks(load_job, 4, layout, 4, "nowhere", server.address)[0] == undisturbed
    finally:
        server.close()


def test_a_missing_share_is_named(tmp_path: Path) -> None:
    run_ranks(save_job, 2, _p(dp=2), str(tmp_path), None)
    with pytest.raises(AssertionError, match=r"is in no copy"):
        run_ranks(load_job, 1, {}, 1, str(tmp_path), None)


def opened_job(rank: int, world_size: int, folder: str, saved: int) -> list[int]:
    """Shares that each process opens when it takes the nearest first."""
    from llm_launch.copy_files import copy_name
    from llm_parallel.checkpoint.copies import Assembler, LocalSource
    from llm_parallel.checkpoint.optimizer import allocate_moments
    from llm_parallel.checkpoint.pieces import held_pieces

    engine = open_engine(changed(base_config(), _p(dp=world_size)), rank, world_size)
    allocate_moments(engine)
    order = sorted(range(saved), key=lambda r: abs((r + 0.5) / saved - (rank + 0.5) / world_size))
    assembler = Assembler([partial(LocalSource, Path(folder) / "own" / copy_name(7, r), 3) for r in order])
    for held in held_pieces({"policy": engine}, divided=False):
        assembler.read(held.piece)
    return [len(assembler.opened)]


def test_a_process_opens_the_shares_that_it_needs_and_no_others(tmp_path: Path) -> None:
    run_ranks(save_job, 4, _p(dp=4), str(tmp_path), None)
    assert run_ranks(opened_job, 4, str(tmp_path), 4) == [[1]] * 4, "the own share is all of it"
    assert all(1 < opened <= 3 for (opened,) in run_ranks(opened_job, 2, str(tmp_path), 4))
