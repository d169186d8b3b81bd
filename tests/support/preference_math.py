"""The losses of preference methods, written from their papers, one document after the other, in fp64.

A document is what ``Document`` holds: tensors over its weighted labels. Every function returns the sum of the loss over
its units as a tensor that torch can differentiate, and the number of units.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llm_parallel.data.batch import Batch


@dataclass
class Document:
    """Log-probabilities of the labels that count, log-probabilities of a reference, turn weights, other columns, and
    the facts of the document."""

    row: int
    number: int
    logps: Tensor
    weights: Tensor
    columns: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def logp(self) -> Tensor:
        return (self.weights * self.logps).sum()

    @property
    def gain(self) -> Tensor:
        return self.logp - (self.weights * self.columns["reference"]).sum()

    @property
    def length(self) -> int:
        return len(self.logps)


def documents_of(batch: Batch, losses: Tensor) -> list[Document]:
    """All documents of a batch that have a label that counts; ``losses`` [b, s] as the model's output."""
    assert batch.documents is not None
    found = []
    for row, starts in enumerate(batch.documents.starts):
        edges = [*starts.tolist(), losses.shape[1]]
        for number, (start, end) in enumerate(itertools.pairwise(edges)):
            labels = [at for at in range(start, end) if float(batch.weights[row, at]) != 0.0]
            if labels:
                columns = {name: column[row, labels].double() for name, column in batch.columns.items()}
                facts = {name: float(values[row, number]) for name, values in batch.facts.items()}
                weights = batch.weights[row, labels].double()
                found.append(Document(row, number, -losses[row, labels].double(), weights, columns, facts))
    return found


def pairs_of(documents: Sequence[Document]) -> list[tuple[Document, Document]]:
    """Documents 2i and 2i + 1 of a row."""
    by_place = {(one.row, one.number): one for one in documents}
    return [
        (one, by_place[one.row, one.number + 1])
        for one in documents
        if one.number % 2 == 0 and (one.row, one.number + 1) in by_place
    ]


def sigmoid(x: Tensor) -> Tensor:
    return 1.0 / (1.0 + torch.exp(-x))


def dpo(
    documents: Sequence[Document],
    beta: float,
    loss: str = "sigmoid",
    smoothing: float = 0.0,
    normalised: bool = False,
    sft: float = 0.0,
    gamma: float = 0.0,
) -> tuple[Tensor, int]:
    """Rafailov et al. 2023 eq. 7; Mitchell 2023; Chowdhury et al. 2024 eq. 12; Zhao et al. 2023; Azar et al. 2023 eq.
    17; Meng et al. 2024 eq. 6; Hong et al. 2024 eq. 6 and 7."""
    total, pairs = torch.zeros((), dtype=torch.float64), pairs_of(documents)
    for w, x in pairs:
        if loss == "simpo":
            one = -torch.log(sigmoid(beta / w.length * w.logp - beta / x.length * x.logp - gamma))
        elif loss == "orpo":
            p_w, p_l = torch.exp(w.logp / w.length), torch.exp(x.logp / x.length)
            ratio = (p_w / (1 - p_w)) / (p_l / (1 - p_l))
            one = -w.logp / w.length + beta * -torch.log(sigmoid(torch.log(ratio)))
        else:
            scale_w, scale_l = (1 / w.length, 1 / x.length) if normalised or loss == "ipo" else (1.0, 1.0)
            h = w.gain * scale_w - x.gain * scale_l
            if loss == "ipo":
                one = (h - 1 / (2 * beta)) ** 2
            elif loss == "hinge":
                one = torch.clamp(1 - beta * h, min=0.0)
            else:
                right, flipped = -torch.log(sigmoid(beta * h)), -torch.log(sigmoid(-beta * h))
                one = (1 - smoothing) * right + smoothing * flipped
                if loss == "robust":
                    one = ((1 - smoothing) * right - smoothing * flipped) / (1 - 2 * smoothing)
        total = total + one + sft * (-w.logp / w.length)
    return total, len(pairs)


