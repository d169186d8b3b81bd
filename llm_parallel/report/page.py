"""Sections of a report, and the page that they make."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from llm_parallel.report.figures import Picture


@dataclass(frozen=True)
class Block:
    """A piece of a section: ``text``, ``heading``, ``list``, ``table``, ``details`` (a table to open), ``tiles``,
    ``bars``, ``answers``, ``beside``, ``picture`` or ``charts``."""

    kind: str
    text: str = ""
    style: str = ""
    head: Sequence[str] = ()
    rows: Sequence[Any] = ()
    numbers: Sequence[int] = ()
    """Columns of a table that hold numbers."""
    name: str = ""
    pictures: Sequence[Picture] = ()


@dataclass(frozen=True)
class Tile:
    """One number with what it is, and a remark."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Part:
    """A part of a bar; ``share`` of the bar, 0 to 1."""

    name: str
    share: float
    text: str
    colour: str

    @property
    def dark(self) -> bool:
        """Whether text on the colour should be light, by the colour's luminance."""
        red, green, blue = (int(self.colour[at : at + 2], 16) for at in (1, 3, 5))
        return 0.299 * red + 0.587 * green + 0.114 * blue < 110


@dataclass(frozen=True)
class Bar:
    """A bar of parts; ``percent`` of the widest bar."""

    label: str
    percent: float
    parts: Sequence[Part]
    legend: Sequence[tuple[str, str]]
    """Parts and colours of all bars."""


@dataclass(frozen=True)
class Answer:
    """What a model wrote after a prompt, and when."""

    prompt: str
    text: str
    note: str


@dataclass(frozen=True)
class Told:
    """One of several answers to a prompt: when it was given, and a remark."""

    title: str
    text: str
    note: str = ""


@dataclass(frozen=True)
class Beside:
    """A prompt with answers that stand side by side."""

    prompt: str
    columns: Sequence[Told]


@dataclass
class Section:
    """A part of the page with its heading."""

    id: str
    title: str
    blocks: list[Block] = field(default_factory=list)

    def text(self, text: str, style: str = "") -> None:
        """A paragraph."""
        self.blocks.append(Block("text", text, style))

    def heading(self, text: str) -> None:
        """A heading within the section."""
        self.blocks.append(Block("heading", text))

    def list(self, items: Sequence[str], style: str = "") -> None:
        """A list, unless it is empty."""
        if items:
            self.blocks.append(Block("list", style=style, rows=items))

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]], text_columns: Sequence[int] = (0,)) -> None:
        """A table; ``text_columns`` are the columns that hold no numbers."""
        numbers = [index for index in range(len(head)) if index not in text_columns]
        self.blocks.append(Block("table", head=head, rows=rows, numbers=numbers))

    def details(self, title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table of text that is hidden until its title is clicked."""
        self.blocks.append(Block("details", title, head=head, rows=rows))

    def tiles(self, tiles: Sequence[Tile]) -> None:
        """The numbers that matter most."""
        self.blocks.append(Block("tiles", rows=tiles))

    def bars(self, name: str, caption: str, bars: Sequence[Bar]) -> None:
        """Bars of parts; at least one."""
        self.blocks.append(Block("bars", caption, rows=bars, name=name))

    def answers(self, answers: Sequence[Answer]) -> None:
        """What a model wrote."""
        self.blocks.append(Block("answers", rows=answers))

    def beside(self, rows: Sequence[Beside]) -> None:
        """Prompts with their answers side by side."""
        self.blocks.append(Block("beside", rows=rows))

    def picture(self, picture: Picture) -> None:
        """A figure with its caption."""
        self.blocks.append(Block("picture", pictures=[picture]))

    def charts(self, pictures: Sequence[Picture]) -> None:
        """Curves, in two columns on a large page."""
        self.blocks.append(Block("charts", pictures=pictures))


def render(title: str, made: str, sections: Sequence[Section], data: str = "") -> str:
    """The page. All text is escaped, since a run's name or an error message may contain anything. ``data``: what
    ``charts.page_data`` says of the curves.

    The page's policy allows its own script and no other, by the script's hash."""
    from jinja2 import Environment, StrictUndefined

    folder = resources.files("llm_parallel.report")
    template, style, script = (
        (folder / name).read_text(encoding="utf-8") for name in ("page.html.j2", "page.css", "page.js")
    )
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(template).render(
        title=title, made=made, sections=sections, data=data, style=style, script=script,
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )  # fmt: skip
