"""Tokenizers of both kinds against the libraries that made them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llm_parallel.data.tokenizer import (
    Tokenizer,
    check_vocabulary,
    load_tokenizer,
    train_sentencepiece,
)
from llm_parallel.errors import UserError

TEXTS = [Path(file).read_text(encoding="utf-8") for file in (argparse.__file__, pytest.__file__)]
HARD = ["", " ", "  two  spaces ", "\ttab\nline\r\n\n", "1234567", "naïve … 日本語 🦙", "<s></s><unk>", "x" * 3000]


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(TEXTS, 600, tmp_path_factory.mktemp("sp"))


def write_json(folder: Path, special: list[str]) -> Path:
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    path = folder / "tokenizer.json"
    model.enable_truncation(16)
    model.enable_padding(length=40)
    model.save(str(path))
    return path


@pytest.fixture(scope="module")
def json_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_json(tmp_path_factory.mktemp("hf"), ["<|begin|>", "<|endoftext|>"])


@pytest.fixture(params=["sentencepiece_file", "json_file"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return load_tokenizer(request.getfixturevalue(request.param))


@pytest.mark.parametrize("text", [*HARD, *TEXTS])
def test_text_survives_encoding(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= number < tokenizer.vocab_size for number in ids)
    assert tokenizer.eod not in ids and tokenizer.bos not in ids


def test_batch_is_the_texts_one_by_one(tokenizer: Tokenizer) -> None:
    batch = tokenizer.encode_batch([*HARD, *TEXTS])
    assert all(ids.dtype == np.int32 for ids in batch)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in [*HARD, *TEXTS]]


def test_control_tokens_give_no_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a word")
    assert tokenizer.decode([*ids, tokenizer.eod]) == "a word"
    assert tokenizer.decode(np.array(ids)) == "a word"


def test_trained_model_is_llamas_kind(sentencepiece_file: Path) -> None:
    ours = load_tokenizer(sentencepiece_file)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    assert (ours.vocab_size, ours.bos, ours.eod, theirs.unk_id(), theirs.pad_id()) == (600, 1, 2, 0, -1)
    assert ours.encode(TEXTS[0]) == theirs.encode(TEXTS[0])
    assert all(theirs.is_byte(3 + byte) for byte in range(256))
    words = [theirs.id_to_piece(number) for number in range(259, 600)]
    assert any(set(word) == {"▁"} and len(word) >= 4 for word in words), "indentation is words of its own"


def test_digits_stand_alone_however_often_a_number_occurs(tmp_path: Path) -> None:
    path = train_sentencepiece([*TEXTS, "in 2024 and 2025\n" * 2000], 600, tmp_path)
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert [model.id_to_piece(number) for number in model.encode("2024")][-4:] == ["2", "0", "2", "4"]


def test_training_repeats_and_looks_at_no_more_than_asked(tmp_path: Path, sentencepiece_file: Path) -> None:
    again = train_sentencepiece(TEXTS, 600, tmp_path / "again")
    assert again.read_bytes() == sentencepiece_file.read_bytes()

    def texts() -> list[str]:
        yield TEXTS[0]
        raise AssertionError("enough was read")

    train_sentencepiece(texts(), 500, tmp_path / "short", max_bytes=1000)


def test_declared_end_token_beats_well_known_names(tmp_path: Path) -> None:
    path = write_json(tmp_path, ["<|begin|>", "<|endoftext|>", "<|stop|>"])
    assert (load_tokenizer(path).eod, load_tokenizer(path).bos) == (1, None)
    config = {"eos_token": {"content": "<|stop|>"}, "bos_token": "<|begin|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert (load_tokenizer(path).eod, load_tokenizer(path).bos) == (2, 0)


def test_folder_stands_for_the_file_in_it(tmp_path: Path, sentencepiece_file: Path, json_file: Path) -> None:
    assert load_tokenizer(sentencepiece_file.parent).name == str(sentencepiece_file)
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file.read_bytes())
    (tmp_path / "tokenizer.json").write_bytes(json_file.read_bytes())
    assert load_tokenizer(str(tmp_path)).name == str(tmp_path / "tokenizer.json")


def test_fingerprint_follows_content_not_name(tmp_path: Path, sentencepiece_file: Path, json_file: Path) -> None:
    copy = tmp_path / "copy.model"
    copy.write_bytes(sentencepiece_file.read_bytes())
    fingerprint = load_tokenizer(sentencepiece_file).fingerprint
    assert load_tokenizer(copy).fingerprint == fingerprint != load_tokenizer(json_file).fingerprint


def test_unusable_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path / "missing.model")
    with pytest.raises(UserError, match="holds neither"):
        load_tokenizer(tmp_path)
    (tmp_path / "x.model").write_bytes(b"no model")
    with pytest.raises(UserError, match=r"x\.model is not a SentencePiece model"):
        load_tokenizer(tmp_path / "x.model")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match="is not a Hugging Face"):
        load_tokenizer(tmp_path / "x.json")
    with pytest.raises(UserError, match="does not say which token ends a document"):
        load_tokenizer(write_json(tmp_path, ["<|begin|>"]))


def test_sentencepiece_without_an_end_token_is_refused(tmp_path: Path, sentencepiece_file: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[0].split("\n")),
        model_prefix=str(tmp_path / "noend"),
        vocab_size=100,
        eos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(UserError, match="no end-of-sentence token"):
        load_tokenizer(tmp_path / "noend.model")


@pytest.mark.parametrize(("texts", "vocab_size", "message"), [
    ([], 500, "no text to train"),
    (["short"], 5000, "vocabulary of 5000 does not fit.*too high"),
    (TEXTS, 50, "vocabulary of 50 does not fit.*smaller than"),
])  # fmt: skip
def test_vocabularies_that_cannot_be_trained(tmp_path: Path, texts: list[str], vocab_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        train_sentencepiece(texts, vocab_size, tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_model_vocabulary_must_hold_the_tokenizers(tokenizer: Tokenizer) -> None:
    check_vocabulary(tokenizer, tokenizer.vocab_size)
    check_vocabulary(tokenizer, tokenizer.vocab_size + 100)
    with pytest.raises(UserError, match=rf"model.vocab_size={tokenizer.vocab_size - 1} is too small for tokenizer"):
        check_vocabulary(tokenizer, tokenizer.vocab_size - 1)
