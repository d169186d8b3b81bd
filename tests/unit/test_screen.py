"""Tables on terminals of several widths, and as Markdown where there is none."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from llm_parallel.screen import markdown_table, say_next, show, show_facts

TABLE = markdown_table(
    ["layout", "step s", "tokens/s/GPU", "memory GiB"],
    [["tp 4 x pp 2 x dp 8", "1.234", "12,345", "61.2"], ["tp 8 x pp 1 x dp 8", "1.500", "9,999", "70.0"]],
)


def shown(text: str, width: int, terminal: bool = True) -> str:
    out = io.StringIO()
    show(text, Console(file=out, force_terminal=terminal, width=width, color_system=None))
    return out.getvalue()


def test_markdown_aligns_numbers() -> None:
    assert TABLE.splitlines()[:3] == [
        "| layout | step s | tokens/s/GPU | memory GiB |",
        "| --- | ---: | ---: | ---: |",
        "| tp 4 x pp 2 x dp 8 | 1.234 | 12,345 | 61.2 |",
    ]


def test_a_pipe_gets_the_text_as_it_is() -> None:
    text = f"before [bold]\n{TABLE}\nafter"
    assert shown(text, 20, terminal=False) == text + "\n"


@pytest.mark.parametrize("width", [30, 60, 80, 110, 200])
def test_a_terminal_gets_a_drawing_with_whole_numbers(width: int) -> None:
    text = shown(f"before\n{TABLE}\nafter [x]", width)
    assert "|" not in text and text.startswith("before\n") and text.endswith("after [x]\n")
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    for cell in ("1.234", "12,345", "61.2", "1.500", "9,999", "70.0"):
        assert cell in text


def test_rows_become_paragraphs_where_a_table_does_not_fit() -> None:
    assert [line.rstrip() for line in shown(TABLE, 37).splitlines()] == [
        "tp 4 x pp 2 x dp 8",
        "  step s 1.234, tokens/s/GPU 12,345,",
        "  memory GiB 61.2",
        "tp 8 x pp 1 x dp 8",
        "  step s 1.500, tokens/s/GPU 9,999,",
        "  memory GiB 70.0",
    ]


def test_the_next_command_is_one_line_on_the_error_stream(capsys: pytest.CaptureFixture[str]) -> None:
    say_next("llm-parallel status runs/first")
    assert capsys.readouterr() == ("", "next: llm-parallel status runs/first\n")


FACTS = [("tokens", "1,234,567"), ("files not read", "a/path/of/a/file.csv has no column 'text'\nb is empty")]


@pytest.mark.parametrize(
    ("width", "terminal", "expected"),
    [
        (
            20,
            False,
            "x.bin\n  tokens           1,234,567\n  files not read   a/path/of/a/file.csv has no column 'text'\n"
            "                   b is empty\n",
        ),
        (
            44,
            True,
            "x.bin\n  tokens           1,234,567\n  files not read\n    a/path/of/a/file.csv has no column\n"
            "      'text'\n    b is empty\n",
        ),
    ],
)
def test_facts_stand_beside_their_names_or_below(width: int, terminal: bool, expected: str) -> None:
    out = io.StringIO()
    show_facts("x.bin", FACTS, Console(file=out, force_terminal=terminal, width=width, color_system=None))
    assert out.getvalue() == expected
