"""What a result of a benchmark was measured on: command, commit, chip, load and versions, in every file of results."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOAD = os.getloadavg()[0]
"""Load average of the minute before this process began; its own work is not in it."""


def measured_on(*packages: str) -> dict[str, Any]:
    """The head of a file of results. packages: further ones whose versions count."""
    from llm_parallel.bench.environment import environment  # torch is not loaded before it is needed

    found = environment()
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found["versions"][name] = version(name)
    return {"command": command(sys.argv), **found, "load_average_1_min": round(LOAD, 2)}


def sentence(*packages: str) -> str:
    """The same for a table: one line."""
    found = measured_on(*packages)
    versions = {name: found["versions"][name] for name in ("torch", *packages) if name in found["versions"]}
    named = ", ".join(f"{name} {number}" for name, number in versions.items())
    load = f"load {found['load_average_1_min']:.1f} before it began"
    return (
        f"Command: `{found['command']}`; {found['cores']} cores of {found['chip']}, {load}; Python {found['python']}, "
        f"{named}; commit {found['commit']}; {found['date']}."
    )


def command(words: Sequence[str]) -> str:
    """A command line without this machine's folders: of paths outside the repository only the last name is given."""
    return shlex.join(["python", *map(_shown, words)])


def _shown(word: str) -> str:
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    path = Path(value)
    if path.is_absolute():
        value = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
    return f"{option}{equals}{value}"
