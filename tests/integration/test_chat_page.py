"""The chat page in a real browser, against a server whose answers the test decides."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from llm_parallel.serve.page import page, page_headers
from tests.support.chat_server import Answer, ChatServer, serving

NAMES = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.processes,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH (Debian: apt-get install chromium)"),
]
PLAIN = "One **two** three."


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser (.[dev])")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


def until(tab: Any, expression: str) -> None:
    """Waits until an expression is true. playwright's own way evaluates it in the page, which the policy refuses."""
    end = time.monotonic() + 20
    while not tab.evaluate(expression):
        assert time.monotonic() < end, expression
        tab.wait_for_timeout(20)


class Visit:
    """The page in a fresh browser profile. complaints: what the console says."""

    def __init__(self, browser: Any, server: ChatServer, **settings: Any) -> None:
        self.server = server
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, **settings})
        self.complaints: list[str] = []
        self.tab = self.open()

    def open(self) -> Any:
        tab = self.context.new_page()
        tab.set_default_timeout(20_000)
        tab.on("console", lambda message: self.complaints.append(message.text))
        tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        tab.goto(self.server.address)
        until(tab, "document.querySelectorAll('#model option').length > 0 || !notice.hidden")
        return tab

    def send(self, text: str, wait: bool = True) -> None:
        self.tab.fill("#message", text)
        self.tab.press("#message", "Enter")
        if wait:
            self.settle()

    def settle(self) -> None:
        """Waits until no answer is being written."""
        self.tab.wait_for_selector("#send:visible")

    def said(self) -> list[str]:
        return self.tab.locator("#messages .text").all_inner_texts()


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    opened: list[Any] = []

    def make(answer: Answer, key: str | None = None, **settings: Any) -> Visit:
        running = serving(ChatServer(answer, page=(page(), page_headers()), key=key))
        server = running.__enter__()
        made = Visit(browser, server, **settings)
        opened.append((running, made))
        return made

    yield make
    for running, made in opened:
        made.context.close()
        running.__exit__(None, None, None)


def test_a_conversation_streams_and_outlives_the_tab(visit: Any) -> None:
    """Pieces are shown as they come; what was said is sent again with the next message, and is there after a reload."""
    go_on = threading.Event()

    def answer(body: dict[str, Any]) -> Iterator[str]:
        yield "Begin "
        assert go_on.wait(20)
        yield "and end."

    one = visit(answer)
    one.send("Question 1", wait=False)
    until(one.tab, "document.querySelector('article.busy .text')?.innerText.trim() === 'Begin'")
    assert one.tab.locator("article.busy").get_attribute("aria-busy") == "true"
    go_on.set()
    one.settle()
    one.send("Question 2")
    assert one.said() == ["Question 1", "Begin and end.", "Question 2", "Begin and end."]
    contents = [message["content"] for message in one.server.asked[1]["messages"]]
    assert contents == ["Question 1", "Begin and end.", "Question 2"] and one.server.asked[1]["stream"] is True
    assert "2 tokens" in one.tab.inner_text("article:last-child .about")
    again = one.open()
    again.click("#conversations .title")
    assert again.locator("#messages .text").all_inner_texts() == one.said()
    again.on("dialog", lambda dialog: dialog.accept())
    again.hover("#conversations li")
    again.click("#conversations .delete")
    assert again.locator("#conversations li").count() == 0
    assert one.complaints == []


def test_stop_frees_the_server_and_keeps_what_came(visit: Any) -> None:
    def answer(body: dict[str, Any]) -> Iterator[str]:
        while True:
            yield "on and "

    one = visit(answer)
    one.send("Go on", wait=False)
    until(one.tab, "document.querySelector('article.busy .text')?.innerText.length > 20")
    one.tab.press("#message", "Escape")
    one.settle()
    assert one.server.gone.wait(20), "the server writes to a connection that is closed"
    assert one.said()[1].startswith("on and") and "Stopped." in one.tab.inner_text("#messages .note")


