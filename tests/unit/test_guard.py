"""Which steps are skipped, and when the run is stopped."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_parallel.config.tree import GuardConfig
from llm_parallel.train.guard import Guard, TooManySkips, robust_zscore


def filled(steps: int = 64, **config: float) -> Guard:
    guard = Guard(GuardConfig(**config))  # type: ignore[arg-type]
    random = np.random.default_rng(0)
    for _ in range(steps):
        assert guard.judge(3.0 + 0.1 * random.standard_normal(), 1.0 + 0.1 * random.standard_normal()) is None
    return guard


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient norm"])
def test_not_finite_is_skipped_from_the_first_step(bad: float, where: str) -> None:
    guard = Guard(GuardConfig())
    reason = guard.judge(*((bad, 1.0) if where == "loss" else (1.0, bad)))
    assert reason is not None and where in reason
    assert not guard.losses, "a skipped step leaves no trace in the window"


@pytest.mark.parametrize(("loss", "norm", "name"), [(9.0, 1.0, "loss"), (3.0, 50.0, "gradient norm")])
def test_a_spike_is_skipped_and_named(loss: float, norm: float, name: str) -> None:
    reason = filled().judge(loss, norm)
    assert reason is not None and reason.startswith(name)


def test_what_is_not_finite_of_another_model_skips_the_step() -> None:
    guard = Guard(GuardConfig())
    assert guard.judge(1.0, 1.0, "loss nan of the critic") == "loss nan of the critic" and not guard.losses
    assert guard.judge(math.nan, 1.0, "loss nan of the critic") == "loss nan"


def test_a_fall_is_no_spike() -> None:
    assert filled().judge(0.5, 0.01) is None


def test_spikes_pass_before_the_window_has_enough_steps_and_when_switched_off() -> None:
    assert filled(20, spike_min_steps=32).judge(9.0, 50.0) is None
    assert filled(64, spike_zscore=None).judge(9.0, 50.0) is None  # type: ignore[arg-type]


def test_equal_losses_have_a_floor_of_spread() -> None:
    guard = Guard(GuardConfig())
    for _ in range(64):
        guard.judge(3.0, 1.0)
    assert guard.judge(3.0001, 1.0001) is None
    assert guard.judge(4.0, 1.0) is not None


def test_too_many_in_a_row_stop_the_run() -> None:
    guard = filled(max_consecutive_skips=3)
    guard.judge(math.nan, 1.0)
    guard.judge(math.nan, 1.0)
    assert guard.judge(3.0, 1.0) is None, "a good step resets the count"
    guard.judge(math.nan, 1.0)
    guard.judge(math.nan, 1.0)
    with pytest.raises(TooManySkips, match="max_consecutive_skips"):
        guard.judge(math.nan, 1.0)


def test_a_spike_that_outlasts_the_batches_is_applied_until_it_ends() -> None:
    """Skipped steps leave the weights where the gradient is steep: without this the run would stand still and end."""
    guard = filled(max_spike_skips=2)
    assert [guard.judge(3.0, 50.0) is None for _ in range(14)] == [False, False] + 12 * [True]
    assert guard.judge(3.0, math.nan) is not None, "NaN is never applied"
    assert guard.judge(3.0, 1.0) is None
    assert guard.judge(3.0, 50.0) is not None, "a good step begins the count anew"


def test_state_carries_the_decision_through_a_restart() -> None:
    guard = filled()
    resumed = Guard(GuardConfig())
    resumed.restore(guard.state(), 2)
    assert resumed.judge(3.9, 1.0) == guard.judge(3.9, 1.0)
    assert resumed.state() == guard.state()


def test_a_healthy_rise_after_a_smooth_window_is_no_spike() -> None:
    """What a small model shows after 40 steps: a norm that hardly moved rises by a third. Ten times is a spike."""
    guard = Guard(GuardConfig())
    for step in range(40):
        guard.judge(5.0 - 0.01 * step, 1.0 + 0.002 * (step % 3))
    assert guard.judge(4.6, 1.34) is None and guard.judge(4.7, 1.5) is None
    assert guard.judge(4.6, 10.0) is not None and guard.judge(6.5, 1.0) is not None


@given(st.lists(st.floats(1, 10), min_size=8, max_size=64), st.floats(0, 100), st.sampled_from([0.02, 0.25]))
def test_zscore_is_the_textbooks(window: list[float], value: float, floor: float) -> None:
    median = np.median(window)
    spread = max(1.4826 * np.median(np.abs(np.array(window) - median)), floor * abs(median), 1e-12)
    assert robust_zscore(value, window, floor) == pytest.approx((value - median) / spread)
