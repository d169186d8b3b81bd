"""Options that ``llm_parallel.options`` makes of a dataclass's documented fields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import pytest
import typer
from typer.testing import CliRunner

from llm_launch.drill_request import DrillRequest
from llm_launch.submit_request import SubmitRequest
from llm_parallel.bench.requests import CommRequest, KernelsRequest, ScalingRequest, StepRequest
from llm_parallel.convert.request import ConvertRequest
from llm_parallel.data.request import PrepareRequest
from llm_parallel.generate.request import GenerateRequest
from llm_parallel.goodput.request import GoodputRequest
from llm_parallel.help_page import Command
from llm_parallel.options import argument, documentation_of, not_an_option, option, with_options
from llm_parallel.planner.request import PlanRequest
from llm_parallel.report.request import ReportRequest

REQUESTS = (
    *(SubmitRequest, CommRequest, KernelsRequest, ScalingRequest, StepRequest),
    *(GoodputRequest, PlanRequest, ReportRequest),
    *(PrepareRequest, GenerateRequest, ConvertRequest, DrillRequest),
)


@dataclass(frozen=True)
class Asked:
    """One field of each kind."""

    files: Sequence[str] = argument((), name="paths")
    """Files to read."""
    count: int = 3
    """How many, and this line
    goes on."""
    names: Sequence[str] = option((), name="--name")
    """Given several times."""
    kinds: Sequence[str] = option((), commas=True)
    """Given with commas."""
    fast: bool = option(False, flag=True)
    """Given or not."""
    loud: bool = False
    """Given either way."""
    size: float | None = None
    """May be missing."""
    line: str = not_an_option(default="none")


def ran(*arguments: str) -> tuple[list[Asked], str]:
    """What a command receives for these arguments, and what it prints."""
    app, received = typer.Typer(), []

    @app.command(cls=Command)
    @with_options
    def command(asked: Asked, extra: int = 1) -> None:
        """Does something."""
        received.append(asked)

    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"})
    return received, result.output


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        ((), Asked()),
        (("a", "b", "--count", "5", "--size", "2.5"), Asked(files=("a", "b"), count=5, size=2.5)),
        (("--name", "x,y", "--name", "z", "--kinds", "x,y"), Asked(names=("x,y", "z"), kinds=("x", "y"))),
        (("--kinds", "x", "--kinds", "y, z"), Asked(kinds=("x", "y", "z"))),
        (("--fast", "--loud", "--extra", "2"), Asked(fast=True, loud=True)),
        (("--no-loud",), Asked()),
    ],
)
def test_a_command_receives_its_request(arguments: Sequence[str], asked: Asked) -> None:
    assert ran(*arguments) == ([asked], "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--count", "5", "--count=7"), "--count is given 2 times; the last one counts\n"),
        (("--loud", "--no-loud", "--count", "7"), "--loud is given 2 times; the last one counts\n"),
        (("--name", "--count", "--name", "--count", "--count", "7"), ""),
    ],
)
def test_options_that_do_not_count_are_named(arguments: Sequence[str], said: str) -> None:
    """One that takes several values, and the value of another option, are no repetition."""
    received, text = ran(*arguments)
    assert text == said and received[0].count == 7


def test_the_help_is_the_documentation_of_the_fields() -> None:
    _, text = ran("--help")
    for part in ("Does something.", "Files to read.", "How many, and this line goes on.", "default: 3", "--no-loud"):
        assert part in text
    assert "--no-fast" not in text
    assert "--line" not in text


@pytest.mark.parametrize("arguments", [("--line", "x"), ("--no-fast",), ("--count", "many")])
def test_what_no_field_allows_is_refused(arguments: Sequence[str]) -> None:
    received, text = ran(*arguments)
    assert not received
    assert arguments[0] in text


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request_: request_.__name__)
def test_every_field_of_a_request_is_documented(request_: type) -> None:
    assert documentation_of(request_).keys() == {field.name for field in fields(request_)}
