"""``llm-parallel schema``."""

from __future__ import annotations

import json

import typer

from llm_parallel.config.schema import SCHEMA_NAME, config_schema
from llm_parallel.screen import say_next


def schema_command() -> None:
    """Prints the JSON schema of run files."""
    typer.echo(json.dumps(config_schema(), indent=1, ensure_ascii=False))
    say_next(f"llm-parallel schema > {SCHEMA_NAME}; a run file beside it begins with # yaml-language-server: "
             f"$schema={SCHEMA_NAME}")  # fmt: skip
