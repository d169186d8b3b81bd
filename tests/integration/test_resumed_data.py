"""A run that goes on under another data section reads what it had not read."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.commands import Corpus, events, read_records, train_in_ranks, write_run_file
from tests.support.data_helpers import numbered_documents, write_token_file

pytestmark = pytest.mark.gloo

LENGTHS = np.random.default_rng(4).integers(0, 90, 36).tolist()


def recorded(rank: int, _: Any) -> list[int]:
    """The tokens of every micro batch from here on."""
    from llm_parallel.train.feed import SampleFeed

    found: list[int] = []
    step = SampleFeed.step

    def recording(feed: Any, state: Any) -> Any:
        batches = step(feed, state)
        for batch in batches:
            found.extend(batch.tokens.flatten().tolist())
        return batches

    SampleFeed.step = recording  # type: ignore[method-assign]
    return found


def test_no_token_is_seen_twice_across_changes_of_length_seed_and_mixture(tmp_path: Path) -> None:
    """512, 512 and 192 of 2,026 tokens that are all different, the second part in two replicas; the first checkpoint is
    one from before segments were kept."""
    path = write_token_file(tmp_path / "numbered", numbered_documents(LENGTHS))
    other = write_token_file(tmp_path / "other", numbered_documents([300], 2500))
    corpus = Corpus(Path(path), Path("none"), "")
    data = {"eval_fraction": 0.0, "tokenizer": None}
    run_file = write_run_file(
        corpus, tmp_path, data=data, model={"preset": "debug", "vocab_size": 3000}, optim={"schedule": "constant"}
    )
    common = ("checkpoint.verify=false", "train.global_batch_size=4")
    seen = train_in_ranks(run_file, 1, *common, "train.steps=4", prepare=recorded)
    states = [tmp_path / "run" / "checkpoints" / f"iter_000000{step}" / "train_state.json" for step in (4, 6, 8)]
    state = json.loads(states[0].read_text())
    assert [segment["first"] for segment in state.pop("segments")] == [0]
    states[0].write_text(json.dumps(state))
    longer = (*common, "data.seq_length_tokens=64")
    seen += train_in_ranks(run_file, 2, *longer, "train.steps=6", "parallel.dp=2", prepare=recorded)
    mixture = f"data.train=[{{path: {path}, weight: 3}}, {{path: {other}, weight: 1}}]"
    seen += train_in_ranks(run_file, 1, *common, "seed=9", "train.steps=8", mixture, prepare=recorded)
    tokens = np.array(list(chain.from_iterable(seen)))
    counts = np.bincount(tokens, minlength=3000)
    assert (counts[: sum(LENGTHS)].sum(), counts[2500:].sum()) == (512 + 512 + 3 * 64, 64)
    assert (counts > 1).sum() < 32 + 64, "less than a window of each length runs ahead into the next epoch"
    segments = json.loads(states[2].read_text())["segments"]
    assert [(part["first"], part["seed"], part["seq_length_tokens"]) for part in segments] == [
        (0, segments[0]["seed"], 32),
        (16, segments[0]["seed"], 64),
        (24, 9, 32),
    ]
    read = [
        record["train/tokens"]
        for record in read_records(tmp_path / "run" / "metrics.jsonl")
        if "train/tokens" in record
    ]
    assert read == [128, 256, 384, 512, 768, 1024, 1152, 1280]
    second, third = (event["changed"] for event in events(tmp_path / "run", "settings_changed"))
    assert f"{path} goes on with {sum(LENGTHS) - 512:,} tokens that are left of its epoch 1, in parts of " in second[-1]
    assert third[-1] == f"{other} begins at its start" and third[0].startswith("seed ")
