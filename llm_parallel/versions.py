"""Refuses, when a command starts, versions of other packages that are known not to work."""

from __future__ import annotations

import re
from importlib import metadata

from llm_parallel.errors import UserError

Version = tuple[int, ...]

SUPPORTED: dict[str, tuple[Version, Version | None, str]] = {
    "megatron-core": ((0, 16, 1), (0, 20), "megatron-core>=0.16.1,<0.20"),
    "torch": ((2, 8), None, "torch>=2.8"),
    "numpy": ((1, 26), None, "numpy>=1.26"),
}
"""For each package: the oldest version that works, the first newer version that does not (None if none is known), and
the requirement for pip."""


def parse(version: str) -> Version:
    """The numbers of a version as a tuple; a suffix after them (a build, a release candidate) is left out."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in numbers[0].split(".")) if numbers else ()


def refuse_unsupported() -> None:
    """Raises UserError for the first package whose installed version is known not to work. Imports nothing, and ignores
    packages that are not installed: whatever needs them reports that."""
    for package, (oldest, first_too_new, requirement) in SUPPORTED.items():
        try:
            installed = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        number = parse(installed)
        if number < oldest or (first_too_new is not None and number >= first_too_new):
            raise UserError(
                f"{package} {installed} is installed, which LLM Parallel does not work with; "
                f"pip install '{requirement}'"
            )
