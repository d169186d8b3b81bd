"""Greedy tokens equal transformers'; sampling follows its logits processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_parallel.errors import UserError
from llm_parallel.generate.sampling import Sampling, filtered
from tests.support.harness import run_ranks
from tests.support.parity_models import load_hf, open_network, our_config, random_folder
from tests.support.smollm import smollm_folder

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Water boils at",
    "Once upon a time there was a small",
    "The three laws of motion are",
]


def generate_job(
    rank: int,
    world_size: int,
    folder: str,
    prompts: list[list[int]],
    settings: dict[str, Any],
    parallel: dict[str, Any],
) -> list[list[int]]:
    from llm_parallel.generate.decode import generate
    from llm_parallel.model.hf import load_hf_weights

    network = open_network(our_config(folder, 64, sequence_parallel=False, **parallel), rank, world_size)
    load_hf_weights(folder, network.models)
    return generate(network, prompts, Sampling(**settings))


def hf_greedy(folder: Path, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:

    model = load_hf(folder, torch.float32).eval()
    answers = []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        answers.append(out[0, len(prompt) :].tolist())
    return answers


@pytest.mark.gloo
@pytest.mark.parametrize(("prompts", "new_tokens"), [(2, 24), pytest.param(5, 64, marks=pytest.mark.slow)])
def test_smollm_greedy_tokens_are_transformers(prompts: int, new_tokens: int) -> None:
    from tokenizers import Tokenizer

    folder = smollm_folder()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoded = [tokenizer.encode(text).ids for text in PROMPTS[:prompts]]
    expected = hf_greedy(folder, encoded, new_tokens)
    # min_new_tokens keeps transformers from ending; compare up to where it would have.
    found = run_ranks(generate_job, 1, str(folder), encoded, {"max_new_tokens": new_tokens}, {})[0]
    for ours, theirs in zip(found, expected):
        end = ours.index(2) if 2 in ours else new_tokens
        assert end > 0 and ours[:end] == theirs[:end]
    assert sum(len(ours) for ours in found) == prompts * new_tokens
    assert "Paris" in tokenizer.decode(found[0])


@pytest.mark.gloo
@pytest.mark.parametrize(
    "parallel",
    [*(pytest.param(single, marks=pytest.mark.slow) for single in ({"tp": 2}, {"pp": 2})), {"tp": 2, "pp": 2}],
    ids=str,
)
def test_layouts_write_the_same(parallel: dict[str, Any], tmp_path: Path) -> None:
    folder = random_folder("grouped", tmp_path)
    prompts = [[5, 6, 7], [1, 2, 3, 4, 5], [9, 8, 7]]
    expected = hf_greedy(folder, prompts, 12)
    processes = int(np.prod(list(parallel.values())))
    for answer in run_ranks(generate_job, processes, str(folder), prompts, {"max_new_tokens": 12}, parallel):
        assert answer == expected


logit_rows = st.lists(st.floats(-8, 8, width=32), min_size=4, max_size=40, unique=True)


# Between 0.999 and 1 the rounding of the sum, in fp32, decides about several tokens of next to no share at once.
top_shares = st.one_of(st.floats(0.05, 0.999), st.just(1.0))


@given(logit_rows, st.floats(0.3, 2.0), st.integers(0, 20), top_shares)
def test_filters_are_transformers(row: list[float], temperature: float, top_k: int, top_p: float) -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.tensor([row])
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1.0:
        expected = TopPLogitsWarper(top_p)(None, expected)
    found = filtered(logits, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    disagree = torch.isinf(found) != torch.isinf(expected)
    if disagree.any():  # only a token that stands on the very edge of the share may fall on either side
        shares = expected.softmax(-1)
        assert disagree.sum() == 1 and shares[disagree].sum() + found.softmax(-1)[disagree].sum() > 0
        cumulative = (logits / temperature).softmax(-1).sort(descending=True).values.cumsum(-1)
        assert (cumulative - top_p).abs().min() < 1e-5
    else:
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"max_new_tokens": 0}], ids=str
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)
