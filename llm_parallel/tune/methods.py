"""What a run's configuration trains for, as the training loop wants it."""

from __future__ import annotations

from dataclasses import replace

from llm_parallel.config.tree import RunConfig
from llm_parallel.config.tree_online import ONLINE
from llm_parallel.config.tree_tune import PREFERENCES
from llm_parallel.train.open import PRETRAINING, Method
from llm_parallel.tune.prefer import PREFER
from llm_parallel.tune.rounds import PPO, ROUNDS
from llm_parallel.tune.sft import SFT

METHODS = {
    "pretrain": PRETRAINING,
    "sft": SFT,
    **dict.fromkeys(PREFERENCES, PREFER),
    **dict.fromkeys(ONLINE, ROUNDS),
    "ppo": PPO,
}


def method_of(config: RunConfig) -> Method:
    """The method of a run, with the scoring of ``evaluate.tasks`` if it has any."""
    method = METHODS[config.trains]
    if not config.evaluate.tasks:
        return method
    from llm_parallel.evaluate.training import scoring_of

    return replace(method, scoring=scoring_of)
