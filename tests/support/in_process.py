"""The command in the test's own process, where a process of its own (seconds of imports) would show nothing more.

For each exit status at least one test runs the real process (``llm_parallel`` of the integration tests), which shows
that the status and the streams arrive.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

from llm_parallel import cli
from tests.support.commands import environment


def in_process(*arguments: str | Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs ``llm-parallel`` with these arguments through its own ``main``: exit status, and what it wrote to
    ``sys.stdout`` and ``sys.stderr``."""
    argv = ["llm-parallel", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    status: object = 0
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.dict(os.environ, environment(env), clear=True),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as ended:
            status = 0 if ended.code is None else ended.code
    assert isinstance(status, int), status
    return subprocess.CompletedProcess(argv, status, out.getvalue(), err.getvalue())
