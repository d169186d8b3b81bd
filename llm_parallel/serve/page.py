"""The chat page that the server sends at its root: one document, put together from the files beside this one; and how
any such page is put together and sent.

A page loads nothing else, and its policy lets it connect to nothing but the server that it came from.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).parent
COLOURS = _FOLDER / "page_colours.css"
"""Colours and shapes that all pages of ours share."""
_STYLE, _SCRIPT = (COLOURS, "page.css"), ("page_markdown.js", "page.js", "page_controls.js")


@cache
def page() -> str:
    """The page as HTML, with its style and its script in it."""
    return put_together(_FOLDER / "page.html", _STYLE, _SCRIPT)


def put_together(html: Path, style: Sequence[str | Path], script: Sequence[str | Path]) -> str:
    """A page with the files of its style and script, which lie beside it or have a path, in their places."""
    text = html.read_text(encoding="utf-8")
    for place, names in {"@STYLE@": style, "@SCRIPT@": script}.items():
        parts = [(html.parent / name).read_text(encoding="utf-8") for name in names]
        text = text.replace(place, "\n" + "".join(parts))
    return text


def content_security_policy(text: str | None = None) -> str:
    """The policy under which a page, by default the chat page, must be sent: the style and the script in it run, named
    by their hashes, and no others; requests go to its own server only; no frame holds it; no script makes HTML of
    text."""
    style, script = (_hash_of(page() if text is None else text, tag) for tag in ("style", "script"))
    rules = {
        "default-src": "'none'",
        "script-src": script,
        "style-src": style,
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return "; ".join(f"{rule} {value}" for rule, value in rules.items())


def page_headers(text: str | None = None) -> Mapping[str, str]:
    """All headers that belong to a page, by default the chat page."""
    return {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": content_security_policy(text),
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def _hash_of(text: str, tag: str) -> str:
    """What a policy calls the one element ``tag`` of a page."""
    found = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", text, re.DOTALL)
    assert len(found) == 1, f"the page has {len(found)} elements {tag}"
    digest = hashlib.sha256(found[0].encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