def test_regenerate_and_edit_replace_what_follows(visit: Any) -> None:
    """Another seed for the same question; an edited question drops what came after it."""
    one = visit(lambda body: f"{body['messages'][-1]['content']} {body.get('seed')} {len(body['messages'])}")
    one.tab.click("#open")
    one.tab.fill("#system", "Be brief.")
    for name, value in {"temperature": "0.5", "top_p": "0.9", "max_tokens": "77", "seed": "3"}.items():
        one.tab.fill(f"#{name}", value)
    one.tab.click("#done")
    one.tab.select_option("#model", "second-model")
    one.send("A")
    one.send("B")
    one.tab.click("text=Regenerate")
    one.settle()
    assert one.said() == ["Be brief.", "A", "A 3 2", "B", "B 4 4"]
    asked = one.server.asked[-1]
    assert {name: asked[name] for name in ("model", "temperature", "top_p", "max_tokens", "seed")} == {
        "model": "second-model",
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 77,
        "seed": 4,
    }
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."}
    one.tab.locator("article.user").first.locator("text=Edit").click()
    assert "Replaces the 3 messages below." in one.tab.inner_text("#messages")
    one.tab.fill(".edit", "C")
    one.tab.press(".edit", "Enter")
    one.settle()
    assert one.said() == ["Be brief.", "C", "C 3 2"]
    one.tab.press("#message", "ArrowUp")
    assert one.tab.input_value(".edit") == "C"


def test_text_of_a_model_is_never_html(visit: Any) -> None:
    """Tags, handlers and addresses that run scripts stay text; only web and mail addresses become links."""
    lines = [
        "<img src=x onerror=alert(1)> <script>alert(1)</script>",
        "[a](javascript:alert(1)) [b](data:text/html,x) [c](https://example.org/?a=b&c) ![d](https://example.org/e.png)",
        "`<b>` **<i>bold</i>** <https://example.org/f>",
        "```html\n<svg onload=alert(1)>\n```",
    ]
    one = visit(lambda body: "\n\n".join(lines))
    one.send("Try")
    addresses = one.tab.eval_on_selector_all(".markdown a", "all => all.map(a => [a.href, a.rel])")
    assert [address for address, _ in addresses] == [
        *("https://example.org/?a=b&c", "https://example.org/e.png", "https://example.org/f"),
    ]
    assert all("noopener" in rel for _, rel in addresses)
    assert one.tab.locator(".markdown :is(img, script, b, i, svg)").count() == 0
    text = one.tab.inner_text(".markdown")
    assert lines[0] in text and "[a](javascript:alert(1))" in text and "<svg onload=alert(1)>" in text
    assert one.tab.inner_text(".markdown strong") == "<i>bold</i>"
    assert one.complaints == []


def test_what_the_policy_refuses(visit: Any) -> None:
    """A script that got into the page does not run, and no text becomes HTML."""
    one = visit(lambda body: PLAIN)
    one.tab.evaluate("() => { const s = document.createElement('script'); document.body.append(s); window.seen = 1; }")
    refused = one.tab.evaluate(
        """async () => {
          const tried = {};
          try { document.body.innerHTML = "<p>x</p>"; tried.html = false } catch { tried.html = true }
          try { await fetch("https://example.org/"); tried.fetch = false } catch { tried.fetch = true }
          return tried;
        }"""
    )
    assert refused == {"html": True, "fetch": True}
    assert any("Content Security Policy" in complaint for complaint in one.complaints)


MARKDOWN = {
    "# A\n## B `c`": "h1 h2 code",
    "- a\n- b\n  1. c\n  2. d\n\n  e\n- f": "ul li li ol li li p li",
    "3. a\n\n4. b": "ol li li",
    "> a\n> > b": "blockquote p blockquote p",
    "a | b\n--|:-:\n`c|d` | e": "div table thead tr th th tbody tr td td",
    "~~a~~ __b__ _c_ snake_case_name 2*3*4 ***d***": "p del strong em em strong em",
    "a\nb": "p br",
    "```\nx\n\n# y": "div div span button pre code",
    "**open *and _more": "p",
    "---\n***": "hr hr",
}


def test_markdown_becomes_elements(visit: Any) -> None:
    """The elements of each text, in order; also of a text that ends in the middle of a mark."""
    texts = iter(MARKDOWN)
    one = visit(lambda body: next(texts))
    for text, expected in MARKDOWN.items():
        one.send("?")
        found = one.tab.eval_on_selector_all(
            "article:last-child .markdown *", "all => all.map(e => e.tagName.toLowerCase()).join(' ')"
        )
        assert found == expected, text


