"""``llm-parallel fields``: every field of the configuration with its type, default and meaning."""

from __future__ import annotations

from llm_parallel.config.differences import in_words
from llm_parallel.config.fields import describe_fields
from llm_parallel.errors import UserError
from llm_parallel.lines import say
from llm_parallel.screen import say_next


def show_fields(section: str) -> None:
    """Prints the fields whose names begin with ``section``. Raises UserError if there are none."""
    found = [doc for doc in describe_fields() if doc.name.startswith(section)]
    if not found:
        sections = sorted({doc.name.split(".")[0] for doc in describe_fields() if "." in doc.name})
        raise UserError(f"no field begins with {section!r}; the sections are {', '.join(sections)}")
    for doc in found:
        default = (
            "" if doc.is_section else ", must be given" if doc.default is ... else f"; default {in_words(doc.default)}"
        )
        say(f"{doc.name}: {doc.type}{default}\n    {doc.doc.replace('``', '`')}")
    named = next((doc for doc in found if not doc.is_section and doc.default is not ...), None)
    if named is not None:
        say_next(f"llm-parallel pretrain RUN.yaml {named.name}={in_words(named.default)} --dry-run")
