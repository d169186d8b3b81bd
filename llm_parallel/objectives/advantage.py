"""What an action was worth: advantages and returns of sampled answers, computed on whole answers before training.

Shapes: answers by tokens, [n, t]; ``mask`` [n, t] is True for an answer's own tokens, which are consecutive.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]


def divergence(logps: Tensor, others: Tensor, estimator: Estimator) -> Tensor:
    """An estimate for each label, sampled from p, of the divergence of p from q, with x = log q - log p: k1 = -x, k2 =
    x^2 / 2, k3 = exp(x) - 1 - x, which is never negative (Schulman 2020, "Approximating KL divergence")."""
    x = others - logps
    if estimator == "k1":
        return -x
    return x**2 / 2 if estimator == "k2" else torch.exp(x) - 1.0 - x


def token_rewards(
    scores: Tensor, mask: Tensor, logps: Tensor | None = None, reference: Tensor | None = None, kl_weight: float = 0.0
) -> Tensor:
    """The reward of each token, [n, t]: an answer's score [n] at its last token, minus ``kl_weight`` (log p - log q) at
    each (KL in the reward; Ouyang et al. 2022, arXiv 2203.02155)."""
    rewards = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
    if kl_weight:
        assert logps is not None and reference is not None
        rewards = torch.where(mask, -kl_weight * (logps - reference).double(), 0.0)
    places = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, places, -1).max(1).values
    return rewards + scores.double()[:, None] * (places == last[:, None])


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2015, arXiv 1506.02438): advantages, the sum over k of (gamma
    lam)^k delta_{t+k} with delta_t = reward_t + gamma value_{t+1} - value_t within the answer, and returns, advantage +
    value; fp32 [n, t], 0 outside of answers. Sums are fp64."""
    earned, own = rewards.double(), mask.double()
    worth = torch.where(mask, values.double(), 0.0)
    following = torch.cat((worth[:, 1:], torch.zeros_like(worth[:, :1])), dim=1)
    delta = (earned + gamma * following - worth) * own
    advantages = torch.zeros_like(delta)
    last = torch.zeros_like(delta[:, 0])
    for place in range(delta.shape[1] - 1, -1, -1):
        last = (delta[:, place] + gamma * lam * last) * own[:, place]
        advantages[:, place] = last
    return advantages.float(), ((advantages + worth) * own).float()


def whitened(advantages: Tensor, mask: Tensor) -> Tensor:
    """Advantages with mean 0 and standard deviation 1 over all tokens of all answers; 0 outside of them."""
    chosen = advantages[mask].double()
    if not len(chosen):
        return torch.zeros_like(advantages)
    scale = chosen.std(unbiased=False) + 1e-8
    return torch.where(mask, (advantages - chosen.mean()) / scale, 0.0).to(advantages.dtype)


def group_advantages(scores: Tensor, by_std: bool = True, leave_one_out: bool = False) -> Tensor:
    """Scores [prompts, k] of k answers to each prompt, compared with the mean of their group (GRPO; Shao et al. 2024,
    arXiv 2402.03300), fp32 [prompts, k].

    by_std: divided by the group's standard deviation; without it, easy and hard prompts weigh the same (Dr. GRPO; Liu
    et al. 2025, arXiv 2503.20783). leave_one_out: compared with the mean of the others (RLOO; Ahmadian et al. 2024,
    arXiv 2402.14740). Groups whose scores are all the same have advantages of 0.
    """
    exact = scores.double()
    k = exact.shape[1]
    assert k > 1, "a group has at least two answers"
    gaps = exact - exact.mean(1, keepdim=True)
    if leave_one_out:
        gaps = gaps * k / (k - 1)
    if by_std:
        gaps = gaps / (exact.std(1, keepdim=True) + 1e-4)
    return gaps.float()
