"""Faults of megatron-core that our checkpoints work around: each is there without its remedy, and gone with it."""

from __future__ import annotations

import multiprocessing
import queue
from pathlib import Path
from typing import Any

import pytest

from tests.support.ckpt_jobs import load_job, save_job
from tests.support.ckpt_traps import (
    fresh_state_job,
    left_processes_job,
    shared_step_job,
    weights_job,
    without_remedies_job,
)
from tests.support.harness import run_ranks

pytestmark = pytest.mark.gloo


def test_every_parameter_has_its_own_step(tmp_path: Path) -> None:
    run_ranks(save_job, 1, {}, str(tmp_path), 4, 0)
    parameters, tensors, steps, _ = run_ranks(shared_step_job, 1, str(tmp_path), True)[0]
    assert tensors == parameters > 1 and steps == {5.0}
    parameters, tensors, steps, raised = run_ranks(shared_step_job, 1, str(tmp_path), False)[0]
    assert tensors == 1 and steps == {4.0 + parameters}  # one step of training, counted once for each parameter
    assert raised == "KeyError: 'step'"


@pytest.mark.parametrize(("remedy", "raised"), [(True, ""), (False, "AssertionError")])
def test_an_optimizer_without_steps_can_be_described(remedy: bool, raised: str) -> None:
    assert run_ranks(fresh_state_job, 1, remedy) == [raised]


def test_small_buckets_and_overlapped_gathering(tmp_path: Path) -> None:
    undisturbed = run_ranks(without_remedies_job, 2, str(tmp_path))[0]

    def worst(name: str) -> float:
        resumed = run_ranks(load_job, 1, {}, str(tmp_path / name))[0]
        return max(abs(a - b) for (a, _), (b, _) in zip(undisturbed, resumed))

    assert worst("good") <= 1e-5
    assert worst("padding") > 1e-3
    # It has the weights of the step before; with optimizer state, which has the newest, a run goes on rightly even so.
    folders = [str(tmp_path / name) for name in ("good", "padding", "stale")]
    same, padding, stale = run_ranks(weights_job, 1, folders)[0]
    assert same == padding == 0.0 and stale > 1e-3  # AdamW moves a weight by about the learning rate, 3e-3


def test_a_save_leaves_no_process(tmp_path: Path) -> None:
    assert run_ranks(left_processes_job, 1, str(tmp_path)) == [0]


@pytest.mark.parametrize("size", [0, 1, 1 << 20], ids=["empty", "small", "more than a pipe holds"])
def test_results_of_any_size_come_from_a_child_that_ended(size: int) -> None:
    from llm_parallel.checkpoint.writer import ForkedResults

    def answer(results: Any, patience_s: float) -> bool:
        child = multiprocessing.get_context("fork").Process(target=results.put, args=(bytes(size),), daemon=True)
        child.start()
        child.join(patience_s)
        ended = not child.is_alive()
        child.kill()
        child.join()
        return ended

    results = ForkedResults()
    with pytest.raises(queue.Empty):
        results.get_nowait()
    for _ in range(2):  # a queue is used for one save after the other
        assert answer(results, 60.0)
        assert results.get_nowait() == bytes(size)
        with pytest.raises(queue.Empty):
            results.get_nowait()
    # The fault: a child that puts more than 64 KiB into a pipe cannot end before its parent reads.
    blocks = size > 1 << 16
    assert answer(multiprocessing.get_context("fork").Queue(), 0.5 if blocks else 60.0) != blocks