def kto(documents: Sequence[Document], beta: float, kl: float, desirable: float, undesirable: float) -> Any:
    """Ethayarajh et al. 2024, eq. 7 and 8: lambda_y - v(x, y)."""
    total = torch.zeros((), dtype=torch.float64)
    for one in documents:
        if one.facts["score"] > 0.5:
            total = total + desirable - desirable * sigmoid(beta * (one.gain - kl))
        else:
            total = total + undesirable - undesirable * sigmoid(beta * (kl - one.gain))
    return total, len(documents)


def rrhf(documents: Sequence[Document], best_weight: float, mean_best: bool) -> tuple[Tensor, int]:
    """Yuan et al. 2023, eq. 1 to 4."""
    groups: dict[tuple[int, float], list[Document]] = {}
    for one in documents:
        groups.setdefault((one.row, one.facts["group"]), []).append(one)
    total = torch.zeros((), dtype=torch.float64)
    for answers in groups.values():
        for i, j in itertools.permutations(answers, 2):
            if i.facts["score"] < j.facts["score"]:
                total = total + torch.clamp(i.logp / i.length - j.logp / j.length, min=0.0)
        best = max(answers, key=lambda one: one.facts["score"])
        total = total - best_weight * (best.logp / best.length if mean_best else best.logp)
    return total, len(groups)


def reward(values: Sequence[tuple[Tensor, Tensor, float]], center: float) -> tuple[Tensor, int]:
    """Ouyang et al. 2022, eq. 1, with the margin of Touvron et al. 2023, eq. 2: (chosen, rejected, margin)."""
    total = torch.zeros((), dtype=torch.float64)
    for chosen, rejected, margin in values:
        total = total - torch.log(sigmoid(chosen - rejected - margin)) + center * (chosen + rejected) ** 2
    return total, len(values)


def policy(
    documents: Sequence[Document],
    low: float,
    high: float,
    dual: float | None = None,
    kl_weight: float = 0.0,
    estimator: str = "k3",
    cap: float | None = None,
    divided_by: str = "token",
    constant: float = 1.0,
) -> tuple[Tensor, int]:
    """Schulman et al. 2017, eq. 7; Shao et al. 2024, eq. 3 and 4, token by token."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for one in documents:
        of_document = torch.zeros((), dtype=torch.float64)
        for t in range(one.length):
            ratio = torch.exp(one.logps[t] - one.columns["old"][t])
            a = one.columns["advantage"][t]
            bounded = ratio if 1 - low <= float(ratio) <= 1 + high else torch.clamp(ratio.detach(), 1 - low, 1 + high)
            gain = ratio * a if float(ratio * a) <= float(bounded * a) else bounded * a
            if dual is not None and float(a) < 0 and float(gain) < dual * float(a):
                gain = dual * a
            if cap is not None:
                gain = gain * min(float(torch.exp(one.columns["old"][t] - one.columns["rollout"][t])), cap)
            if kl_weight:
                x = one.columns["reference"][t] - one.logps[t]
                gain = gain - kl_weight * {"k1": -x, "k2": 0.5 * x * x, "k3": torch.exp(x) - x - 1}[estimator]
            of_document = of_document - gain * one.weights[t]
        divisor = {"token": 1.0, "sequence": float(one.length), "constant": constant}[divided_by]
        total, tokens = total + of_document / divisor, tokens + one.length
    return total, tokens if divided_by == "token" else len(documents)


def gae(rewards: Sequence[float], values: Sequence[float], gamma: float, lam: float) -> tuple[list[float], list[float]]:
    """Schulman et al. 2015, eq. 11 to 16: advantages and returns of one answer."""
    n = len(rewards)
    delta = [rewards[t] + gamma * (values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
    advantages = [sum((gamma * lam) ** k * delta[t + k] for k in range(n - t)) for t in range(n)]
    return advantages, [a + v for a, v in zip(advantages, values)]
