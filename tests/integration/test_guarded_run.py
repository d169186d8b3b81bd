"""Steps that must not reach the weights: NaN, infinite gradients, spikes; and a run that consists of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.commands import Corpus, events, llm_parallel, read_records, train_in_ranks, write_run_file

pytestmark = pytest.mark.gloo

GLOBAL_BATCH = 4
# Step → what the last rank's losses are multiplied with, and whether only the gradient sees it.
POISON = {3: (math.nan, False), 5: (math.inf, True), 9: (1000.0, True), 10: (1000.0, False)}
SKIPPED = list(POISON)


def trained_numbers(engine: Any) -> list[torch.Tensor]:
    """Copies of all weights, and of master weights and moments where this rank has them."""
    found = [parameter.detach().clone() for model in engine.models for parameter in model.parameters()]
    for chained in engine.optimizer.chained_optimizers:
        inner = chained.optimizer
        masters = [parameter for group in inner.param_groups for parameter in group["params"]]
        found += [parameter.detach().clone() for parameter in masters]
        found += [value.clone() for p in masters for value in inner.state[p].values() if torch.is_tensor(value)]
    return found


def poison(rank: int, loop: Any) -> list[tuple[int, bool]]:
    """Spoils rank 1's losses at the steps of ``POISON``; the list that it returns will hold (step, weights or moments
    changed) of every step."""
    from llm_parallel.train import step as step_module

    changed: list[tuple[int, bool]] = []
    train_step, terms = loop.train_step, step_module._terms
    now = 0

    def observed_step(run: Any, watch: Any) -> Any:
        nonlocal now
        before, now = trained_numbers(run.engine), run.state.step + 1
        outcome = train_step(run, watch)
        after = trained_numbers(run.engine)
        same = len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after))
        changed.append((now, not same))
        return outcome

    def spoiled_terms(*arguments: Any) -> Any:
        total, count, report = terms(*arguments)
        factor, gradient_only = POISON.get(now, (1.0, False)) if rank == 1 else (1.0, False)
        if factor == 1.0:
            return total, count, report
        return total * factor, count, report if gradient_only else {"sums": report["sums"] * torch.tensor([factor, 1])}

    loop.train_step, step_module._terms = observed_step, spoiled_terms
    return changed


@pytest.fixture(scope="module", params=["dp", "pp"])
def poisoned(request: pytest.FixtureRequest, corpus: Corpus, tmp_path_factory: Any) -> tuple[Path, list[Any]]:
    """A run of two ranks of which rank 1 (the last stage, in a pipeline) finds bad losses."""
    folder = tmp_path_factory.mktemp("poisoned")
    guard = {"spike_min_steps": 4, "spike_window_steps": 8, "max_consecutive_skips": 3}
    run_file = write_run_file(corpus, folder, train={"guard": guard})
    return folder / "run", train_in_ranks(run_file, 2, f"parallel.{request.param}=2", prepare=poison)


def test_bad_steps_are_skipped_on_every_rank(poisoned: tuple[Path, list[Any]]) -> None:
    for changed in poisoned[1]:
        assert changed == [(step, step not in SKIPPED) for step in range(1, 13)]


def test_skipped_samples_are_named(poisoned: tuple[Path, list[Any]]) -> None:
    found = events(poisoned[0], "skip")
    assert [event["step"] for event in found] == SKIPPED
    for event, reason in zip(found, ("loss nan", "gradient norm", "gradient norm", "loss")):
        assert event["reason"].startswith(reason)
        first = (event["step"] - 1) * GLOBAL_BATCH
        assert (event["first_sample"], event["last_sample"]) == (first, first + GLOBAL_BATCH - 1)


def test_training_goes_on_after_skips(poisoned: tuple[Path, list[Any]]) -> None:
    records = [record for record in read_records(poisoned[0] / "metrics.jsonl") if "train/num_skipped" in record]
    assert [record["step"] for record in records if record["train/skipped"]] == SKIPPED
    assert [record["train/num_skipped"] for record in records] == [0, 0, 1, 1, 2, 2, 2, 2, 3, 4, 4, 4]
    assert records[2]["train/loss"] is None  # JSON has no NaN
    assert records[-1]["train/loss"] < records[0]["train/loss"]


def test_a_run_that_diverges_stops_with_status_1(corpus: Corpus, tmp_path: Path) -> None:
    """A learning rate that no float survives: every step after the first has NaN losses."""
    run_file = write_run_file(corpus, tmp_path, checkpoint={"interval_steps": 1, "keep_last": 100})
    result = llm_parallel(
        "pretrain", run_file, "optim.lr=1e30", "optim.warmup_steps=0", "train.guard.max_consecutive_skips=3"
    )
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    failure, following = result.stderr.splitlines()
    assert failure.startswith("rank 0 of 1 failed") and following.startswith("next: llm-parallel status")
    assert "3 steps in a row were skipped (train.guard.max_consecutive_skips)" in result.stderr
    skipped = events(tmp_path / "run", "skip")
    assert [event["step"] for event in skipped] == [2, 3, 4], "the last batch, which ended the run, is named too"
    saved = (tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt").read_text()
    assert int(saved) == 3, "a save in flight is completed"
