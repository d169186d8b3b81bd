"""Policy gradients over sampled answers: PPO (Schulman et al. 2017, arXiv 1707.06347) and GRPO (Shao et al. 2024, arXiv
2402.03300) differ in their advantages (``advantage.py``) and in how the sum over tokens is divided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llm_parallel.data.batch import Batch
from llm_parallel.objectives.advantage import Estimator, divergence
from llm_parallel.objectives.base import Output, Terms, Unweighted
from llm_parallel.objectives.documents import counted_once, sum_by_document
from llm_parallel.parallel.groups import Groups


@dataclass(frozen=True)
class ClippedPolicy(Unweighted):
    """For every weighted label, with r = exp(log p - old) and the advantage A: -min(r A, clip(r, 1 - clip_low, 1 +
    clip_high) A), times the importance weight, plus ``kl_weight`` times an estimate of the divergence from the
    reference, minus ``entropy_weight`` times the entropy of the model's distribution.

    Columns of the batch, a number for each label: ``old``, its log-probability under the model before this round's
    first step; ``advantage``; ``rollout`` if ``importance_cap`` is given, its log-probability where it was sampled;
    ``reference`` if ``kl_weight`` is not 0. Weights are 1 for what was sampled and 0 for prompts; others weigh labels.

    clip_low, clip_high: DAPO has a larger upper bound (Yu et al. 2025, arXiv 2503.14476). dual_clip: the loss of a
    label with A < 0 is at most -dual_clip A (Ye et al. 2019, arXiv 1912.09729); None: no bound. importance_cap: C of
    the weight min(exp(old - rollout), C), which corrects for what sampled the answer being another program than what
    trains (truncated importance sampling); None: weight 1. estimator: of the divergence, ``k1``, ``k2`` or ``k3``
    (Schulman 2020).

    divided_by: ``token``: the mean over all labels (PPO, DAPO); ``sequence``: the mean over answers of the mean over
    the labels of each (GRPO); ``constant``: the sum over the labels of each answer, divided by ``constant``, in the
    mean over answers (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783).
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    kl_weight: float = 0.0
    estimator: Estimator = "k3"
    entropy_weight: float = 0.0
    importance_cap: float | None = None
    divided_by: Literal["token", "sequence", "constant"] = "token"
    constant: float = 1.0

    @property
    def statistics(self) -> tuple[str, ...]:
        """See ``Objective``: only what is computed."""
        return (
            "loss/policy_avg",
            "policy/approxkl_avg",
            "policy/clipfrac_avg",
            "policy/ratio_error",
            *(("policy/importance",) if self.importance_cap is not None else ()),
            *(("kl",) if self.kl_weight else ()),
            *(("policy/entropy_avg",) if self.entropy_weight else ()),
            "labels",
        )

    @property
    def unit(self) -> Literal["token", "document"]:
        """See ``Objective``."""
        return "token" if self.divided_by == "token" else "document"

    @property
    def reads(self) -> tuple[str, ...]:
        """See ``Objective``."""
        rollout = ("rollout",) if self.importance_cap is not None else ()
        reference = ("reference",) if self.kl_weight else ()
        return ("documents", "old", "advantage", *rollout, *reference)

    @property
    def ratios(self) -> Mapping[str, str]:
        """See ``Objective``: all are means over labels."""
        return {name: "labels" for name in self.statistics if name != "labels"}

    @property
    def loss_options(self) -> Mapping[str, float]:
        """See ``Objective``: the model's entropies are asked for if they have a weight."""
        return {"entropy": 1.0} if self.entropy_weight else {}

    def __call__(self, batch: Batch, groups: Groups, output: Output) -> Terms:
        """See ``Objective``. ``policy/ratio_error`` is the mean of |r - 1|; ``policy/approxkl_avg`` estimates the
        divergence of ``old`` from the model by ``k3``; both are 0 in the first step after sampling."""
        losses, entropies = output if isinstance(output, tuple) else (output, None)
        used = batch.weights != 0
        column = {name: torch.where(used, values, 0.0).to(losses) for name, values in batch.columns.items()}
        logps = torch.where(used, -losses, 0.0)
        ratio = torch.exp(logps - column["old"])
        clipped = ratio.clamp(1.0 - self.clip_low, 1.0 + self.clip_high)
        gain = torch.minimum(ratio * column["advantage"], clipped * column["advantage"])
        if self.dual_clip is not None:
            bounded = torch.maximum(gain, self.dual_clip * column["advantage"])
            gain = torch.where(column["advantage"] < 0, bounded, gain)
        importance = torch.ones_like(ratio)
        if self.importance_cap is not None:
            importance = torch.exp(column["old"] - column["rollout"]).clamp(max=self.importance_cap)
        policy_loss = -gain * importance
        by_token, zero = policy_loss, torch.zeros_like(ratio)
        kl = divergence(logps, column["reference"], self.estimator) if self.kl_weight else zero
        if self.kl_weight:
            by_token = by_token + self.kl_weight * kl
        if entropies is not None:
            by_token = by_token - self.entropy_weight * entropies
        with torch.no_grad():
            acts = (clipped != ratio) & (clipped * column["advantage"] < ratio * column["advantage"])
            numbers = {
                "loss/policy_avg": policy_loss,
                "policy/approxkl_avg": divergence(column["old"], logps, "k3"),
                "policy/clipfrac_avg": acts.to(ratio.dtype),
                "policy/ratio_error": (ratio - 1.0).abs(),
                "policy/importance": importance,
                "kl": kl,
                "policy/entropy_avg": zero if entropies is None else entropies,
                "labels": used.to(ratio.dtype),
            }
            stats = {name: torch.where(used, numbers[name], 0.0).sum() for name in self.statistics}
        total, count = self._divided(batch, groups, torch.where(used, by_token * batch.weights, 0.0))
        return Terms(total, count, stats)

    def _divided(self, batch: Batch, groups: Groups, by_token: Tensor) -> tuple[Tensor, Tensor]:
        """Total and count of weighted losses [b, s] of this process's labels."""
        used = batch.weights != 0
        if self.divided_by == "token":
            return by_token.sum(), used.sum()
        sums, lengths = sum_by_document(torch.stack((by_token, used.to(by_token.dtype))), batch, groups)
        divisors = lengths.clamp(min=1.0) if self.divided_by == "sequence" else self.constant
        here = (lengths > 0).sum() * int(groups.at.cp == 0)
        return counted_once((sums / divisors).sum(), groups), here
