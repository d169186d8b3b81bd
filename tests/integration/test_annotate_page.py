"""The page for annotators in a real browser: several at once, by keyboard, through reloads and a server that is killed;
nothing is lost."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_parallel.annotate.board import BoardOptions
from tests.support.annotating import annotating, judged, write_answers
from tests.support.commands import environment

NAMES = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.processes,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH (Debian: apt-get install chromium)"),
]


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
        assert time.monotonic() < end, (expression, tab.inner_text("body"))
        tab.wait_for_timeout(10)


class Person:
    """An annotator in a browser profile of their own. complaints: what the console says."""

    def __init__(self, browser: Any, address: str, name: str, **settings: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, **settings})
        self.complaints: list[str] = []
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(20_000)
        self.tab.on("console", lambda message: self.complaints.append(message.text))
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.goto(address)
        self.tab.wait_for_selector("#name[open]")
        self.tab.fill("#annotator", name)
        self.tab.press("#annotator", "Enter")
        self.settle()

    def settle(self) -> None:
        """Waits until an item or the end is shown and no request is under way."""
        shown = "document.querySelector('#answers .answer') || document.querySelector('#end p')"
        until(self.tab, f"main.getAttribute('aria-busy') === 'false' && Boolean({shown})")

    def reload(self) -> None:
        self.tab.reload()
        self.settle()

    def press(self, *keys: str) -> None:
        for key in keys:
            self.tab.keyboard.press(key)
            self.settle()

    @property
    def question(self) -> str:
        """The prompt that is shown; nothing at the end."""
        return "" if self.tab.is_hidden("#prompt") else self.tab.inner_text("#prompt .text")

    @property
    def answers(self) -> list[str]:
        return self.tab.locator(".answer .text").all_inner_texts()

    def choose(self, wanted: str) -> None:
        """Presses the number of the answer that ends so."""
        place = next(number for number, text in enumerate(self.answers, 1) if text.endswith(wanted))
        self.press(str(place))


@pytest.fixture
def person(browser: Any) -> Iterator[Callable[..., Person]]:
    people: list[Person] = []

    def come(address: str, name: str, **settings: Any) -> Person:
        people.append(Person(browser, address, name, **settings))
        return people[-1]

    yield come
    for one in people:
        one.context.close()


def test_two_annotators_at_once_lose_nothing(person: Callable[..., Person], tmp_path: Path) -> None:
    """They never look at the same item; reloads in the middle show the same one in the same order; every item is judged
    once, and what each chose is what is recorded."""
    path, out = write_answers(tmp_path / "a.jsonl", 8), tmp_path / "o.jsonl"
    with annotating(path, out, BoardOptions("best")) as (address, _):
        ann, bob = person(address, "Ann"), person(address, "Bob")
        seen = []
        while ann.question or bob.question:
            assert ann.question != bob.question
            for one in (ann, bob):
                if one.question:
                    before = one.question, one.answers
                    one.reload()
                    assert (one.question, one.answers) == before
                    seen.append(before[0])
                    one.choose(".1")
        assert sorted(seen) == [f"Question {number}?" for number in range(8)]
        assert "Done" in ann.tab.inner_text("#end") and ann.complaints == bob.complaints == []
    records = judged(out)
    assert len(records) == 8 and Counter(record["annotator"] for record in records) == {"Ann": 4, "Bob": 4}
    assert all(record["ranks"] == [2, 1, 2] for record in records), "the order of the record, not of the page"
    assert len({tuple(record["shown"]) for record in records}) > 1, "answers stand in another order each time"


def test_overlap_and_agreement(person: Callable[..., Person], tmp_path: Path) -> None:
    path, out = write_answers(tmp_path / "a.jsonl", 4), tmp_path / "o.jsonl"
    with annotating(path, out, BoardOptions("best", overlap=2)) as (address, _):
        ann, bob = person(address, "Ann"), person(address, "Bob")
        for place in (0, 1, 0, 1):
            ann.choose(f".{place}")
        for place in (0, 1, 0, 2):
            bob.choose(f".{place}")
        bob.tab.click("#agree")
        bob.tab.wait_for_selector("#agreement[open]")
        table = re.sub(r"\s+", " ", bob.tab.inner_text("#found"))
    assert "judged by two or more 4" in table and "the same 75.0 %" in table
    # Values 0 four times, 1 three times, 2 once: 1 - 7 * 2 / (64 - 16 - 9 - 1), and (0.75 - 6 / 16) / (1 - 6 / 16).
    assert "alpha 0.63" in table and "Ann and Bob, over 4 0.60" in table


def test_the_keyboard_in_every_mode(person: Callable[..., Person], tmp_path: Path) -> None:
    path = write_answers(tmp_path / "a.jsonl", 6)

    def done(mode: str, keys: list[str]) -> list[dict[str, Any]]:
        out = tmp_path / f"{mode}.jsonl"
        with annotating(path, out, BoardOptions(mode)) as (address, _):
            one = person(address, "Ann")
            one.press(*keys)
            assert one.complaints == []
        return judged(out)

    def shown(record: dict[str, Any]) -> list[int]:
        """Ranks in the order in which the answers were shown."""
        return [record["ranks"][record["answers"].index(place)] for place in record["shown"]]

    best = done("best", ["2", "ArrowRight", "ArrowRight", "ArrowRight", "Enter", "0", "s", "u", "u", "3", "x", "9"])
    assert [record["event"] for record in best] == ["judged"] * 3 + ["skipped", "undone", "undone", "judged"]
    assert [shown(record) for record in (*best[:3], best[-1])] == [[2, 1, 2], [2, 2, 1], [1, 1, 1], [2, 2, 1]]
    assert best[-1]["task"] == best[2]["task"] and best[-1]["task"] != best[3]["task"]

    ranking = done("ranking", ["3", "1", "Enter", "Backspace", "2", "1", "Enter", "2", "=", "1", "3", "Enter", "0"])
    assert [shown(record) for record in ranking] == [[3, 2, 1], [1, 1, 2], [1, 1, 1]]

    pair = done("pair", ["ArrowLeft", "ArrowRight", "ArrowDown", "1", "2", "0"])
    assert [shown(record) for record in pair] == [[1, 2], [2, 1], [1, 1]] * 2

    good = done("good-bad", ["g", "b", "ArrowRight", "ArrowLeft", "1", "2", "s"])
    assert [record.get("ranks") for record in good] == [[1], [2]] * 3 + [None]


def start(path: Path, *options: str) -> tuple[subprocess.Popen[str], str]:
    """The real command, and the address that it prints."""
    command = [sys.executable, "-m", "llm_parallel.cli", "annotate", str(path), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(None))
    assert process.stdout is not None
    address = next(line.split()[1] for line in process.stdout if line.startswith("open "))
    return process, address


def test_a_server_that_is_killed_loses_nothing(person: Callable[..., Person], tmp_path: Path) -> None:
    """Killed after two judgements. What is judged while it is gone is kept by the page and sent when the page is loaded
    again; then the server is asked to end, and the files for training are there."""
    path = write_answers(tmp_path / "a.jsonl", 4)
    process, address = start(path, "--port", "0")
    try:
        ann = person(address, "Ann")
        ann.press("1", "s")
        process.send_signal(signal.SIGKILL)
        process.wait(20)
        question = ann.question
        ann.press("1")
        assert ann.question == question and "cannot be reached" in ann.tab.inner_text("#notice")
        process, again = start(path, "--port", address.rstrip("/").rpartition(":")[2])
        assert again == address
        ann.reload()
        assert ann.question != question, "the judgement that waited in the page has arrived"
        ann.press("1")
        assert "Judge the 1 skipped" in ann.tab.inner_text("#end")
        ann.tab.click("#again")
        ann.settle()
        ann.press("1")
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=300)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0 and "4 prompts of 4 judged, 0 tasks skipped" in said, said
    records = judged(tmp_path / "a.annotations.jsonl")
    assert Counter(record["event"] for record in records) == {"judged": 4, "skipped": 1}
    assert len({record["task"] for record in records}) == 4
    for kind in ("dpo", "kto", "rrhf", "sft"):
        assert (tmp_path / f"a.annotations.{kind}.jsonl").is_file()


def test_text_of_a_model_is_never_html(person: Callable[..., Person], tmp_path: Path) -> None:
    bad = "<img src=x onerror=alert(1)> <script>alert(1)</script>\n[a](javascript:alert(1)) <b>bold</b>"
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": bad, "responses": [bad, "</div>" + bad]}))
    with annotating(path, tmp_path / "o.jsonl", BoardOptions("best")) as (address, _):
        ann = person(address, "<i>Ann</i>")
        assert ann.question == bad and set(ann.answers) == {bad, "</div>" + bad}
        assert ann.tab.locator("main :is(img, script, b, a, i), header i").count() == 0
        refused = ann.tab.evaluate(
            "() => { try { document.body.innerHTML = '<p>x</p>'; return false } catch { return true } }"
        )
        assert refused and any("Content Security Policy" in text or "TrustedHTML" in text for text in ann.complaints)


def test_the_token_is_needed_and_leaves_the_address(
    person: Callable[..., Person], browser: Any, tmp_path: Path
) -> None:
    path = write_answers(tmp_path / "a.jsonl", 2)
    with annotating(path, tmp_path / "o.jsonl", BoardOptions("best"), token="secret") as (address, _):
        ann = person(f"{address}#token=secret", "Ann")
        assert ann.question and ann.tab.evaluate("location.href") == address
        ann.reload()
        assert ann.question
        stranger = browser.new_context().new_page()
        stranger.goto(address)
        stranger.fill("#annotator", "Eve")
        stranger.press("#annotator", "Enter")
        stranger.wait_for_selector("#notice:visible")
        assert "with its token" in stranger.inner_text("#notice") and stranger.locator(".answer").count() == 0
        stranger.context.close()


@pytest.mark.parametrize("mode", ["best", "ranking", "pair", "good-bad"])
@pytest.mark.parametrize("width", [390, 1280])
def test_every_width_and_colour(person: Callable[..., Person], width: int, mode: str, tmp_path: Path) -> None:
    """Nothing is wider than the window; colours follow the system until the switch says otherwise."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "z" * 300, "responses": ["x" * 400, "y y " * 400, "```\n" + "w" * 300]}))
    settings = {"viewport": {"width": width, "height": 844}, "color_scheme": "dark"}
    with annotating(path, tmp_path / "o.jsonl", BoardOptions(mode)) as (address, _):
        ann = person(address, "A" * 60, **settings)
        assert ann.tab.evaluate("document.documentElement.scrollWidth") == width
        colour = "() => getComputedStyle(document.body).backgroundColor"
        dark = ann.tab.evaluate(colour)
        ann.tab.click("#theme")
        light = ann.tab.evaluate(colour)
        assert (dark, light) == ("rgb(21, 24, 29)", "rgb(255, 255, 255)")
        ann.reload()
        assert ann.tab.evaluate(colour) == light
        if mode == "best":  # by hand, as on a telephone
            ann.tab.locator(".answer").nth(1).click()
            ann.settle()
            assert "Done" in ann.tab.inner_text("#end")
            ann.tab.click("#undo")
            ann.settle()
            assert ann.question
