"""Generation on the weights of a training engine, between two steps: what it writes is the same in layouts of every
kind, its log-probabilities are those of the training forward, and training goes on as if it had not been."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.support.harness import run_ranks
from tests.support.job import base_config, changed, open_engine, own_batches

NEW = 6
ADAPTER = {"adapter.rank": 4, "adapter.targets": ("q", "v", "o", "gate", "down"), "adapter.dora": True}
LAYOUTS = (
    ({"parallel.pp": 2, "parallel.vpp": 2, "train.global_batch_size": 8}, 2),
    ({"parallel.cp": 2, "parallel.dp": 2, "parallel.overlap": True}, 4),
    ({"parallel.tp": 2, "parallel.pp": 2, "model.tie_embeddings": True, **ADAPTER}, 4),
)


def made_requests(temperature: float) -> list[Any]:
    from llm_parallel.generate.requests import Request
    from llm_parallel.generate.sampling import Sampling

    prompts = [[5, 7, 9], [20, 21, 22, 23, 24, 25, 26], [3], [50, 52, 54, 56, 58] * 4]
    how = Sampling(max_new_tokens=NEW, temperature=temperature, top_p=0.95 if temperature else 1.0, seed=4)
    return [Request(number, tuple(prompt), how, n=2) for number, prompt in enumerate(prompts)]


def trained(rank: int, world_size: int, changes: dict[str, Any], generates: bool) -> tuple[list[float], Any, Any]:
    """Losses of three steps; before the third, and before the second once, answers; and in one process the training
    forward's log-probabilities of the greedy ones."""
    from llm_parallel.generate.engine import Generator, GeneratorOptions
    from llm_parallel.objectives.likelihood import Likelihood
    from llm_parallel.train.step import apply_gradient, forward_backward
    from tests.support.plain_answers import greedy_answers

    config = changed(base_config(), changes)
    engine = open_engine(config, rank, world_size)
    losses, found, expected = [], {}, []
    generator = Generator(engine, GeneratorOptions(4, 16, 4, 200)) if generates else None
    for number in range(3):
        if generator is not None and number:
            # In the first round the cache learns prompts under weights that are not those of the second.
            found = {kind: generator.run(made_requests(kind)) for kind in (0.0, 1.0)}
            assert generator.scheduler.pool.used == 0
        if number == 2 and generator is not None:
            plain = greedy_answers(engine.network, [request.prompt for request in made_requests(0.0)], (), NEW)
            for answer in found[0.0]:
                assert list(answer.tokens) == plain[answer.number]
            if world_size == 1:
                expected = [forward_log_probs(engine.models[0], answer) for answer in found[0.0]]
        outcome = forward_backward(engine, Likelihood(), own_batches(config, engine.groups, 8 * number))
        apply_gradient(engine, outcome, 3e-3, 1.0)
        losses.append(outcome.loss)
    return losses, found, expected


def forward_log_probs(model: Any, answer: Any) -> list[float]:
    prompt = made_requests(0.0)[answer.number].prompt
    text = torch.tensor([[*prompt, *answer.tokens]])
    with torch.no_grad():
        return (-model(text[:, :-1], text[:, 1:])[0, len(prompt) - 1 :]).tolist()


def merged(by_rank: list[tuple], kind: float) -> list[Any]:
    """All replicas' answers, of which the ranks of a replica have the same."""
    found: dict[tuple[int, int], Any] = {}
    for _, answers, _ in by_rank:
        for answer in answers[kind]:
            assert found.setdefault((answer.number, answer.sample), answer) == answer
    return [found[place] for place in sorted(found)]


@pytest.mark.gloo
@pytest.mark.slow
def test_generation_with_adapters_on_the_vocabulary_is_the_same_in_every_layout() -> None:
    adapter = {"adapter.rank": 4, "adapter.targets": ("q", "down", "embed_tokens", "lm_head")}
    shared = adapter | {"model.tie_embeddings": True, "model.vocab_size": 101}
    greedy, expected = merged(alone := run_ranks(trained, 1, shared, True), 0.0), alone[0][2]
    for answer, log_probs in zip(greedy, expected):
        np.testing.assert_allclose(answer.log_probs, log_probs, atol=2e-5)
    by_rank = run_ranks(trained, 4, shared | {"parallel.tp": 2, "parallel.pp": 2}, True)
    for ours, theirs in zip(merged(by_rank, 0.0), greedy, strict=True):
        assert ours.tokens == theirs.tokens
        np.testing.assert_allclose(ours.log_probs, theirs.log_probs, atol=2e-5)


@pytest.mark.gloo
@pytest.mark.parametrize("tied", [False, True])
def test_generation_between_steps_is_the_same_in_every_layout(tied: bool) -> None:
    tie: dict[str, Any] = {"model.tie_embeddings": tied, **(ADAPTER if tied else {})}
    alone = run_ranks(trained, 1, tie, True)
    losses, _, expected = alone[0]
    if not tied:
        assert losses == run_ranks(trained, 1, tie, False)[0][0], "generation leaves training as it was"
    greedy, sampled = merged(alone, 0.0), merged(alone, 1.0)
    assert len(greedy) == 8 and len({answer.tokens for answer in sampled}) > 4
    for answer, log_probs in zip(greedy, expected):
        np.testing.assert_allclose(answer.log_probs, log_probs, atol=2e-5)
    for changes, processes in LAYOUTS:
        if changes.get("model.tie_embeddings", False) != tied:
            continue
        by_rank = run_ranks(trained, processes, changes, True)
        for kind, whole in ((0.0, greedy), (1.0, sampled)):
            for ours, theirs in zip(merged(by_rank, kind), whole, strict=True):
                assert ours.tokens == theirs.tokens, changes
                np.testing.assert_allclose(ours.log_probs, theirs.log_probs, atol=2e-5)
        for found in by_rank:
            assert found[0] == pytest.approx(losses, abs=1e-5)


def kept(rank: int, world_size: int, changes: dict[str, Any]) -> list[bool]:
    """Whether a generator, and its cache of keys, are still there after the last name for it has gone: one that was
    never asked, and one that has answered."""
    import gc
    import weakref

    from llm_parallel.generate.engine import Generator, GeneratorOptions

    engine = open_engine(changed(base_config(), changes), rank, world_size)
    gc.collect()
    gc.disable()
    found = []
    try:
        for asked in ([], made_requests(1.0)):
            generator = Generator(engine, GeneratorOptions(4, 16, 4, 200))
            generator.run(asked)
            there = weakref.ref(generator), weakref.ref(generator._caches[0][0].k)
            del generator
            found += [one() is not None for one in there]
    finally:
        gc.enable()
    return found


@pytest.mark.parametrize(("changes", "processes"), [({}, 1), ({"parallel.pp": 2}, 2)])
def test_the_cache_goes_with_its_generator(changes: dict[str, Any], processes: int) -> None:
    """A run makes a generator in each round. What only the collector of garbage would free, it frees too late."""
    assert run_ranks(kept, processes, changes) == [[False] * 4] * processes
