"""Tokenizer and token files that do not belong together are never trained on without an error or a notice."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from llm_parallel.config.tree import DataConfig, Source
from llm_parallel.data.mix import check_token_files
from llm_parallel.data.prepare import PrepareConfig
from llm_parallel.data.prepare import prepare as prepare_tokens
from llm_parallel.data.samples import SampleSource
from llm_parallel.data.tokenizer import load_tokenizer, train_sentencepiece
from llm_parallel.errors import UserError
from llm_parallel.files import locked
from tests.support.data_helpers import WORDS, text_of, write_token_file
from tests.support.data_helpers import prepare_small as prepare


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder with corpus a and the tokenizer that was trained on it."""
    prepare("a", tmp_path, "a")
    return tmp_path / "set"


def test_a_second_corpus_does_not_replace_the_firsts_tokenizer(made: Path, tmp_path: Path) -> None:
    before = (made / "tokenizer.model").read_bytes()
    with pytest.raises(
        UserError, match=r"tokenizer\.model is the tokenizer of .*set/a, and --train-vocab would replace"
    ):
        prepare("b", tmp_path, "b")
    assert (made / "tokenizer.model").read_bytes() == before and not (made / "b.idx").exists()
    prepare("b", tmp_path, "b", None, str(made / "tokenizer.model"))
    with pytest.raises(UserError, match=r"is the tokenizer of .*set/b"):
        prepare("b", tmp_path, "a")  # its own corpus would be made anew, but b was prepared with it too
    assert (made / "tokenizer.model").read_bytes() == before


def test_the_same_tokenizer_is_no_other(made: Path, tmp_path: Path) -> None:
    """From files that look new, since they were copied or touched."""
    before = (made / "tokenizer.model").read_bytes()
    prepare("a", tmp_path, "again")
    assert (made / "tokenizer.model").read_bytes() == before and (made / "again.idx").exists()
    for other in ("a", "again"):
        with pytest.raises(UserError, match="would replace"):
            prepare("b", tmp_path, other)


def test_ones_own_corpus_may_be_made_anew(made: Path, tmp_path: Path) -> None:
    before = (made / "tokenizer.model").read_bytes()
    prepare("b", tmp_path, "a")
    assert (made / "tokenizer.model").read_bytes() != before
    tokenizer = load_tokenizer(made / "tokenizer.model")
    assert json.loads((made / "a.report.json").read_text())["tokenizer_fingerprint"] == tokenizer.fingerprint


def test_a_tokenizer_from_elsewhere_is_not_replaced(tmp_path: Path) -> None:
    theirs = train_sentencepiece([WORDS["b"]] * 50, 290, tmp_path / "set").read_bytes()
    with pytest.raises(UserError, match=r"tokenizer\.model is a tokenizer from elsewhere, and --train-vocab"):
        prepare("a", tmp_path, "a")
    assert (tmp_path / "set" / "tokenizer.model").read_bytes() == theirs


def test_a_corpus_that_is_being_made_counts_too(tmp_path: Path) -> None:
    """It has no report yet, and reads the tokenizer until it has."""
    prepare("a", tmp_path, "a")
    for path in (tmp_path / "set").glob("a.*"):
        path.unlink()
    with pytest.raises(UserError, match=r"is the tokenizer of .*set/a"):
        prepare("b", tmp_path, "b")


def _held(path: Path, said: str) -> None:
    with pytest.raises(UserError, match=said), locked(path, "held"):
        pass


