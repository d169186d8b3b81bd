"""Token ids of preferences beside those of TRL's DPO trainer: the same prompt, the same answers, trained from the same
token on, in every form that both read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llm_parallel.data.preference import PreferenceReader
from tests.parity.test_templates import encoder_of, sources, tokenizers_of

pytest.importorskip("trl", reason="TRL has the tokenization that this compares with")


def said(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


TALK = [said("user", "What is 2+2?"), said("assistant", "3"), said("user", "Is it so?\nSay it.")]
GOOD, BAD = said("assistant", "2+2=4"), said("assistant", "It is 3, and\n\n{that is}")
RECORDS: list[dict[str, Any]] = [
    {"prompt": TALK, "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": [said("system", "Be brief."), *TALK[:1]], "chosen": [GOOD], "rejected": [BAD]},
    {"chosen": [*TALK, GOOD], "rejected": [*TALK, BAD]},
    {"chosen": [*TALK[:1], GOOD, *TALK[2:], BAD], "rejected": [*TALK[:1], GOOD, *TALK[2:], GOOD]},
]


def theirs(name: str, record: dict[str, Any]) -> dict[str, list[int]]:
    """Ids that TRL's trainer makes of a record."""
    from datasets import Dataset
    from trl import DPOTrainer

    tokenizer = tokenizers_of(name)[0]
    tokenizer.chat_template = sources(name)[0]
    settings = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    return DPOTrainer._prepare_dataset(trainer, Dataset.from_list([record]), tokenizer, settings, "train")[0]


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "Zephyr"])
@pytest.mark.parametrize("number", range(len(RECORDS)))
def test_ids_are_those_of_trl(name: str, number: int) -> None:
    expected = theirs(name, RECORDS[number])
    encoder = encoder_of(name, False)
    group = PreferenceReader().read(RECORDS[number])
    for conversation, answer in zip(group.conversations(), ("chosen", "rejected")):
        tokens = encoder.encode_within(conversation, np.iinfo(np.int32).max, cut=False)
        assert tokens is not None
        whole = [*expected["prompt_ids"], *expected[f"{answer}_ids"]]
        assert tokens.ids.tolist() == whole[: len(tokens.ids)]
        # Both train everything from the end of the prompt on; TRL also the line break that follows the stop token.
        assert np.nonzero(tokens.weights)[0].tolist() == list(range(len(expected["prompt_ids"]), len(tokens.ids)))
        assert not tokenizers_of(name)[0].decode(whole[len(tokens.ids) :]).strip()
        assert int(tokens.ids[-1]) in encoder.stops
