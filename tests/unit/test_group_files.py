"""Preferences become files of tokens once; the answers to a prompt share a sample, with their facts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_parallel.config.tree import RunConfig
from llm_parallel.config.tree_tune import Columns
from llm_parallel.data.group_data import GroupData
from llm_parallel.data.group_files import prepare_groups
from llm_parallel.errors import UserError
from tests.unit.test_chat_files import WORDS, config_of, tokenizer  # noqa: F401

LENGTH = 160
METHODS = ("dpo", "kto", "rrhf", "reward")


def pair(number: int) -> dict[str, Any]:
    """A record whose prompt and answers have lengths of their own."""
    chosen, rejected = WORDS[: 1 + number % 4], WORDS[4 : 6 + number % 3]
    return {"prompt": f"what is {number}", "chosen": " ".join(chosen), "rejected": " ".join(rejected)}


def prepared(folder: Path, tokens: Path, rows: list[Any], kind: str = "dpo", **chat: Any) -> GroupData:
    folder.mkdir(exist_ok=True)
    config = config_of(folder, tokens, rows, LENGTH, **{"eval_fraction": 0.0, **chat})
    return prepare_groups(of_method(config, kind))


def of_method(config: RunConfig, kind: str) -> RunConfig:
    return config.model_copy(update={"method": config.method.model_copy(update={"kind": kind})})


@pytest.mark.parametrize("kind", METHODS)
def test_samples_hold_every_answer_once_beside_those_of_its_group(
    kind: str,
    tmp_path: Path,
    tokenizer: Path,  # noqa: F811
) -> None:
    data = prepared(tmp_path, tokenizer, [pair(n) for n in range(30)], kind)
    samples, whole = data.training(3), kind == "reward"
    seen: list[list[int]] = []
    for number in range(samples.packer.samples_of(0)):
        sample = samples.sample(number)
        answers = samples.answers(number)
        ends = [*sample.document_starts[1:].tolist(), LENGTH]
        texts = [slice(*edges) for edges in zip(sample.document_starts.tolist(), ends)]
        for place, (answer, text) in enumerate(zip(answers, texts)):
            ids, weights, _ = data.answer(answer)
            if whole:
                assert sample.tokens[text].tolist() == ids.tolist()
                assert np.nonzero(sample.weights[text])[0].tolist() == [len(ids) - 1]
            else:
                assert sample.tokens[text].tolist() == ids[:-1].tolist()
                assert sample.labels[text].tolist() == ids[1:].tolist()
                assert sample.weights[text].tolist() == weights[1:].tolist()
                prompt = int(np.argmax(weights != 0))
                assert (weights[prompt:] == 1).all() and not weights[:prompt].any() and 0 < prompt < len(ids)
            assert sample.facts["score"][place] == data.scores[answer]
        groups = sample.facts["group"]
        assert all(len(values) == len(texts) for values in sample.facts.values())
        if kind == "kto":
            assert groups[: len(answers)].tolist() == list(range(1, len(answers) + 1))
        else:
            assert groups[: len(answers)].tolist() == np.repeat(np.arange(1, len(answers) // 2 + 1), 2).tolist()
            assert data.scores[answers].tolist() == [1.0, 0.0] * (len(answers) // 2)
        assert not groups[len(answers) :].any()
        seen += answers
    assert sorted(seen) == list(range(60))


def test_mismatched_answers_follow_other_prompts(tmp_path: Path, tokenizer: Path) -> None:  # noqa: F811
    data = prepared(tmp_path, tokenizer, [pair(n) for n in range(12)], "kto")
    for number in range(24):
        own, weights, _ = data.answer(number)
        ids, marks, places = data.mismatched(number)
        mine = int(np.argmax(weights != 0))
        assert ids[:mine].tolist() == own[:mine].tolist() and np.argmax(marks != 0) == mine
        assert places.stop - places.start == len(ids) <= LENGTH + 1
        givers = [
            other
            for other in range(24)
            if data.answer(other)[0][int(np.argmax(data.answer(other)[1] != 0)) :].tolist() == ids[mine:].tolist()
        ]
        prompts = {data.answer(other)[0][: int(np.argmax(data.answer(other)[1] != 0))].tobytes() for other in givers}
        assert prompts - {own[:mine].tobytes()}
    assert data.num_values == places.stop
    sample = data.training(0).sample(0)
    assert sample.mismatched is not None
    assert len(sample.mismatched.document_starts) >= len(data.training(0).answers(0))
    with pytest.raises(UserError, match="all records have the same prompt"):
        prepared(tmp_path / "one", tokenizer, [{**pair(n), "prompt": "a"} for n in range(4)], "kto").training(0)


def test_log_probabilities_stand_where_their_labels_do(tmp_path: Path, tokenizer: Path) -> None:  # noqa: F811
    """The place of a label in a column is that of its token in the file."""
    data = prepared(tmp_path, tokenizer, [pair(n) for n in range(9)], "kto")
    values = np.arange(data.num_values, dtype=np.float32)
    samples = data.with_reference(values).everything()
    assert "reference" in samples.offers and "reference" not in data.everything().offers
    for number in range(samples.packer.samples_of(0)):
        sample = samples.sample(number)
        for mismatched, row in ((False, sample), (True, sample.mismatched)):
            assert row is not None
            for here, there in samples.places(number, mismatched):
                assert row.columns["reference"][here].tolist() == values[there].tolist()
    ids, _, place = data.answer(5)
    assert data.chat.tokens.tokens(5).tolist() == ids.tolist() and place.stop - place.start == len(ids)


def test_records_of_one_prompt_are_held_out_together(tmp_path: Path, tokenizer: Path) -> None:  # noqa: F811
    data = prepared(tmp_path, tokenizer, [pair(n) for n in range(40)], "kto", eval_fraction=0.25)
    held = data.held_out_groups
    assert held.sum() == 20 and (held[0::2] == held[1::2]).all()
    trained = {answer for number in range(50) for answer in data.training(1).answers(number)}
    assert not trained & set(np.nonzero(held)[0].tolist())
    assert data.liked == (30, 30)


def test_prompts_are_shortened_alike_and_answers_never(tmp_path: Path, tokenizer: Path) -> None:  # noqa: F811
    turns = [{"role": role, "content": "what is five"} for role in ("user", "assistant") * 6]
    long = {"prompt": [*turns, {"role": "user", "content": "and two"}], "chosen": "three", "rejected": "four"}
    endless = {"prompt": "what", "chosen": " ".join(WORDS * 9), "rejected": "five"}
    data = prepared(tmp_path, tokenizer, [pair(1), long, endless])
    (counts,) = data.report["counts"]
    assert (counts["groups"], counts["too_long"], counts["answers_cut"]) == (2, 1, 0)
    assert counts["shortened"] == 2 and counts["turns_cut"] > 0
    chosen, rejected = (data.answer(number) for number in (2, 3))
    prompt = int(np.argmax(chosen[1] != 0))
    assert chosen[0][:prompt].tolist() == rejected[0][:prompt].tolist()
    dropped = prepared(tmp_path / "drop", tokenizer, [pair(1), long], too_long="drop")
    assert dropped.report["counts"][0]["too_long"] == 1


def test_what_is_prepared_for_one_method_is_not_taken_for_another(
    tmp_path: Path,
    tokenizer: Path,  # noqa: F811
) -> None:
    rows = [pair(n) for n in range(4)]
    first = prepared(tmp_path, tokenizer, rows)
    assert prepared(tmp_path, tokenizer, rows).folder == first.folder
    other = prepared(tmp_path, tokenizer, rows, "kto")
    assert other.folder != first.folder and (first.num_groups, other.num_groups) == (4, 8)


def test_damage_and_nothing_to_learn_are_said(tmp_path: Path, tokenizer: Path) -> None:  # noqa: F811
    data = prepared(tmp_path, tokenizer, [pair(0), "nonsense", {"prompt": "a", "chosen": "b", "rejected": "b"}])
    assert data.report["counts"][0]["unreadable"] == 2
    (data.folder / "scores.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"scores\.bin is missing or damaged"):
        GroupData.open(data.folder)
    shutil.rmtree(data.folder)
    with pytest.raises(UserError, match=r"chat\.train\.0\.path = .* holds no preferences"):
        prepared(tmp_path, tokenizer, [{"prompt": "a"}])
    with pytest.raises(UserError, match="holds all preferences out"):
        prepared(tmp_path, tokenizer, [pair(0)], eval_fraction=0.9).training(0)


FORMS_OF_RECORDS: dict[str, tuple[list[Any], str]] = {
    "scores": (
        [{"query": f"what is {n}", "responses": ["one", "two", "three"][: 2 + n % 2], "scores": [1, 2, 0][: 2 + n % 2]}
         for n in range(6)],
        "rrhf",
    ),
    "labels": (
        [{"instruction": f"what is {n}", "output": WORDS[n], "kto_tag": n % 2 == 0} for n in range(6)], "kto",
    ),
    "transcripts": (
        [{"chosen": f"\n\nHuman: what is {n}\n\nAssistant: one", "rejected":
          f"\n\nHuman: what is {n}\n\nAssistant: two"} for n in range(6)],
        "dpo",
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS_OF_RECORDS)
def test_records_of_every_form_become_groups(form: str, tmp_path: Path, tokenizer: Path) -> None:  # noqa: F811
    rows, kind = FORMS_OF_RECORDS[form]
    data = prepared(tmp_path, tokenizer, rows, kind)
    assert data.num_groups == 6
    sizes = np.diff(data.firsts).tolist()
    assert sizes == {"scores": [2, 3] * 3, "labels": [1] * 6, "transcripts": [2] * 6}[form]
    wanted = {"scores": [1, 2, 1, 2, 0] * 3, "labels": [1, 0] * 3, "transcripts": [1, 0] * 6}[form]
    assert data.scores.tolist() == wanted
    ids, weights, _ = data.answer(0)
    text = data.chat.encoder.tokenizer.tokenizer.decode(ids[weights > 0].tolist())
    assert text.strip() == {"scores": "one", "labels": WORDS[0], "transcripts": "one"}[form]


def test_columns_of_the_run_file_name_the_fields(tmp_path: Path, tokenizer: Path) -> None:  # noqa: F811
    rows = [{"ask": f"what is {n}", "good": "one", "bad": "two"} for n in range(3)]
    config = of_method(config_of(tmp_path, tokenizer, rows, LENGTH, eval_fraction=0.0), "dpo")
    columns = {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    source = config.chat.train[0].model_copy(update={"columns": Columns(**columns)})
    chat = config.chat.model_copy(update={"train": (source,)})
    assert prepare_groups(config.model_copy(update={"chat": chat})).num_groups == 3
    with pytest.raises(UserError, match="no preference can be made"):
        prepare_groups(config)


@pytest.mark.parametrize("label", [True, False])
def test_labels_that_are_all_alike_are_said(label: bool, tmp_path: Path, tokenizer: Path) -> None:  # noqa: F811
    rows = [{"prompt": f"what is {n}", "completion": "one", "label": label} for n in range(4)]
    notices: list[str] = []
    config = of_method(config_of(tmp_path, tokenizer, rows, LENGTH, eval_fraction=0.0), "kto")
    prepare_groups(config, notices.append)
    assert notices[-1].startswith(f"all 4 answers to train on are {'liked' if label else 'not liked'}, and kto")
