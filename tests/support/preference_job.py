"""Every objective over answers on the same samples of any layout, for tests that compare layouts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from tests.support.job import gradients, own_batches


def objectives() -> dict[str, Any]:
    """Objectives by name, with settings of which every term has a gradient, and most answers one of the same sign: sums
    of different signs lose digits."""
    from llm_parallel.objectives.dpo import DPO
    from llm_parallel.objectives.kto import KTO
    from llm_parallel.objectives.policy import ClippedPolicy
    from llm_parallel.objectives.rrhf import RRHF
    from llm_parallel.tune.prefer import divergence

    return {
        "dpo": DPO(0.5, sft_weight=0.1),
        "kto": KTO(divergence, 0.1, 1.3, 0.2),
        "rrhf": RRHF(1.0),
        "policy": ClippedPolicy(kl_weight=0.1, importance_cap=1.01, divided_by="sequence"),
    }


def completed(batch: Any, other: Any, vocabulary: int) -> Any:
    """A batch with all that objectives read, as a function of its tokens alone, for a model whose tokens are all about
    equally probable; ``other``: its mismatched answers."""
    hashed = (batch.tokens * 7 + batch.labels * 3) % 11
    near = -math.log(vocabulary) + (hashed.float() - 5) / 40
    columns = {
        "reference": -5.0 - (batch.tokens % 7).float() / 4,
        "old": near,
        "rollout": near - 0.005 * (hashed.float() - 5),
        "advantage": 1.0 + hashed.float() / 40,
    }
    rows = len(batch.tokens)
    facts = {
        "group": torch.tensor([[1.0, 1.0, 1.0]]).repeat(rows, 1),
        "score": (batch.numbers[:, None] + torch.arange(3)).remainder(3).float() / 2,
    }
    beside = None if other is None else completed(other, None, vocabulary)
    return replace(batch, columns=columns, facts=facts, mismatched=beside)


def completed_batches(config: Any, groups: Any, first: int) -> list[Any]:
    """This replica's micro batches of the step that begins with sample ``first``, with mismatched answers."""
    size = config.train.global_batch_size
    pairs = zip(own_batches(config, groups, first), own_batches(config, groups, first + size))
    return [completed(batch, other, config.model.vocab_size) for batch, other in pairs]


def compare_objectives(engine: Any, config: Any) -> tuple[dict[str, Any], list[tuple[float, float]]]:
    """Gradients of every objective at the first weights, named by objective and tensor, and their losses and gradient
    norms. No update lies between them, after which rounding would differ by more."""
    from llm_parallel.train.step import forward_backward

    first: dict[str, Any] = {}
    history = []
    for name, objective in objectives().items():
        batches = objective.prepare({"policy": engine}, completed_batches(config, engine.groups, 0))
        outcome = forward_backward(engine, objective, batches)
        history.append((outcome.loss, outcome.grad_norm))
        first |= {f"{name} {tensor}": found.numpy() for tensor, found in gradients(engine).items()}
    return first, history