def test_no_text_makes_the_page_hang(visit: Any) -> None:
    bad = [
        "*" * 20000,
        "[" * 20000,
        "`a" * 10000,
        "> " * 5000,
        "- " * 5000,
        "**a " * 8000,
        "|" * 20000 + "\n" + "-|" * 9000,
    ]
    texts = iter(bad)
    one = visit(lambda body: next(texts))
    one.tab.set_default_timeout(10_000)
    for _ in bad:
        one.tab.click("#new")
        one.send("?")
    assert one.complaints == []


def test_the_key_stays_in_the_tab(visit: Any) -> None:
    """A server that wants a key makes the page ask for it; it is sent, and not kept beyond the tab."""
    one = visit(lambda body: PLAIN, key="secret-1")
    one.tab.wait_for_selector("#settings[open]")
    assert "API key" in one.tab.inner_text("#notice")
    one.tab.fill("#key", "secret-1")
    one.tab.press("#key", "Enter")
    until(one.tab, "document.querySelectorAll('#model option').length === 2")
    assert one.tab.is_hidden("#notice")
    one.send("Hello")
    assert one.said() == ["Hello", "One two three."] and one.server.keys[-1] == "Bearer secret-1"
    stored = one.tab.evaluate("() => JSON.stringify([{...localStorage}, {...sessionStorage}])")
    here, tab = json.loads(stored)
    assert "secret-1" in str(tab) and "secret-1" not in str(here)


def test_errors_are_sentences(visit: Any) -> None:
    """A refused request, one that is too long (its oldest turn is left out), and a server that is gone."""
    too_long = {"message": "This model's context length is 64 tokens.", "code": "context_length_exceeded"}

    def answer(body: dict[str, Any]) -> Any:
        if body["messages"][-1]["content"] == "bad":
            return 400, {"error": {"message": "temperature is 9; it must be at most 2"}}
        return (400, {"error": too_long}) if len(body["messages"]) > 2 else PLAIN

    one = visit(answer)
    one.send("bad")
    assert one.tab.inner_text(".note.wrong") == "temperature is 9; it must be at most 2"
    one.send("good")
    assert one.said()[-1] == "One two three."
    one.send("more")
    assert "The first 4 messages do not fit and were left out." in one.tab.inner_text("article:last-child .note")
    assert [len(body["messages"]) for body in one.server.asked[-3:]] == [4, 3, 1]


@pytest.mark.parametrize("width", [390, 1280])
def test_every_width_and_colour(visit: Any, width: int) -> None:
    """Nothing is wider than the window; colours follow the system until the switch says otherwise."""
    wide = "| " + " | ".join(["column"] * 20) + " |\n" + "|-" * 20 + "|\n\n```\n" + "x" * 300 + "\n```\n\n" + "y" * 300
    one = visit(lambda body: wide, viewport={"width": width, "height": 844}, color_scheme="dark")
    one.send("z" * 300)
    measured = one.tab.evaluate("() => [document.documentElement.scrollWidth, log.scrollWidth - log.clientWidth]")
    assert measured == [width, 0]
    colour = "() => getComputedStyle(document.body).backgroundColor"
    dark = one.tab.evaluate(colour)
    one.tab.click("#theme")
    light = one.tab.evaluate(colour)
    assert (dark, light) == ("rgb(21, 24, 29)", "rgb(255, 255, 255)")
    one.tab.reload()
    assert one.tab.evaluate(colour) == light
    if width == 390:
        assert not one.tab.is_visible("#new")
        one.tab.click("#show")
    one.tab.click("#new")
    assert one.tab.evaluate("() => document.activeElement.id") == "message"


def test_copy_and_files(visit: Any, tmp_path: Any) -> None:
    """Code is copied as it was written, tabs too; a saved conversation is loaded again."""
    one = visit(lambda body: "```make\nall:\n\techo hello\n```")
    one.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=one.server.address)
    one.send("A makefile")
    one.tab.click(".code button")
    assert one.tab.evaluate("() => navigator.clipboard.readText()") == "all:\n\techo hello"
    one.tab.click("#open")
    with one.tab.expect_download() as download:
        one.tab.click("#export")
    saved = tmp_path / "conversation.json"
    download.value.save_as(saved)
    messages = json.loads(saved.read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    saved.write_text(json.dumps([{"role": "system", "content": "S"}, *messages]))
    one.tab.set_input_files("#file", saved)
    one.tab.wait_for_selector("article.system")
    assert one.said()[:2] == ["S", "A makefile"]
    saved.write_text('[{"role": "user"}]')
    one.tab.set_input_files("#file", saved)
    one.tab.wait_for_selector("#notice:visible")
