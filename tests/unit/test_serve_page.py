"""The chat page as a text: it is whole, loads nothing, and its policy names its own style and script."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

from llm_parallel.serve.page import content_security_policy, page, page_headers


class _Elements(HTMLParser):
    """Start tags with their attributes, and the text of style and script."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside in ("style", "script"):
            self.texts[self._inside] = self.texts.get(self._inside, "") + data

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


def elements() -> _Elements:
    found = _Elements()
    found.feed(page())
    return found


def test_the_policy_allows_the_pages_own_style_and_script_only() -> None:
    """The hashes are those of what an HTML parser finds; nothing else may be loaded, framed or connected to."""
    rules = dict(rule.split(" ", 1) for rule in content_security_policy().split("; "))
    for tag in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(elements().texts[tag].encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
    assert rules["default-src"] == rules["frame-ancestors"] == rules["base-uri"] == "'none'"
    assert rules["connect-src"] == "'self'" and "unsafe" not in content_security_policy()
    assert page_headers()["Content-Security-Policy"] == content_security_policy()


def test_the_page_loads_nothing_and_makes_no_html_of_text() -> None:
    found = elements()
    for tag, attributes in found.tags:
        assert not attributes.get("src") and not any(name.startswith("on") or name == "style" for name in attributes)
        assert tag != "link" or attributes["href"] == "data:,"
    script = found.texts["script"]
    forbidden = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser|srcdoc|import\("
    )
    assert not re.search(forbidden, script)
    assert "url(" not in found.texts["style"] and "@import" not in found.texts["style"]


def test_every_field_and_button_has_a_name() -> None:
    """What a screen reader says: text, a label, or aria-label."""
    text = page()
    labelled = set(re.findall(r'<label[^>]* for="([^"]+)"', text))
    for label in re.findall(r"<label.*?</label>", text, re.DOTALL):
        labelled |= set(re.findall(r'<(?:input|select|textarea)[^>]* id="([^"]+)"', label))
    for tag, attributes in elements().tags:
        if tag in ("input", "select", "textarea"):
            assert attributes["id"] in labelled or attributes.get("aria-label"), attributes
        if tag == "button" and "icon" in (attributes.get("class") or ""):
            assert attributes.get("aria-label"), attributes
