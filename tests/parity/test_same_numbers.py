"""Log-probabilities of generated tokens and those of the training forward on the same tokens, through the training
schedule: to rounding, and bit for bit under ``kernels.deterministic``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_parallel.config.tree import KernelsConfig, TrainConfig
from llm_parallel.generate.requests import Finished, Request
from tests.parity.test_generator import SMALL, answers, mixed_requests
from tests.support.harness import run_ranks
from tests.support.parity_models import RANDOM, our_config, random_folder

FOLLOWS_LENGTH = ("dynamic, longer than its context", "longrope")
KINDS = [kind for kind in RANDOM if kind not in FOLLOWS_LENGTH]
WIDTH = 96


class Collected:
    """An objective that keeps the losses of each label."""

    unit, reads, statistics, ratios = "token", (), (), {}
    weighted_in_model, loss_options = False, {}

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []

    def __call__(self, batch: Any, groups: Any, output: Any) -> Any:
        from llm_parallel.objectives.base import Terms

        self.losses.append(output.detach())
        return Terms(output.sum() * 0.0, torch.ones((), dtype=torch.int32))


def scored(network: Any, found: list[Finished], made: list[Request]) -> dict[tuple[int, int], list[float]]:
    """Log-probabilities of the answers' tokens by the training forward, on processes of the last stage: texts beside
    each other in rows, which begin with them."""
    from llm_parallel.data.batch import Batch, Documents
    from llm_parallel.train.step import evaluate

    prompts = {request.number: request.prompt for request in made}
    texts = [[*prompts[answer.number], *answer.tokens] for answer in found]
    places, rows, starts = [], [[]], [[]]
    for text in texts:
        if len(rows[-1]) + len(text) > WIDTH:
            rows.append([])
            starts.append([])
        places.append((len(rows) - 1, len(rows[-1])))
        starts[-1].append(len(rows[-1]))
        rows[-1] += text
    if len(rows) % 4:
        more = 4 - len(rows) % 4  # whole micro batches, two of them for each interleaved stage
        rows, starts = rows + [[1]] * more, starts + [[0]] * more
    tokens = torch.tensor([row + [0] * (WIDTH - len(row)) for row in rows])
    labels = torch.roll(tokens, -1, 1)
    batches = [
        Batch(tokens[at : at + 2], labels[at : at + 2], torch.ones(2, WIDTH), Documents(tuple(
            torch.tensor([*begin, *([len(row)] if len(row) < WIDTH else [])], dtype=torch.int32)
            for begin, row in zip(starts[at : at + 2], rows[at : at + 2])
        )))
        for at in range(0, len(rows), 2)
    ]  # fmt: skip
    objective = Collected()
    evaluate(network, objective, batches)
    if not objective.losses:
        return {}
    losses = torch.cat(objective.losses)
    out = {}
    for answer, (row, start) in zip(found, places):
        first = start + len(prompts[answer.number]) - 1
        out[answer.number, answer.sample] = (-losses[row, first : first + len(answer.tokens)]).double().tolist()
    return out


def open_network(
    folder: str, rank: int, world_size: int, parallel: dict[str, Any], precision: str, deterministic: bool
) -> Any:
    from llm_parallel.config.rules import check_config
    from llm_parallel.model.gpt import build_policy
    from llm_parallel.model.hf import load_hf_weights
    from llm_parallel.parallel.groups import close_groups, open_groups
    from llm_parallel.parallel.layout import Layout
    from llm_parallel.parallel.platform import open_platform

    config = our_config(folder, WIDTH, **parallel)
    micro = 2 * parallel.get("pp", 1)
    train = TrainConfig(precision=precision, micro_batch_size=2, global_batch_size=2 * micro)
    config = config.model_copy(update={"kernels": KernelsConfig(deterministic=deterministic), "train": train})
    check_config(config, world_size, "cpu")
    close_groups(world=False)
    groups = open_groups(Layout.from_config(config, world_size), rank, open_platform("cpu"), config.seed)
    network = build_policy(config, groups)
    load_hf_weights(folder, network.models)
    return network


def compare_job(
    rank: int, world_size: int, folders: list[str], made: list[Request], parallel: dict[str, Any],
    precision: str, deterministic: bool, options: dict[str, int],
) -> list[tuple[list[Finished], dict]]:  # fmt: skip
    from llm_parallel.generate.engine import Generator, GeneratorOptions

    out = []
    for seed, folder in enumerate(folders):
        network = open_network(folder, rank, world_size, parallel, precision, deterministic)
        found = answers(Generator(network, GeneratorOptions(**options)), made, seed)
        out.append((found, scored(network, found, made)))
    return out


def differences(by_rank: list[tuple[list[Finished], dict]]) -> tuple[float, int, int]:
    """Largest difference, and how many of how many tokens are equal, over all processes that have numbers."""
    pairs = [
        (answer.log_probs, scores[answer.number, answer.sample]) for found, scores in by_rank if scores
        for answer in found
    ]  # fmt: skip
    generated, trained = (np.concatenate([np.asarray(pair[side]) for pair in pairs]) for side in (0, 1))
    return float(np.abs(generated - trained).max()), int((generated == trained).sum()), len(generated)
