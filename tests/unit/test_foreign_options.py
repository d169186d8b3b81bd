"""Megatron-LM's options of preprocess_data.py, given to ``prepare``."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from llm_parallel.cli import app
from llm_parallel.data.foreign_options import translated
from llm_parallel.errors import UserError


def test_a_command_line_of_megatron_lm() -> None:
    notices: list[str] = []
    given = (
        "--input a.jsonl b.jsonl --output-prefix data/a --json-keys text --tokenizer-type GPTSentencePieceTokenizer "
        "--tokenizer-model=t.model --append-eod --workers 4 --log-interval 1000 --keep-sequential-samples"
    )
    ours = "a.jsonl b.jsonl --out data/a --key text --tokenizer t.model --append-eod --workers 4"
    assert translated(given.split(), notices.append) == ours.split()
    assert len(notices) == 7
    assert "--json-keys is read as --key" in notices


@pytest.mark.parametrize(
    "ours", ["a b --out x --train-vocab 300 --no-append-eod", "a --out=x --tokenizer t --key=body --strict"]
)
def test_options_of_ours_stay(ours: str) -> None:
    assert translated(ours.split(), pytest.fail) == ours.split()


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("--vocab-file v.json", ["--vocab-file", "tokenizer.json", "save_pretrained"]),
        ("--merge-file m.txt", ["--merge-file", "tokenizer.json"]),
        ("--json-keys text body", ["--json-keys text body", "once for each"]),
        ("--split-sentences", ["--split-sentences", "sentences"]),
        ("--output-prefix --workers 2", ["--output-prefix has no value"]),
    ],
)
def test_what_has_no_counterpart_is_answered(given: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        translated(given.split(), lambda _: None)
    assert all(part in str(raised.value) for part in parts)


def test_the_command_takes_them(tmp_path: Path) -> None:
    """Through the command itself, whose own checks come after: no tokenizer is named here."""
    result = CliRunner().invoke(app, ["prepare", "--input", "a.jsonl", "--output-prefix", str(tmp_path / "a")])
    assert isinstance(result.exception, UserError)
    assert "--tokenizer and --train-vocab: neither given" in str(result.exception)
