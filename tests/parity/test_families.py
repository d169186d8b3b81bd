"""Families other than Llama train as transformers' do: AdamW steps. test_text.py compares what they write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.harness import run_ranks
from tests.support.parity_models import load_hf, our_config, random_folder

pytestmark = pytest.mark.gloo

STEPS, ROWS, LENGTH, LR = 10, 4, 48, 3e-3
KINDS = ["mistral", "qwen2", "qwen3", "smollm3", "olmo2", "phi3", "llama with every bias"]
SLOW = {"smollm3", "phi3", "qwen2"}
"""Kinds whose ten steps are the same as others' but for what the logits show already."""
STEPPED = [pytest.param(kind, marks=pytest.mark.slow) if kind in SLOW else kind for kind in KINDS]


def tokens_of(step: int) -> torch.Tensor:
    """Counting sequences, which can be learned."""
    random = np.random.default_rng(step)
    rows = random.integers(0, 250, (ROWS, 1)) + random.integers(1, 3, (ROWS, 1)) * np.arange(LENGTH + 1)
    return torch.from_numpy(rows % 300)


def our_losses(rank: int, world_size: int, folder: str, parallel: dict[str, Any]) -> list[float]:
    """Losses of the steps in a layout."""
    from llm_parallel.config.tree import OptimConfig, TrainConfig
    from llm_parallel.data.batch import Batch
    from llm_parallel.model.hf import load_hf_weights
    from llm_parallel.parallel.groups import open_groups
    from llm_parallel.parallel.layout import Layout
    from llm_parallel.parallel.platform import open_platform
    from llm_parallel.train.open import likelihood, policy_engine
    from llm_parallel.train.step import apply_gradient, forward_backward

    config = our_config(folder, LENGTH, **parallel).model_copy(
        update={
            "optim": OptimConfig(lr=LR, weight_decay=0.1, beta2=0.95, clip_grad=1.0),
            "train": TrainConfig(global_batch_size=ROWS, micro_batch_size=1),
        }
    )
    groups = open_groups(Layout.from_config(config, world_size), rank, open_platform("cpu"), 0)
    engine = policy_engine(config, groups)
    load_hf_weights(folder, engine.models)
    engine.optimizer.reload_model_params()
    losses = []
    for step in range(STEPS):
        rows = tokens_of(step).split(1)
        batches = [Batch(row[:, :-1].contiguous(), row[:, 1:].contiguous(), torch.ones(1, LENGTH)) for row in rows]
        outcome = forward_backward(engine, likelihood(config), batches)
        apply_gradient(engine, outcome, LR, 1.0)
        losses.append(outcome.loss)
    return losses


def their_losses(folder: Path) -> list[float]:
    """The same steps in transformers and torch."""
    model = load_hf(folder, torch.float32).train()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95))
    losses = []
    for step in range(STEPS):
        tokens = tokens_of(step)
        logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", STEPPED)
def test_ten_steps_in_tp2_pp2(kind: str, tmp_path: Path) -> None:
    folder = random_folder(kind, tmp_path)
    theirs = their_losses(folder)
    ours = run_ranks(our_losses, 4, str(folder), {"tp": 2, "pp": 2})[0]
    worst = max(abs(a - b) for a, b in zip(ours, theirs))
    print(f"| {kind} | TP2 SP PP2 | {STEPS} AdamW steps | {worst:.1e} |")
    assert worst <= 1e-4
    assert theirs[0] - theirs[-1] > 0.1, "the weights move"
