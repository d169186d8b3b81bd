"""Decides whether a step's gradient may reach the weights.

Not finite: skipped always. Spike: loss or gradient norm far above the recent median in robust standard deviations
(median absolute deviation; Hampel 1974). A spike in many batches in a row comes from the weights: a skipped step does
not change them, so the step is applied in the end. All processes see the same numbers and so decide alike.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field

from llm_parallel.config.tree import GuardConfig

LOSS_FLOOR, NORM_FLOOR = 0.02, 0.25
"""The least deviation that a window is assumed to have, as a share of its median: a window of nearly equal numbers says
little about the usual spread. After 40 smooth steps of a small model its healthy norm rose by 30 % from one step to the
next, which was 30 deviations of the window."""


class TooManySkips(RuntimeError):
    """So many steps in a row were skipped that the run stops; ``reason`` says why the last one was."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def robust_zscore(value: float, window: list[float], floor: float) -> float:
    """Distance of ``value`` above the window's median in units of 1.4826 MAD, or of ``floor`` times the median if that
    is more."""
    median = statistics.median(window)
    spread = 1.4826 * statistics.median(abs(x - median) for x in window)
    return (value - median) / max(spread, floor * abs(median), 1e-12)


def not_finite(loss: float, grad_norm: float) -> str | None:
    """Which of the two is NaN or infinite, or None."""
    for name, value in (("loss", loss), ("gradient norm", grad_norm)):
        if not math.isfinite(value):
            return f"{name} {value}"
    return None


@dataclass
class Guard:
    """Keeps windows of applied steps; ``state`` and ``restore`` carry them through a checkpoint."""

    config: GuardConfig
    losses: deque[float] = field(init=False)
    grad_norms: deque[float] = field(init=False)
    consecutive_skips: int = 0

    def __post_init__(self) -> None:
        self.losses = deque(maxlen=self.config.spike_window_steps)
        self.grad_norms = deque(maxlen=self.config.spike_window_steps)

    def judge(self, loss: float, grad_norm: float, wrong: str | None = None) -> str | None:
        """Why this step must be skipped, or None; remembers applied steps. ``wrong``: what is not finite of another
        model that the step trains. Raises TooManySkips."""
        reason = not_finite(loss, grad_norm) or wrong
        if reason is None:
            reason = self._spike(loss, grad_norm)
            if reason is None:
                self.consecutive_skips = 0
            if reason is None or self.consecutive_skips >= self.config.max_spike_skips:
                self.losses.append(loss)
                self.grad_norms.append(grad_norm)
                return None
        self.consecutive_skips += 1
        if self.consecutive_skips >= self.config.max_consecutive_skips:
            raise TooManySkips(
                f"{self.consecutive_skips} steps in a row were skipped (train.guard.max_consecutive_skips); the last "
                f"because of {reason}. Lower optim.lr, or look at the batches named in events.jsonl",
                reason,
            )
        return reason

    def _spike(self, loss: float, grad_norm: float) -> str | None:
        limit = self.config.spike_zscore
        if limit is None or len(self.losses) < self.config.spike_min_steps:
            return None
        for name, value, window, floor in (
            ("loss", loss, self.losses, LOSS_FLOOR),
            ("gradient norm", grad_norm, self.grad_norms, NORM_FLOOR),
        ):
            score = robust_zscore(value, list(window), floor)
            if score > limit:
                return f"{name} {value:.4g}, {score:.1f} robust deviations above the median of {len(window)} steps"
        return None

    def state(self) -> dict[str, list[float]]:
        """Windows as plain lists."""
        return {"losses": list(self.losses), "grad_norms": list(self.grad_norms)}

    def restore(self, state: dict[str, list[float]], consecutive_skips: int) -> None:
        """Continues from ``state``."""
        self.losses.extend(state.get("losses", []))
        self.grad_norms.extend(state.get("grad_norms", []))
        self.consecutive_skips = consecutive_skips
