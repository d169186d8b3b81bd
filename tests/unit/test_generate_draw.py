"""Choosing tokens: against transformers' processors and closed forms; an answer depends on its request alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_parallel.errors import UserError
from llm_parallel.generate.draw import Draw, choose_tokens, uniform
from llm_parallel.generate.sampling import Sampling, filtered

V = 40


def draw(
    sampling: Sampling, tokens: tuple[int, ...] = (1, 2), stream: int = 0, sample: int = 0, prompt: int = 2
) -> Draw:
    return Draw(sampling, stream, sample, tokens, prompt)


rows = st.lists(st.floats(-6, 6, width=32), min_size=V, max_size=V, unique=True).map(lambda row: torch.tensor([row]))
how = st.builds(
    Sampling,
    temperature=st.one_of(st.just(0.0), st.floats(0.3, 2.0)),
    top_k=st.integers(0, 12),
    top_p=st.one_of(st.just(1.0), st.floats(0.1, 0.9)),
    min_p=st.one_of(st.just(0.0), st.floats(0.01, 0.5)),
    seed=st.integers(0, 2**40),
    repetition_penalty=st.floats(0.6, 2.0),
    frequency_penalty=st.floats(-1.0, 1.0),
    presence_penalty=st.floats(-1.0, 1.0),
    logit_bias=st.lists(st.tuples(st.integers(0, V - 1), st.floats(-5, 5)), max_size=2).map(tuple),
    top_log_probs=st.integers(0, 5),
)


@given(rows, st.floats(0.01, 0.9), st.floats(0.4, 2.0))
def test_min_p_is_transformers(logits: torch.Tensor, min_p: float, temperature: float) -> None:
    from transformers import MinPLogitsWarper

    found = filtered(logits, Sampling(temperature=temperature, min_p=min_p)).isinf()
    shares = (logits / temperature).softmax(-1)
    expected = MinPLogitsWarper(min_p)(None, logits / temperature).isinf()
    edge = (shares - min_p * shares.max()).abs() < 1e-6
    assert ((found == expected) | edge).all()


@given(rows, st.floats(0.5, 2.0), st.lists(st.integers(0, V - 1), min_size=1, max_size=6))
def test_the_repetition_penalty_is_transformers(logits: torch.Tensor, penalty: float, tokens: list[int]) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([tokens]), logits.clone()).log_softmax(-1)[0]
    how = Sampling(repetition_penalty=penalty, top_log_probs=V)
    (found,) = choose_tokens(logits, [draw(how, tuple(tokens), prompt=1)])
    for token, log_prob in found.top:
        assert log_prob == pytest.approx(expected[token].item(), abs=1e-5)
    assert found.token == found.top[0][0] and found.log_prob == pytest.approx(found.top[0][1], abs=1e-5)


def test_penalties_count_the_answer_and_biases_are_added() -> None:
    logits = torch.zeros(1, 5)
    how = Sampling(frequency_penalty=0.5, presence_penalty=0.25, logit_bias=((4, 2.0),), top_log_probs=5)
    (found,) = choose_tokens(logits, [draw(how, (0, 0, 1, 2, 2), prompt=2)])
    expected = np.array([0.0, -0.75, -1.25, 0.0, 2.0])
    expected -= np.log(np.exp(expected).sum())
    assert found.token == 4
    assert dict(found.top) == pytest.approx(dict(enumerate(expected)), abs=1e-6)


@given(st.lists(st.tuples(rows, how, st.integers(0, 9), st.integers(0, 3)), min_size=2, max_size=5))
def test_a_choice_does_not_depend_on_who_else_is_in_the_batch(made: list[tuple]) -> None:
    draws = [draw(sampling, (3, 4, 4), stream, sample) for _, sampling, stream, sample in made]
    together = choose_tokens(torch.cat([logits for logits, *_ in made]), draws)
    for (logits, *_), one, found in zip(made, draws, together):
        (alone,) = choose_tokens(logits, [one])
        assert found.token == alone.token and found.log_prob == pytest.approx(alone.log_prob, abs=1e-6)
        assert [token for token, _ in found.top] == [token for token, _ in alone.top]
        assert -1e-6 <= -found.log_prob < math.inf


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.8}], ids=str)
def test_drawn_tokens_follow_the_shares_and_log_probs_are_theirs(settings: dict[str, Any]) -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    how = Sampling(temperature=0.7, seed=5, **settings)
    found = choose_tokens(logits.expand(4000, 4), [draw(how, stream=n) for n in range(4000)])
    kept = np.array([2.0, 1.0, 0.0, -1.0]) / 0.7
    shares = np.exp(kept) / np.exp(kept).sum()
    if settings:
        shares[3 if "top_k" in settings else 2 :] = 0.0
        shares /= shares.sum()
    counts = np.bincount([choice.token for choice in found], minlength=4) / 4000
    # Four standard deviations of a share of 4,000 draws.
    assert (np.abs(counts - shares) <= 4 * np.sqrt(shares * (1 - shares) / 4000)).all()
    for choice in found[:50]:
        assert choice.log_prob == pytest.approx(np.log(shares[choice.token]), abs=1e-5)


def test_random_numbers_are_uniform_and_apart() -> None:
    numbers = [
        uniform(seed, stream, sample, position)
        for seed in range(3) for stream in range(10) for sample in range(5) for position in range(20)
    ]  # fmt: skip
    assert len(set(numbers)) == len(numbers)
    ordered = np.sort(numbers)
    # Kolmogorov and Smirnov's distance, at a level of one in ten thousand.
    assert np.abs(ordered - np.arange(len(ordered)) / len(ordered)).max() < 2.23 / np.sqrt(len(ordered))


def test_damaged_output_is_an_error() -> None:
    with pytest.raises(UserError, match="not finite"):
        choose_tokens(torch.tensor([[0.0, math.nan]]), [draw(Sampling())])


@pytest.mark.parametrize(
    "wrong", [{"min_p": 1.5}, {"repetition_penalty": 0.0}, {"top_log_probs": -1}, {"seed": 2**63}], ids=str
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)
