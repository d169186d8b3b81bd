"""Objectives over answers against fp64 references written from their papers: total, count, statistics, gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_parallel.data.batch import Batch
from llm_parallel.objectives import advantage
from llm_parallel.objectives.base import reported
from llm_parallel.objectives.dpo import DPO
from llm_parallel.objectives.kto import KTO, Gain
from llm_parallel.objectives.policy import ClippedPolicy
from llm_parallel.objectives.reward import RewardPairs
from llm_parallel.objectives.rrhf import RRHF
from llm_parallel.objectives.value import ClippedValue
from tests.support import preference_math
from tests.unit.test_objectives import ALONE, batch_of

ROWS = [[4, 3, 2, 3, 4], [5, 4, 3, 2, 2]]
"""Documents of two rows; the last of each is padding."""
SEEDS = st.integers(0, 2**32 - 1)


def answers(seed: int) -> tuple[Batch, Tensor]:
    """A batch with all columns and facts; the last document of each row has no label that counts."""
    random = np.random.default_rng(seed)
    batch, losses = batch_of(seed, ROWS)
    for row, lengths in enumerate(ROWS):
        batch.weights[row, sum(lengths[:-1]) :] = 0.0
    names = ("old", "rollout", "advantage", "return", "value")
    columns = {name: torch.tensor(random.normal(size=losses.shape)) for name in names}
    near = -losses.detach() + torch.tensor(random.normal(size=losses.shape) * 0.3)
    columns |= {"old": near, "rollout": near + 0.4 * columns["rollout"], "reference": batch.columns["reference"]}
    facts = {
        "group": torch.tensor([[1.0, 1.0, 2.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0, 0.0]]),
        "score": torch.tensor(random.choice([0.0, 1.0, 2.0], (2, 5))),
        "margin": torch.tensor(random.exponential(size=(2, 5))),
    }
    return replace(batch, columns=columns, facts=facts), losses


def agrees(objective: Any, batch: Batch, losses: Tensor, total: Tensor, count: int) -> dict[str, float]:
    """Compares with a reference that depends on ``losses``; returns the statistics as reported."""
    found = objective(batch, ALONE, losses)
    assert found.total.item() == pytest.approx(total.item(), rel=1e-9, abs=1e-10)
    assert found.count.item() == count
    mine = torch.autograd.grad(found.total, losses)[0] if found.total.requires_grad else torch.zeros_like(losses)
    theirs = torch.autograd.grad(total, losses)[0] if total.requires_grad else torch.zeros_like(losses)
    np.testing.assert_allclose(mine, theirs, rtol=1e-8, atol=1e-10)
    assert tuple(found.stats) == objective.statistics
    return reported(objective, {name: float(value) for name, value in found.stats.items()}, float(found.count))


PAIR_LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "conservative": {"label_smoothing": 0.2},
    "robust": {"loss": "robust", "label_smoothing": 0.2},
    "hinge": {"loss": "hinge"},
    "ipo": {"loss": "ipo"},
    "normalised": {"length_normalised": True},
    "with sft": {"sft_weight": 0.7},
    "simpo": {"loss": "simpo", "gamma": 0.3},
    "orpo": {"loss": "orpo"},
}
NAMES = {"label_smoothing": "smoothing", "length_normalised": "normalised", "sft_weight": "sft"}


@pytest.mark.parametrize("name", PAIR_LOSSES)
@settings(max_examples=20)
@given(seed=SEEDS, beta=st.sampled_from([0.1, 0.7]))
def test_losses_over_pairs(name: str, seed: int, beta: float) -> None:
    batch, losses = answers(seed)
    given_ = {NAMES.get(key, key): value for key, value in PAIR_LOSSES[name].items()}
    total, count = preference_math.dpo(preference_math.documents_of(batch, losses), beta, **given_)
    said = agrees(DPO(beta, **PAIR_LOSSES[name]), batch, losses, total, count)
    pairs = preference_math.pairs_of(preference_math.documents_of(batch, losses.detach()))
    if not pairs:
        return
    assert said["logps/chosen"] == pytest.approx(np.mean([w.logp for w, _ in pairs]))
    assert said["nll_loss"] == pytest.approx(np.mean([-w.logp / w.length for w, _ in pairs]))
    if name not in ("simpo", "orpo"):
        assert said["rewards/margins"] == pytest.approx(np.mean([beta * (w.gain - x.gain) for w, x in pairs]))
        assert said["rewards/accuracies"] == np.mean([float(w.gain > x.gain) for w, x in pairs])


def test_odds_of_a_certain_answer_are_finite() -> None:
    batch, losses = answers(0)
    found = DPO(loss="orpo")(batch, ALONE, losses * 0.0)
    assert torch.isfinite(found.total)
    assert torch.isfinite(torch.autograd.grad(found.total, losses)[0]).all()


@settings(max_examples=30)
@given(SEEDS, st.sampled_from([-1.0, 0.0, 2.5]))
def test_kto(seed: int, divergence: float) -> None:
    batch, losses = answers(seed)
    batch = replace(batch, facts={**batch.facts, "score": (batch.facts["score"] > 0.5).double()})
    objective = KTO(lambda models, batches: divergence, 0.3, 1.3, 0.8)
    (ready,) = objective.prepare({}, [batch])
    documents = preference_math.documents_of(batch, losses)
    kl = max(divergence, 0.0)
    said = agrees(objective, ready, losses, *preference_math.kto(documents, 0.3, kl, 1.3, 0.8))
    assert said["kl"] == pytest.approx(kl)
    liked = [0.3 * float(one.gain.detach()) for one in documents if one.facts["score"] == 1.0]
    if liked:
        assert said["rewards/chosen"] == pytest.approx(np.mean(liked))
    else:
        assert "rewards/chosen" not in said
    again = preference_math.documents_of(batch, losses)
    gains = sum((one.gain for one in again), torch.zeros((), dtype=torch.float64))
    agrees(Gain(), batch, losses, gains, len(documents))


@settings(max_examples=30)
@given(SEEDS, st.sampled_from([(1.0, False), (0.5, True), (0.0, False)]))
def test_rrhf(seed: int, best: tuple[float, bool]) -> None:
    batch, losses = answers(seed)
    documents = preference_math.documents_of(batch, losses)
    said = agrees(RRHF(*best), batch, losses, *preference_math.rrhf(documents, *best))
    groups = len({(one.row, one.facts["group"]) for one in documents})
    if groups:
        ranks, _ = preference_math.rrhf(documents, 0.0, False)
        assert said["rank_loss"] == pytest.approx(ranks.item() / groups, abs=1e-12)


@settings(max_examples=20)
@given(SEEDS, st.booleans())
def test_reward_model(seed: int, margins: bool) -> None:
    batch, values = answers(seed)
    ends = torch.zeros_like(batch.weights)
    pairs = []
    for row, lengths in enumerate(ROWS):
        last = np.cumsum(lengths)[:4] - 1
        ends[row, last] = 1.0
        margin = batch.facts["margin"][row].tolist()
        pairs += [(values[row, last[i]], values[row, last[i + 1]], margin[i] if margins else 0.0) for i in (0, 2)]
    said = agrees(
        RewardPairs(0.05, margins), replace(batch, weights=ends), values, *preference_math.reward(pairs, 0.05)
    )
    assert said["rewards/accuracies"] == np.mean([float(chosen > rejected) for chosen, rejected, _ in pairs])


POLICIES: dict[str, dict[str, Any]] = {
    "ppo": {},
    "higher": {"clip_high": 0.4},
    "dual": {"dual_clip": 3.0},
    "k1": {"kl_weight": 0.1, "estimator": "k1"},
    "k2": {"kl_weight": 0.1, "estimator": "k2"},
    "k3": {"kl_weight": 0.1},
    "importance": {"importance_cap": 1.1},
    "sequence": {"divided_by": "sequence", "kl_weight": 0.1},
    "constant": {"divided_by": "constant", "constant": 7.0},
}


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=15)
@given(seed=SEEDS)
def test_policies(name: str, seed: int) -> None:
    batch, losses = answers(seed)
    chosen = {"clip_low": 0.2, "clip_high": 0.2} | POLICIES[name]
    words = {"clip_low": "low", "clip_high": "high", "dual_clip": "dual", "importance_cap": "cap"}
    given_ = {words.get(key, key): value for key, value in chosen.items()}
    documents = preference_math.documents_of(batch, losses)
    said = agrees(ClippedPolicy(**chosen), batch, losses, *preference_math.policy(documents, **given_))
    if documents:
        ratios = torch.cat([torch.exp(one.logps - one.columns["old"]) for one in documents])
        assert said["policy/ratio_error"] == pytest.approx(float((ratios - 1).abs().mean().detach()))


def test_the_first_step_after_sampling_has_a_ratio_of_exactly_1() -> None:
    batch, losses = answers(3)
    batch = replace(batch, columns={**batch.columns, "old": -losses.detach()})
    found = ClippedPolicy()(batch, ALONE, losses)
    assert found.stats["policy/ratio_error"].item() == found.stats["policy/approxkl_avg"].item() == 0.0
    assert found.stats["policy/clipfrac_avg"].item() == 0.0


def test_entropies_are_subtracted() -> None:
    batch, losses = answers(4)
    plain = ClippedPolicy()(batch, ALONE, losses)
    objective = ClippedPolicy(entropy_weight=0.5)
    assert objective.loss_options == {"entropy": 1.0} and not ClippedPolicy().loss_options
    entropies = torch.rand(losses.shape, dtype=torch.float64, requires_grad=True)
    found = objective(batch, ALONE, (losses, entropies))
    subtracted = 0.5 * (entropies * batch.weights).sum()
    assert found.total.item() == pytest.approx((plain.total - subtracted).item())
    np.testing.assert_allclose(torch.autograd.grad(found.total, entropies)[0], -0.5 * batch.weights)


@settings(max_examples=20)
@given(SEEDS, st.sampled_from([0.2, None]))
def test_clipped_values(seed: int, clip: float | None) -> None:
    batch, values = answers(seed)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for one in preference_math.documents_of(batch, -values):
        for v, earned, before, weight in zip(one.logps, one.columns["return"], one.columns["value"], one.weights):
            square = (v - earned) ** 2
            if clip is not None:
                bounded = before + torch.clamp(v - before, -clip, clip)
                square = torch.maximum(square, (bounded - earned) ** 2)
            total, count = total + 0.5 * square * weight, count + 1
    agrees(ClippedValue(clip), batch, values, total, count)


@settings(max_examples=30)
@given(SEEDS, st.sampled_from([(1.0, 0.95), (0.9, 1.0), (0.97, 0.0)]))
def test_advantages_are_their_definition(seed: int, factors: tuple[float, float]) -> None:
    random = torch.Generator().manual_seed(seed)
    values, logps, reference = (torch.randn(4, 9, generator=random) for _ in range(3))
    scores = torch.randn(4, generator=random)
    mask = torch.zeros(4, 9, dtype=torch.bool)
    spans = [(0, 9), (2, 7), (8, 9), (1, 4)]
    for row, (start, end) in enumerate(spans):
        mask[row, start:end] = True
    rewards = advantage.token_rewards(scores, mask, logps, reference, 0.1)
    found, returns = advantage.gae(rewards, values, mask, *factors)
    for row, (start, end) in enumerate(spans):
        earned = [-0.1 * float(logps[row, t] - reference[row, t]) for t in range(start, end)]
        earned[-1] += float(scores[row])
        wanted, back = preference_math.gae(earned, values[row, start:end].tolist(), *factors)
        np.testing.assert_allclose(found[row, start:end], wanted, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(returns[row, start:end], back, rtol=1e-5, atol=1e-6)
        assert not found[row][~mask[row]].any() and not returns[row][~mask[row]].any()
    flat = advantage.whitened(found, mask)[mask].double()
    assert float(flat.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(flat.std(unbiased=False)) == pytest.approx(1.0, abs=1e-5)


def test_advantages_within_groups() -> None:
    scores = torch.tensor([[1.0, 0.0, 0.0, 3.0], [2.0, 2.0, 2.0, 2.0]])
    std = np.std([1, 0, 0, 3], ddof=1)
    np.testing.assert_allclose(
        advantage.group_advantages(scores)[0], np.array([0, -1, -1, 2]) / (std + 1e-4), rtol=1e-6
    )
    np.testing.assert_allclose(advantage.group_advantages(scores, by_std=False)[0], [0, -1, -1, 2])
    alone = advantage.group_advantages(scores, by_std=False, leave_one_out=True)
    np.testing.assert_allclose(alone[0], [1 - 1, 0 - 4 / 3, 0 - 4 / 3, 3 - 1 / 3], rtol=1e-6)
    assert not advantage.group_advantages(scores)[1].any()


def test_estimates_of_a_divergence_have_its_mean() -> None:
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.5, 0.3])
    exact = (p * np.log(p / q)).sum()
    logs = torch.tensor(np.log(p)), torch.tensor(np.log(q))
    for estimator in ("k1", "k3"):
        assert float((torch.tensor(p) * advantage.divergence(*logs, estimator)).sum()) == pytest.approx(exact)
    np.testing.assert_allclose(advantage.divergence(*logs, "k2"), np.log(p / q) ** 2 / 2)
