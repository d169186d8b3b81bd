"""Ten optimizer steps of the real SmolLM2-135M equal a plain transformers + torch AdamW loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.harness import run_ranks
from tests.support.parity_models import load_hf, our_config
from tests.support.smollm import smollm_folder

ROWS, LENGTH = 2, 32
LR, DECAY, CLIP = 1e-4, 0.1, 1.0

pytestmark = pytest.mark.gloo


def tokens_of(step: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(step).integers(0, 49152, (ROWS, LENGTH + 1)))


def our_losses(rank: int, world_size: int, folder: str, steps: int) -> list[float]:
    from llm_parallel.config.tree import OptimConfig, TrainConfig
    from llm_parallel.data.batch import Batch
    from llm_parallel.model.hf import load_hf_weights
    from llm_parallel.parallel.groups import open_groups
    from llm_parallel.parallel.layout import Layout
    from llm_parallel.parallel.platform import open_platform
    from llm_parallel.train.open import likelihood, policy_engine
    from llm_parallel.train.step import apply_gradient, forward_backward

    config = our_config(folder, LENGTH).model_copy(
        update={
            "optim": OptimConfig(lr=LR, weight_decay=DECAY, beta2=0.95, clip_grad=CLIP),
            "train": TrainConfig(global_batch_size=ROWS, micro_batch_size=1),
        }
    )
    groups = open_groups(Layout.from_config(config, 1), 0, open_platform("cpu"), 0)
    engine = policy_engine(config, groups)
    load_hf_weights(folder, engine.models)
    engine.optimizer.reload_model_params()
    losses = []
    for step in range(steps):
        tokens = tokens_of(step)
        rows = [tokens[row : row + 1] for row in range(ROWS)]
        batches = [Batch(row[:, :-1], row[:, 1:], torch.ones(1, LENGTH)) for row in rows]
        outcome = forward_backward(engine, likelihood(config), batches)
        apply_gradient(engine, outcome, LR, CLIP)
        losses.append(outcome.loss)
    return losses


def their_losses(folder: Path, steps: int) -> list[float]:
    model = load_hf(folder, torch.float32).train()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": norms, "weight_decay": 0.0}], lr=LR, betas=(0.9, 0.95)
    )
    losses = []
    for step in range(steps):
        tokens = tokens_of(step)
        logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("steps", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_steps_are_transformers_and_torchs(steps: int) -> None:
    folder = smollm_folder()
    ours = run_ranks(our_losses, 1, str(folder), steps, timeout_s=900.0)[0]
    theirs = their_losses(folder, steps)
    differences = [abs(a - b) for a, b in zip(ours, theirs)]
    print(f"| SmolLM2-135M, {steps} AdamW steps | worst loss difference {max(differences):.1e} |")
    assert len(ours) == len(theirs) == steps
    assert max(differences) <= 1e-4
    assert abs(theirs[-1] - theirs[0]) > 0.1, "the weights move"
