"""``--help`` of every command: its group, examples that its own parser takes, and completion of fields."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import typer

from llm_parallel import cli
from llm_parallel.command_help import COMMANDS, DATA, MEASURE, OPERATE, PLAN, TRAIN, USE
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
    at = [text.index(f" {group} ─") for group in (DATA, TRAIN, OPERATE, PLAN, MEASURE, USE)]
    assert at == sorted(at)


@pytest.mark.parametrize("name", ["pretrain", "bench step"])
def test_short_help_with_examples_everywhere(name: str) -> None:
    done = in_process(*name.split(), "-h")
    assert done.returncode == 0
    assert "Examples:" in done.stdout and f"llm-parallel {name} configs/" in done.stdout


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
