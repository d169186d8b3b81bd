"""Where answers are shown: as plain text, or as Markdown on a terminal, drawn while it comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.theme import Theme

from llm_parallel.chat.blocks import Blocks
from llm_parallel.lines import say
from llm_parallel.printable import Pieces, printable

DRAW_EVERY_S = 0.06
THEME = Theme({"markdown.code": "cyan", "markdown.code_block": "cyan"})
"""Colours that can be read on dark and on light ground."""


class PlainScreen:
    """Answers as they were written; messages go to ``messages``. reader: lets the user change a text."""

    def __init__(self, messages: TextIO, reader: Callable[[str], str | None] = lambda _: None) -> None:
        self._messages, self.ask = messages, reader

    def say(self, text: str) -> None:
        """Shows a message of the program."""
        say(printable(text), self._messages)

    @contextmanager
    def answer(self) -> Iterator[Callable[[str], None]]:
        """Inside, the function shows a piece of an answer. A line end follows the last one."""
        pieces, last = Pieces(), ""

        def show(piece: str) -> None:
            nonlocal last
            text = pieces.take(piece)
            last = text[-1:] or last
            print(text, end="", flush=True)

        try:
            yield show
        finally:
            print(pieces.end(), end="" if last == "\n" else "\n", flush=True)


class MarkdownScreen:
    """Answers as Markdown. Blocks that are complete are printed and scroll away; the one under way is drawn again with
    each piece, its last lines where it is higher than the terminal."""

    def __init__(self, console: Console, reader: Callable[[str], str | None]) -> None:
        self._console, self.ask = console, reader

    def say(self, text: str) -> None:
        """Shows a message of the program."""
        say(printable(text))

    @contextmanager
    def answer(self) -> Iterator[Callable[[str], None]]:
        """Inside, the function shows a piece of an answer."""
        pieces, blocks, drawn = Pieces(), Blocks(), 0.0
        live = Live(console=self._console, auto_refresh=False, transient=True, redirect_stdout=False)

        def show(piece: str) -> None:
            nonlocal drawn
            live.start()  # not before the first piece: messages may come before it
            complete = blocks.take(pieces.take(piece))
            for block in complete:
                live.update("", refresh=True)
                self._print(block)
            if complete or time.monotonic() - drawn >= DRAW_EVERY_S:
                live.update(_Drawn(blocks.rest, tail=True), refresh=True)
                drawn = time.monotonic()

        try:
            yield show
        finally:
            live.update("", refresh=live.is_started)
            live.stop()
            for block in [*blocks.take(pieces.end()), blocks.rest.strip("\n")]:
                if block:
                    self._print(block)

    def _print(self, block: str) -> None:
        self._console.print(_Drawn(block))
        self._console.print()


class _Drawn:
    """Markdown as the terminal gets it. What it makes of entities such as ``&#8238;`` is made printable too, and links
    show their address instead of hiding it. tail: only the last lines that the terminal has room for."""

    def __init__(self, text: str, tail: bool = False) -> None:
        self._text, self._tail = text, tail

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        markdown = Markdown(self._text, code_theme="ansi_dark", hyperlinks=False)
        lines = console.render_lines(markdown, options.update(height=None), pad=False)
        if self._tail:
            lines = lines[-max(console.height - 2, 1) :]
        for line in lines:
            for segment in line:
                style = segment.style
                if style is not None and style.link:
                    style = style.update_link(None)
                yield Segment(printable(segment.text), style)
            yield Segment.line()
