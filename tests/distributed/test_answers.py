"""Greedy answers from weights in training against a plain loop over logits in one process, in layouts of every kind."""

from __future__ import annotations

import pytest
import torch

from tests.support.harness import run_ranks
from tests.support.job import base_config, changed, open_engine, own_batches

PROMPTS = [[5, 7, 9], [20, 21, 22, 23, 24, 25, 26], [3], [50, 52, 54, 56, 58]]
NEW = 6
LAYOUTS = (
    ({"parallel.tp": 2}, 2),
    ({"parallel.pp": 2, "parallel.vpp": 2, "train.global_batch_size": 8}, 2),
    ({"parallel.cp": 2, "parallel.dp": 2}, 4),
    ({"parallel.tp": 2, "parallel.pp": 2, "model.tie_embeddings": True}, 4),
)


def trained(rank: int, world_size: int, changes: dict) -> tuple:
    """Answers after two training steps, and losses of a third; in one process also those of a plain loop."""
    from llm_parallel.objectives.likelihood import Likelihood
    from llm_parallel.train.answers import greedy_answers
    from llm_parallel.train.step import apply_gradient, forward_backward

    config = changed(base_config(), changes)
    engine = open_engine(config, rank, world_size)

    def step(number: int) -> float:
        outcome = forward_backward(engine, Likelihood(), own_batches(config, engine.groups, 8 * number))
        apply_gradient(engine, outcome, 3e-3, 1.0)
        return outcome.loss

    for number in range(2):
        step(number)
    free = greedy_answers(engine.network, PROMPTS, (), NEW)
    ends = (free[0][2], free[1][0])
    stopped = greedy_answers(engine.network, PROMPTS, ends, NEW)
    plain = []
    for prompt in PROMPTS if world_size == 1 else ():
        row = list(prompt)
        with torch.no_grad():
            for _ in range(NEW):
                row.append(int(engine.models[0](torch.tensor([row]))[0, -1, :128].argmax()))
        plain.append(row[len(prompt) :])
    return free, stopped, ends, plain, step(2)


@pytest.mark.gloo
@pytest.mark.parametrize("tied", [False, True])
def test_answers_are_those_of_a_plain_loop_in_every_layout(tied: bool) -> None:
    free, stopped, ends, plain, loss = run_ranks(trained, 1, {"model.tie_embeddings": tied})[0]
    assert free == plain
    for answer, whole in zip(stopped, plain):
        cut = next((n + 1 for n, token in enumerate(whole) if token in ends), NEW)
        assert answer == whole[:cut]
    for changes, processes in LAYOUTS:
        if changes.get("model.tie_embeddings", False) == tied:
            for found in run_ranks(trained, processes, changes):
                assert found[:3] == (free, stopped, ends), changes
                assert found[4] == pytest.approx(loss, abs=1e-5), "training went on as before"
