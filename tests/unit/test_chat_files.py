"""Conversations become files of tokens once, and samples of them are what the model is trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_parallel.config.tree import RunConfig
from llm_parallel.data.chat_data import ChatData
from llm_parallel.data.chat_files import prepare_conversations
from llm_parallel.data.tokenizer import train_sentencepiece
from llm_parallel.errors import UserError

LENGTH = 48
WORDS = "the sum of two and three is five while a question has an answer and a turn ends".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = " ".join(WORDS * 40)
    return train_sentencepiece([text, text.title(), "user\nassistant\nsystem\n"], 320, tmp_path_factory.mktemp("tok"))


def row(number: int, turns: int = 1) -> dict[str, Any]:
    messages = []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"what is {number} and {turn}"})
        messages.append({"role": "assistant", "content": " ".join(WORDS[: 2 + (number + turn) % 5])})
    return {"messages": messages}


def config_of(folder: Path, tokenizer: Path, rows: list[Any], length: int = LENGTH, **chat: Any) -> RunConfig:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in rows) + "\n")
    return RunConfig(
        run_dir=str(folder / "run"),
        data={"tokenizer": str(tokenizer), "seq_length_tokens": length},
        chat={"train": [{"path": str(path)}], **chat},
    )


def test_samples_hold_every_conversation_with_its_weights_and_never_across(tmp_path: Path, tokenizer: Path) -> None:
    data = prepare_conversations(config_of(tmp_path, tokenizer, [row(n) for n in range(40)], eval_fraction=0.0))
    samples, seen = data.training(3), []
    for number in range(data.rows_per_epoch):
        sample = samples.sample(number)
        ends = [*sample.document_starts[1:].tolist(), LENGTH]
        for start, end in zip(sample.document_starts.tolist(), ends):
            if not sample.weights[start:end].any():
                assert end == LENGTH and (sample.tokens[start:end] == data.report["pad"]).all()
                continue
            whole = [*sample.tokens[start:end].tolist(), int(sample.labels[end - 1])]
            assert whole[1:] == sample.labels[start:end].tolist()
            assert whole[0] == 1 and whole[-1] == 2 and sample.weights[end - 1] == 1.0
            seen.append(whole)
    stored = [data.conversation(number)[0].tolist() for number in range(40)]
    assert sorted(seen) == sorted(stored)


def test_they_are_prepared_once_and_again_when_something_changes(tmp_path: Path, tokenizer: Path) -> None:
    config = config_of(tmp_path, tokenizer, [row(n) for n in range(10)])
    first = prepare_conversations(config)
    written = (first.folder / "report.json").stat().st_mtime_ns
    assert prepare_conversations(config).folder == first.folder
    assert (first.folder / "report.json").stat().st_mtime_ns == written
    other = config_of(tmp_path, tokenizer, [row(n) for n in range(11)])
    assert prepare_conversations(other).folder != first.folder
    assert ChatData.open(first.folder).tokens.num_documents == 10


def test_the_same_tokenizer_elsewhere_makes_the_same_conversations(tmp_path: Path, tokenizer: Path) -> None:
    """As when the model that is fine-tuned has a newer checkpoint, and the older one is gone."""
    moved = Path(shutil.copy(tokenizer, tmp_path / "moved.model"))
    first = prepare_conversations(config_of(tmp_path, tokenizer, [row(n) for n in range(4)]))
    second = prepare_conversations(config_of(tmp_path, moved, [row(n) for n in range(4)]))
    assert second.folder == first.folder and second.report["tokenizer"] == str(moved)
    assert second.encode_prompts(["what"]) == first.encode_prompts(["what"])


def test_records_have_the_numbers_of_their_lines(tmp_path: Path, tokenizer: Path) -> None:
    """Also behind lines that are no records, and lines that are no conversations."""
    rows = [row(0), "{", row(2), {"text": "a"}, "{", row(5)]
    data = prepare_conversations(config_of(tmp_path, tokenizer, rows, eval_fraction=0.0))
    assert data.lines.tolist() == [0, 2, 5]


@pytest.mark.processes
def test_several_processes_write_the_same_files(tmp_path: Path, tokenizer: Path) -> None:
    """More records than one block holds, some of them broken."""
    rows = [row(n) if n % 100 else "{" for n in range(600)]
    one = prepare_conversations(config_of(tmp_path, tokenizer, rows))
    names = ("tokens.bin", "tokens.idx", "weights.bin", "sources.bin", "lines.bin", "report.json")
    before = [(one.folder / name).read_bytes() for name in names]
    shutil.rmtree(one.folder)
    prepare_conversations(config_of(tmp_path, tokenizer, rows), workers=2)
    assert [(one.folder / name).read_bytes() for name in names] == before


def test_held_out_conversations_are_not_trained_on(tmp_path: Path, tokenizer: Path) -> None:
    data = prepare_conversations(config_of(tmp_path, tokenizer, [row(n) for n in range(50)], eval_fraction=0.1))
    train, held = data.numbers("train"), data.numbers("eval")
    assert len(held) == 5 and sorted([*train.tolist(), *held.tolist()]) == list(range(50))
    assert data.held_out_rows and not set(held.tolist()) & set(train.tolist())
    for question, number in zip(data.questions(5), held.tolist()):
        ids, weights = data.conversation(number)
        assert ids.tolist()[: len(question)] == question and not weights[: len(question)].any()
        assert weights[len(question) :].all()


def test_long_conversations_lose_their_first_turns_and_then_the_end_of_the_answer(
    tmp_path: Path, tokenizer: Path
) -> None:
    long = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "five " * 90}]}
    told: list[str] = []
    data = prepare_conversations(config_of(tmp_path, tokenizer, [row(1, 6), long], eval_fraction=0.0), told.append)
    many, cut = (data.conversation(number) for number in (0, 1))
    assert len(many[0]) <= LENGTH + 1 and many[0][-1] == 2 and (many[1][np.asarray(many[0]) == 2] > 0).sum() >= 1
    assert len(cut[0]) == LENGTH + 1 and cut[0][-1] != 2
    assert any("at the beginning of 1 conversation to fit" in text for text in told)
    assert any("cut 1 answer at" in text for text in told)
    dropped = prepare_conversations(
        config_of(tmp_path, tokenizer, [row(1, 6), long, row(0)], eval_fraction=0.0, too_long="drop"), told.append
    )
    assert dropped.tokens.num_documents == 1
    assert any("left out 2 conversations that do not fit" in text for text in told)


def test_a_source_of_which_nothing_is_left_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(UserError, match=r"none of its 1 records can be read; .*line 1 is not JSON"):
        prepare_conversations(config_of(tmp_path, tokenizer, ["{"]))
    silent = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False}]}
    with pytest.raises(UserError, match="1 have no answer of the assistant that is trained"):
        prepare_conversations(config_of(tmp_path, tokenizer, [silent]))
    with pytest.raises(UserError, match=r"data\.seq_length_tokens = 8"):
        prepare_conversations(config_of(tmp_path, tokenizer, [row(1)], length=8))


def test_a_damaged_file_is_named(tmp_path: Path, tokenizer: Path) -> None:
    data = prepare_conversations(config_of(tmp_path, tokenizer, [row(n) for n in range(3)]))
    (data.folder / "weights.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"weights\.bin is missing or damaged; remove"):
        ChatData.open(data.folder)


@pytest.mark.parametrize(
    ("split", "content"), [("train", ""), ("eval", ""), ("eval", None), ("train", "plain text\n" * 9)]
)
def test_what_is_wrong_about_a_file_names_its_field(
    tmp_path: Path, tokenizer: Path, split: str, content: str | None
) -> None:
    config = config_of(tmp_path, tokenizer, [row(n) for n in range(4)])
    bad = tmp_path / "bad.txt"
    if content is not None:
        bad.write_text(content)
    sources = {"train": [*config.chat.train], "eval": []}
    sources[split] += [type(config.chat.train[0])(path=str(bad))]
    chat = config.chat.model_copy(update={name: tuple(found) for name, found in sources.items()})
    number = len(sources[split]) - 1
    with pytest.raises(UserError, match=rf"^chat\.{split}\.{number}\.path: .*bad\.txt (is|does not exist)"):
        prepare_conversations(config.model_copy(update={"chat": chat}))


def test_data_sets_of_one_folder_have_their_own_names(tmp_path: Path, tokenizer: Path) -> None:
    names = ("first", "second")
    for name in names:
        (tmp_path / f"{name}.json").write_text(json.dumps([{"instruction": "what", "output": f"the {name}"}] * 5))
    declared = {name: {"file_name": f"{name}.json"} for name in names}
    (tmp_path / "dataset_info.json").write_text(json.dumps(declared))
    sources = [{"path": str(tmp_path), "dataset": name} for name in names]
    config = config_of(tmp_path, tokenizer, [row(0)])
    config = config.model_copy(update={"chat": type(config.chat).model_validate({"train": sources})})
    said: list[str] = []
    data = prepare_conversations(config, said.append)
    assert data.report["paths"] == [f"{tmp_path}: first", f"{tmp_path}: second"]
    assert [any(text.startswith(f"{tmp_path}: {name}: 5 conversations") for text in said) for name in names] == [
        True
    ] * 2