@pytest.mark.processes
def test_two_are_not_trained_at_once(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with locked(tmp_path / "set" / ".tokenizer.model.lock", "held"):
        child = multiprocessing.get_context("fork").Process(
            target=_held, args=(tmp_path / "set" / ".tokenizer.model.lock", "held")
        )
        child.start()
        child.join()
        assert child.exitcode == 0
        with pytest.raises(UserError, match=r"another process is training .*tokenizer\.model"):
            prepare("a", tmp_path, "a")


def data_of(*train: Path, held_out: Sequence[Path] = ()) -> DataConfig:
    """Sources of a run."""
    return DataConfig(
        train=tuple(Source(path=str(path)) for path in train),
        eval=tuple(Source(path=str(path)) for path in held_out),
        seq_length_tokens=16,
    )


def test_every_source_is_compared(made: Path, tmp_path: Path) -> None:
    """With the run's tokenizer, and with each other where it names none; training and held-out."""
    (tmp_path / "b").mkdir()
    prepare("b", tmp_path / "b", "b")
    a, b = made / "a", tmp_path / "b" / "set" / "b"
    ours, theirs = load_tokenizer(made), load_tokenizer(b.parent)
    assert check_token_files(data_of(a), 300, ours) == check_token_files(data_of(a, a), 300) == []
    for data, tokenizer in (
        (data_of(a), theirs),
        (data_of(a, b), ours),
        (data_of(a, held_out=[b]), ours),
        (data_of(a, b), None),
        (data_of(a, held_out=[b]), None),
    ):
        with pytest.raises(
            UserError, match=r"was prepared with another tokenizer \(.*numbers mean other tokens"
        ) as found:
            check_token_files(data, 300, tokenizer)
        assert ours.fingerprint in str(found.value) and theirs.fingerprint in str(found.value)


def test_files_from_elsewhere_are_named(made: Path) -> None:
    elsewhere = Path(write_token_file(made / "elsewhere", [np.arange(300, dtype=np.int32)]))
    (notice,) = check_token_files(data_of(made / "a", held_out=[elsewhere]), 300, load_tokenizer(made))
    assert notice.startswith(f"{elsewhere} came without a report") and "is not known" in notice


def test_documents_that_begin_or_end_in_different_ways_are_named(made: Path, tmp_path: Path) -> None:
    for name, marks in (("begun", {"prepend_bos": True}), ("open", {"append_eod": False})):
        text = str(text_of("a", tmp_path))
        prepare_tokens(PrepareConfig((text,), str(made / name), str(made), workers=1, **marks))  # type: ignore[arg-type]
    a, begun, ends_open = made / "a", made / "begun", made / "open"
    old = json.loads((made / "a.report.json").read_text())
    assert old.pop("append_eod") and not old.pop("prepend_bos")
    (made / "a.report.json").write_text(json.dumps(old))  # as before these fields were written
    assert check_token_files(data_of(begun, begun), 300) == []
    (notice,) = check_token_files(data_of(a, held_out=[begun]), 300)
    assert notice.startswith(f"the documents of {begun} begin with the tokenizer's begin token and those of {a} do not")
    (notice,) = check_token_files(data_of(ends_open, a), 300)
    assert notice.startswith(f"the documents of {a} end with the tokenizer's end token and those of {ends_open} do not")


@pytest.mark.parametrize("wrong", [300, -1, 70000])
def test_ids_that_the_model_does_not_have(wrong: int, made: Path) -> None:
    """At the start if they are near a file's beginning, else in the sample that holds them."""
    ids = np.arange(200, dtype=np.int32)
    ids[100] = wrong
    elsewhere = Path(write_token_file(made / "elsewhere", [ids]))
    said = f"elsewhere holds the token id {wrong}, and model.vocab_size=300 has the ids 0 to 299"
    with pytest.raises(UserError, match=said):
        check_token_files(data_of(elsewhere), 300)
    for split in ("train", "eval"):
        data = data_of(elsewhere, held_out=[elsewhere])
        source = SampleSource(data, 1, split, 300)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=said):
            for number in range(12):
                source.sample(number)


def test_a_report_of_other_files_is_refused(made: Path) -> None:
    write_token_file(made / "other", [np.arange(50, dtype=np.uint16)], np.uint16)
    for ending in ("bin", "idx"):
        shutil.copy(made / f"other.{ending}", made / f"a.{ending}")
    with pytest.raises(
        UserError, match=r"a\.report\.json is of other files: it says \d+ tokens, and .*a\.bin holds 50"
    ):
        check_token_files(data_of(made / "a"), 300)
    (made / "a.report.json").write_text("{")
    with pytest.raises(UserError, match=r"a\.report\.json is damaged"):
        check_token_files(data_of(made / "a"), 300)
