"""Runs the command line in this process: a separate interpreter costs seconds and proves nothing more."""

from __future__ import annotations

import signal

from typer.testing import CliRunner

from llm_launch.supervise import StopRequests
from llm_parallel.errors import UserError


def refusal(*arguments: object) -> str:
    """The one sentence with which ``llm-parallel`` refuses; ``main`` makes it status 2."""
    from llm_parallel.cli import app

    handlers = {number: signal.getsignal(number) for number in StopRequests.NUMBERS}
    try:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert isinstance(result.exception, UserError), (result.output, result.exception)
    text = str(result.exception)
    assert "\n" not in text
    return text
