"""The JSON schema of a run file, by which editors complete and check it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from llm_parallel.config.tree import RunConfig
from llm_parallel.files import atomic_write

SCHEMA_NAME = "schema.json"
SCHEMA_LINE = f"# yaml-language-server: $schema={SCHEMA_NAME}\n"
"""First line of a run file that lies beside the schema: VS Code's, Neovim's and JetBrains' YAML plug-ins read it."""
SCHEMA_HINT = f"llm-parallel schema > {SCHEMA_NAME}; a run file beside it begins with {SCHEMA_LINE.rstrip()}"


def schema_text() -> str:
    """The schema as JSON."""
    return json.dumps(config_schema(), indent=1, ensure_ascii=False)


def config_schema() -> dict[str, Any]:
    """JSON schema of a run file, with every field's docstring. Names of other systems, which ``load_config`` reads too,
    are not in it."""
    schema = RunConfig.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "Run file of llm-parallel"
    for section, name in itertools.product(("DataConfig", "ChatConfig"), ("train", "eval")):
        # A source may be given as its path alone, and one source without a list.
        sources = schema["$defs"][section]["properties"][name]
        sources["items"] = {"anyOf": [sources["items"], {"type": "string"}]}
        kept = {key: sources.pop(key) for key in ("type", "items")}
        sources["anyOf"] = [kept, {"type": "string"}]
    return schema


def write_schema(folder: Path) -> None:
    """Writes the schema into ``folder``, where files with ``SCHEMA_LINE`` find it."""
    with atomic_write(folder / SCHEMA_NAME) as handle:
        json.dump(config_schema(), handle, indent=1, ensure_ascii=False)
