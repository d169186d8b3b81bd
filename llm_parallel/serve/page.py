"""The chat page that the server sends at its root: one document, put together from the files beside this one.

The page loads nothing else, and its policy lets it connect to nothing but the server that it came from.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).parent
_PARTS = {"@STYLE@": ("page.css",), "@SCRIPT@": ("page_markdown.js", "page.js", "page_controls.js")}


@cache
def page() -> str:
    """The page as HTML, with its style and its script in it."""
    text = _read("page.html")
    for place, names in _PARTS.items():
        text = text.replace(place, "\n" + "".join(map(_read, names)))
    return text


@cache
def content_security_policy() -> str:
    """The policy under which the page must be sent: the style and the script in it run, named by their hashes, and no
    others; requests go to its own server only; no frame holds it; no script makes HTML of text."""
    style, script = (_hash_of(page(), tag) for tag in ("style", "script"))
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


def page_headers() -> dict[str, str]:
    """All headers that belong to the page."""
    return {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": content_security_policy(),
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _hash_of(text: str, tag: str) -> str:
    """What a policy calls the one element ``tag`` of a page."""
    found = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", text, re.DOTALL)
    assert len(found) == 1, f"the page has {len(found)} elements {tag}"
    digest = hashlib.sha256(found[0].encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
