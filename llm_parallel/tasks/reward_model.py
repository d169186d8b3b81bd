"""A reward model as a judge: what a model with a value head says of the prompt with the answer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llm_parallel.tasks.base import Asked, Given, JudgeFailed


@dataclass(frozen=True)
class RewardModel:
    """Passes on what the model in ``folder`` said. The processes of a run compute that for many answers together, in
    their layout (``tune/reward_model.py``), since no single process holds the model. ``number``: of the judge."""

    number: int
    folder: str

    def __call__(self, asked: Asked, given: Given) -> float:
        """See ``Judge``."""
        value = given.values.get(self.number)
        if value is None:
            raise JudgeFailed(
                f"the reward model in {self.folder} was not asked (for {asked.where}); it judges in the processes of "
                "`llm-parallel prefer`"
            )
        if not math.isfinite(value):
            raise JudgeFailed(f"the reward model in {self.folder} says {value} (for {asked.where})")
        return value
