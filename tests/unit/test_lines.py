"""Lines for people: whole in a pipe, divided between words on a terminal, and commands that can be copied."""

from __future__ import annotations

import io
import shlex
import sys

import pytest
from rich.cells import cell_len

from llm_parallel.lines import note, say, wrapped

SENTENCE = (
    "error: data.train = runs/a/long/path/that/ends/far/to/the/right/of/the/terminals/edge.bin is not there; run "
    "`llm-parallel prepare README.md --out data/x` first, or give a file of 1,234,567 tokens, 12.5 % of ラマ言語"
)
COMMAND = (
    """next: llm-parallel generate runs/first --chat --prompt "What is json for?" 'data.eval=[]' --temperature 0.7"""
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", [20, 37, 60, 80, 110])
def test_nothing_between_spaces_is_divided(width: int) -> None:
    text = wrapped(SENTENCE, width)
    assert text.replace(" \\\n", " ").split() == SENTENCE.split()
    for line in text.splitlines():
        assert cell_len(line) <= width or len(line.removesuffix(" \\").split()) == 1
    if width >= 48:  # the command fits into a line and stays in one
        assert "`llm-parallel prepare README.md --out data/x`" in text


def test_wide_characters_count_twice() -> None:
    assert wrapped("ラマ言語 ラマ言語", 16) == "ラマ言語\n  ラマ言語"
    assert wrapped("ラマ言語 ラマ言語", 17) == "ラマ言語 ラマ言語"


@pytest.mark.parametrize("width", [24, 40, 60, 79])
def test_a_command_that_is_divided_can_be_pasted(width: int) -> None:
    text = wrapped(COMMAND, width)
    assert len(text.splitlines()) > 1
    pasted = text.replace("\\\n", "")  # what a shell does
    assert shlex.split(pasted) == shlex.split(COMMAND)
    assert not any(line.endswith("--temperature \\") for line in text.splitlines()), "an option keeps its value"


def test_a_command_within_a_sentence_that_cannot_fit_is_continued_too() -> None:
    text = wrapped("try `llm-parallel pretrain configs/first-run.yaml train.steps=150 parallel.pp=1`, or not", 50)
    quoted = text.split("`")[1]
    assert shlex.split(quoted.replace("\\\n", ""))[1:] == [
        "pretrain",
        "configs/first-run.yaml",
        "train.steps=150",
        "parallel.pp=1",
    ]


def test_lines_and_indents_stay() -> None:
    assert wrapped("  a bb ccc\n\nlast", 8) == "  a bb\n    ccc\n\nlast"
    assert wrapped("  a bb ccc", 8, hang=0) == "  a bb\n  ccc"


def test_a_pipe_gets_lines_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    say(SENTENCE)
    note(COMMAND)
    assert capsys.readouterr() == (SENTENCE + "\n", COMMAND + "\n")


def test_a_terminal_gets_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    note(SENTENCE)
    assert screen.getvalue() == wrapped(SENTENCE, 60) + "\n"
