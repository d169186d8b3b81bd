"""Training by preferences: answers that are compared or judged in, a model that prefers the better ones out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from llm_parallel.checkpoint.state import TrainState
from llm_parallel.config.tree import RunConfig
from llm_parallel.data.batch import Batch
from llm_parallel.data.group_data import GroupData, GroupSamples
from llm_parallel.objectives.base import Objective
from llm_parallel.objectives.dpo import DPO
from llm_parallel.objectives.kto import KTO, Gain
from llm_parallel.objectives.reward import RewardPairs
from llm_parallel.objectives.rrhf import RRHF
from llm_parallel.parallel.engine import POLICY, network_of
from llm_parallel.parallel.groups import Groups
from llm_parallel.train.feed import FeedToCome, SampleFeed, held_out_batches, no_held_out, row_lengths
from llm_parallel.train.open import Method
from llm_parallel.train.run import Run
from llm_parallel.train.step import evaluate
from llm_parallel.tune.reference import REFERENCE, LiveReference, is_the_base, scored, second_model


@lru_cache(maxsize=1)
def _opened(folder: str) -> GroupData:
    return GroupData.open(folder)


def preferences(config: RunConfig) -> GroupData:
    """The prepared preferences of a run, which the process that started it has written."""
    assert config.chat.prepared is not None, "preferences are prepared before processes start"
    return _opened(config.chat.prepared)


def promised(config: RunConfig, groups: Groups, state: TrainState) -> FeedToCome:
    """The run's feed until ``begin``."""
    samples = preferences(config).training(config.seed)
    return FeedToCome(("documents", *samples.offers, *((REFERENCE,) if reads_reference(config) else ())))


class PreferenceFeed(SampleFeed):
    """Samples of preferences; records the epoch, which is the number of passes over ``chat.train``."""

    def __init__(self, config: RunConfig, groups: Groups, state: TrainState, samples: GroupSamples) -> None:
        self._packer = samples.packer
        lengths = row_lengths(config, groups, samples.packer)
        super().__init__(config, groups, state.consumed_samples, samples, samples.offers, lengths=lengths)

    def progress(self, state: TrainState) -> Mapping[str, float]:
        """The epoch, with its fraction."""
        epoch, place = self._packer.locate(state.consumed_samples)
        return {"epoch": epoch + place / self._packer.samples_of(epoch)}


def objective_of(config: RunConfig) -> Objective:
    """What the run's method minimises, given all that it reads."""
    method = config.method
    if config.trains == "dpo":
        return DPO(**method.dpo.model_dump())
    if config.trains == "kto":
        return KTO(divergence, method.kto.beta, *kto_weights(config, preferences(config)))
    if config.trains == "rrhf":
        return RRHF(method.rrhf.best_weight, method.rrhf.mean_best)
    return RewardPairs(method.reward.center_weight, method.reward.margins)


def reads_reference(config: RunConfig) -> bool:
    """Whether the run's method has a reference model."""
    return config.trains == "kto" or (config.trains == "dpo" and config.method.dpo.loss not in ("simpo", "orpo"))


def in_memory(config: RunConfig) -> bool:
    """Whether the reference is computed in every step."""
    return reads_reference(config) and config.method.reference.keep == "memory"


def preference_loss(config: RunConfig) -> Objective:
    """The run's objective, which computes the reference itself if that is kept in memory."""
    objective = objective_of(config)
    return LiveReference(objective, is_the_base(config)) if in_memory(config) else objective


def kto_weights(config: RunConfig, data: GroupData) -> tuple[float, float]:
    """Weights of answers that were liked and of the others: as given; if neither is, such that both kinds weigh the
    same over the training data, and none less than 1."""
    given = config.method.kto
    if given.desirable_weight is not None or given.undesirable_weight is not None:
        return given.desirable_weight or 1.0, given.undesirable_weight or 1.0
    good, bad = data.liked
    if not good or not bad:
        return 1.0, 1.0
    return max(bad / good, 1.0), max(good / bad, 1.0)


def divergence(models: Mapping[str, Any], batches: Sequence[Batch]) -> float:
    """How far the policy is from the reference on answers to other prompts: see ``KTO``. Collective."""
    beside = [batch.mismatched for batch in batches]
    mean, _, _ = evaluate(network_of(models[POLICY]), Gain(), [one for one in beside if one is not None])
    return mean


def begin(run: Run) -> None:
    """Gives the run its data with all that its objective reads, before its first step. Collective."""
    config, data = run.config, preferences(run.config)
    if in_memory(config):
        if not is_the_base(config):
            run.besides[REFERENCE] = second_model(config, run.groups)
    elif reads_reference(config):
        data = scored(run, data)
    run.feed = PreferenceFeed(config, run.groups, run.state, data.training(config.seed))
    if data.held_out_rows:
        wanted = min(config.train.eval_samples, data.held_out_rows)
        samples = data.held_out()
        lengths = row_lengths(config, run.groups, samples.packer)
        run.held_out = held_out_batches(config, run.groups, samples, wanted, lengths)


PREFER = Method(
    objective=preference_loss,
    evaluation=preference_loss,
    feed=promised,
    held_out=no_held_out,
    begin=begin,
)
