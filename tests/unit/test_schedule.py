"""Learning rate against torch's schedulers and closed forms; batch size ramp-up against Megatron-LM's rule."""

from __future__ import annotations

import pytest
import torch

from llm_parallel.config.tree import OptimConfig, RampUp, TrainConfig
from llm_parallel.train.step_settings import global_batch_size, learning_rate, total_samples


def test_cosine_is_torchs() -> None:
    optim, total = OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=10), 110
    parameter = torch.nn.Parameter(torch.zeros(1))
    reference = torch.optim.SGD([parameter], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=100, eta_min=1e-3)
    for step in range(10, 111):
        assert learning_rate(optim, total, step) == pytest.approx(reference.param_groups[0]["lr"], abs=1e-12)
        reference.step()
        scheduler.step()


def test_warmup_is_linear_and_ends_at_the_peak() -> None:
    optim = OptimConfig(lr=1e-2, warmup_steps=10)
    assert [learning_rate(optim, 100, step) for step in (1, 5, 10)] == pytest.approx([1e-3, 5e-3, 1e-2])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", {1: 1.0, 50: 1.0, 100: 1.0}),
        ("linear", {1: 1 - 0.9 * 0.01, 50: 1 - 0.9 * 0.5, 100: 0.1}),
        ("wsd", {1: 1.0, 80: 1.0, 90: 0.55, 100: 0.1}),
    ],
)
def test_shapes(schedule: str, expected: dict[int, float]) -> None:
    optim = OptimConfig(lr=1.0, min_lr=0.1, schedule=schedule, decay_steps=20 if schedule == "wsd" else None)  # type: ignore[arg-type]
    for step, value in expected.items():
        assert learning_rate(optim, 100, step) == pytest.approx(value)


def test_after_the_decay_the_minimum_stays() -> None:
    assert learning_rate(OptimConfig(lr=1.0, min_lr=0.1, decay_steps=50), 100, 90) == pytest.approx(0.1)


def test_ramp_up_is_megatrons() -> None:
    # Megatron-LM's --rampup-batch-size 16 8 600 to 64: six increments, one for every 100 samples consumed.
    train = TrainConfig(global_batch_size=64, rampup=RampUp(start=16, increment=8, samples=600))
    for consumed in range(900):
        expected = 16 + 8 * (consumed // 100) if consumed <= 600 else 64
        assert global_batch_size(train, consumed) == expected, consumed


def test_total_samples_is_the_sum_of_all_steps() -> None:
    train = TrainConfig(global_batch_size=64, steps=40, rampup=RampUp(start=16, increment=16, samples=600))
    consumed = 0
    for _ in range(40):
        consumed += global_batch_size(train, consumed)
    assert total_samples(train) == consumed
    assert total_samples(TrainConfig(global_batch_size=8, steps=5)) == 40


def test_a_fraction_of_the_steps_is_that_many_steps_of_warmup() -> None:
    by_steps, by_share = OptimConfig(lr=1e-2, warmup_steps=20), OptimConfig(lr=1e-2, warmup_fraction=0.1)
    rates = [[learning_rate(optim, 200, step) for step in range(1, 201)] for optim in (by_steps, by_share)]
    assert rates[0] == rates[1]
