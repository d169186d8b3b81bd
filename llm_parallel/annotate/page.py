"""The page for annotators, with the colours of the chat page; it loads nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from llm_parallel.serve.page import COLOURS, page_headers, put_together

_FOLDER = Path(__file__).parent


@cache
def annotation_page() -> tuple[str, Mapping[str, str]]:
    """The page as HTML, and its headers."""
    text = put_together(_FOLDER / "page.html", (COLOURS, "page.css"), ("page.js", "page_judging.js"))
    return text, page_headers(text)
