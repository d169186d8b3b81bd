"""Sections of a report, and the page that they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from llm_parallel.report.figures import Picture


@dataclass(frozen=True)
class Block:
    """A piece of a section: ``text``, ``heading``, ``list``, ``table`` or ``picture``."""

    kind: str
    text: str = ""
    style: str = ""
    head: Sequence[str] = ()
    rows: Sequence[Any] = ()
    numbers: Sequence[int] = ()
    """Columns of a table that hold numbers."""
    name: str = ""
    svg: str = ""


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

    def picture(self, picture: Picture) -> None:
        """A figure with its caption."""
        self.blocks.append(Block("picture", picture.caption, name=picture.name, svg=picture.svg()))


def render(title: str, made: str, sections: Sequence[Section]) -> str:
    """The page. All text is escaped, since a run's name or an error message may contain anything."""
    from jinja2 import Environment, StrictUndefined

    template = (resources.files("llm_parallel.report") / "page.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(template).render(title=title, made=made, sections=sections)
