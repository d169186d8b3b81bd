"""Faults of megatron-core that our checkpoints work around: each is there without its remedy, and gone with it."""

from __future__ import annotations

import importlib.util
import multiprocessing
import queue
from pathlib import Path
from typing import Any

import pytest

from llm_parallel.config.tree import CheckpointConfig, RunConfig
from llm_parallel.errors import UserError
from tests.distributed.ckpt_jobs import load_job, save_job
from tests.distributed.ckpt_traps import (
    fresh_state_job,
    left_processes_job,
    shared_step_job,
    weights_job,
    without_remedies_job,
)
from tests.harness import run_ranks

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


@pytest.mark.parametrize("remedy", [True, False])
def test_a_save_leaves_no_process(remedy: bool, tmp_path: Path) -> None:
    left = run_ranks(left_processes_job, 1, str(tmp_path), remedy)[0]
    assert (left == 0) == remedy


def test_without_psutil_nothing_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from llm_parallel.checkpoint.store import CheckpointStore

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "psutil" else find(name, *rest)
    )
    with pytest.raises(UserError, match="psutil is missing"):
        CheckpointStore(tmp_path, CheckpointConfig(), RunConfig(), groups=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, 1, 1 << 20], ids=["empty", "small", "more than a pipe holds"])
def test_results_of_any_size_come_from_a_child_that_ended(size: int) -> None:
    from llm_parallel.checkpoint.writer import ForkedResults

    def answer(results: Any) -> bool:
        child = multiprocessing.get_context("fork").Process(target=results.put, args=(bytes(size),), daemon=True)
        child.start()
        child.join(timeout=0.5 if size > 1 << 16 else 10.0)
        ended = not child.is_alive()
        child.kill()
        child.join()
        return ended

    results = ForkedResults()
    with pytest.raises(queue.Empty):
        results.get_nowait()
    for _ in range(2):  # a queue is used for one save after the other
        assert answer(results)
        assert results.get_nowait() == bytes(size)
        with pytest.raises(queue.Empty):
            results.get_nowait()
    # The fault: a child that puts more than 64 KiB into a pipe cannot end before its parent reads.
    assert answer(multiprocessing.get_context("fork").Queue()) == (size < 1 << 16)
