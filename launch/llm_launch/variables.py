"""Numbers in environment variables that SLURM, torchrun or our launcher set, and that users can set too."""

from __future__ import annotations

from collections.abc import Mapping

from llm_parallel.errors import UserError


def number_in(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    """The whole number in a variable; ``default`` where it is not set or empty. Raises UserError if it holds something
    else, or is not set and has no default."""
    text = environment.get(name, "").strip()
    if not text and default is not None:
        return default
    if not (text.isascii() and text.isdecimal()):
        given = environment.get(name)
        raise UserError(f"environment variable {name} = {given!r} must be a whole number; start through one launcher")
    return int(text)
