"""``--help`` of every command: its group, examples that its own parser takes, and completion of fields."""

from __future__ import annotations

import io
import re
import shlex
import sys
from typing import Any

import pytest
import typer
import typer.core

from llm_parallel import cli
from llm_parallel.command_help import COMMANDS, DATA, MEASURE, OPERATE, PLAN, TRAIN, USE
from llm_parallel.help_page import PANELS_FROM, page
from tests.support.in_process import in_process

ROOT: Any = typer.main.get_command(cli.app)


def leaves(group: Any, prefix: str = "") -> dict[str, Any]:
    found = {}
    for name, command in group.commands.items():
        full = f"{prefix} {name}".strip()
        found |= leaves(command, full) if hasattr(command, "commands") else {full: command}
    return found


def test_every_command_has_a_group_and_examples() -> None:
    assert leaves(ROOT).keys() == COMMANDS.keys()
    assert all(described.examples for described in COMMANDS.values())


@pytest.mark.parametrize(
    ("name", "example"), [(name, example) for name, described in COMMANDS.items() for example in described.examples]
)
def test_examples_are_understood(name: str, example: str) -> None:
    leaves(ROOT)[name].make_context(name, shlex.split(example))


def test_the_overview_lists_groups_in_the_order_of_the_work() -> None:
    text = in_process("-h").stdout
    at = [text.index(f"\n{group}:\n") for group in (DATA, TRAIN, OPERATE, PLAN, MEASURE, USE)]
    assert at == sorted(at)


def names_of(command: Any) -> list[str]:
    return [name for one in command.params for name in (one.opts if one.param_type_name == "option" else [])]


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_divides_no_word_at_60_columns(name: str) -> None:
    command = leaves(ROOT)[name] if name else ROOT
    context = command.make_context(f"llm-parallel {name}".strip(), [], resilient_parsing=True)
    whole, text = page(command, context, None), page(command, context, 60)
    assert text.replace(" \\\n", " ").split() == whole.split()
    assert max(map(len, text.splitlines())) <= 60


@pytest.mark.parametrize("name", COMMANDS)
def test_panels_cut_no_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the terminal is wide enough for them to be drawn."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", str(PANELS_FROM))
    monkeypatch.setattr(sys, "stdout", screen := Terminal())
    command = leaves(ROOT)[name]
    command.get_help(command.make_context(f"llm-parallel {name}", [], resilient_parsing=True))
    text = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue())
    assert "╭" in text
    assert [one for one in names_of(command) if f"{one} " not in text] == []


@pytest.mark.parametrize(
    "arguments", [("prepare", "--frobnicate"), ("no-such-command",), ("plan", "--gpus", "many"), ("pretrain",)]
)
def test_a_wrong_command_line_is_one_sentence(arguments: tuple[str, ...]) -> None:
    done = in_process(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "--help`" in done.stderr


@pytest.mark.parametrize("name", ["pretrain", "bench step"])
def test_short_help_with_examples_everywhere(name: str) -> None:
    done = in_process(*name.split(), "-h")
    assert done.returncode == 0
    assert "Examples:" in done.stdout and f"llm-parallel {name} configs/" in done.stdout


@pytest.mark.parametrize("names", [("-h", "--help"), ("--help", "-h")])
def test_long_names_come_first_in_whatever_order_click_keeps_them(
    names: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its set of the names of ``--help`` is in another order in every process."""
    monkeypatch.setattr(typer.core.TyperCommand, "get_help_option_names", lambda *_: list(names))
    assert "\n  --help, -h\n" in in_process("plan", "-h").stdout


def test_version() -> None:
    done = in_process("--version")
    assert done.returncode == 0
    assert {line.split()[0] for line in done.stdout.splitlines()} >= {"python", "llm-parallel", "torch"}


@pytest.mark.parametrize(
    ("arguments", "overrides", "dry_run"),
    [
        (["run.yaml"], [], False),
        (["run.yaml", "train.steps=3", "--dry-run"], ["train.steps=3"], True),
        (["run.yaml", "--train.steps", "3", "--tp=2", "seed=1"], ["--train.steps", "3", "--tp=2", "seed=1"], False),
        (["--dry-run", "run.yaml", "--optim.lr", "-1"], ["--optim.lr", "-1"], True),
    ],
)
def test_overrides_are_taken_as_they_are_written(arguments: list[str], overrides: list[str], dry_run: bool) -> None:
    parsed = leaves(ROOT)["pretrain"].make_context("pretrain", list(arguments)).params
    found = parsed["run_file"], list(parsed["overrides"]), parsed["dry_run"]
    assert found == ("run.yaml", overrides, dry_run)


def test_the_shell_completes_fields() -> None:
    assert cli.complete_field("parallel.t") == ["parallel.tp="]
    assert "optim." in cli.complete_field("o") and "optim.lr=" in cli.complete_field("optim.l")
