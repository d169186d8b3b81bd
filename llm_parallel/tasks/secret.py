"""The one place where a judge takes an API key from the environment. A run file names the variable and never holds the
key: run files are copied into run folders, checkpoints and reports."""

from __future__ import annotations

import os

from llm_parallel.errors import UserError
from llm_parallel.remote import key_of


def api_key(variable: str, field: str) -> str:
    """The key in an environment variable, which ``field`` names. Raises UserError if there is none."""
    key = key_of(os.environ, variable)
    if key is None:
        raise UserError(f"{field} = {variable} names an environment variable that is not set; set it to the API key")
    return key
