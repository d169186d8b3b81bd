"""What commands print for people: tables that are drawn on a terminal and Markdown elsewhere, and the next command."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from llm_parallel.lines import note, printable, wrapped

_BETWEEN = 3
"""Characters between two columns of a drawn table."""
_NUMBER = re.compile(r"[-+±]?[\d.,]+ ?(%|[a-zA-Zµ/]+)?( \(.*\))?|n/a|-?inf|nan|")


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table as Markdown; columns of numbers are right-aligned."""
    cells = [[str(cell).replace("|", "/") for cell in row] for row in rows]
    right = [all(_NUMBER.fullmatch(row[column]) for row in cells) for column in range(len(heads))]
    marks = ["---:" if numbers and cells else "---" for numbers in right]
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(heads), marks, *cells])


def show(text: str, console: Console | None = None) -> None:
    """Prints text with Markdown tables in it: as it is in a pipe or a file, drawn on a terminal."""
    console, text = console or Console(highlight=False), printable(text)
    if not console.is_terminal:
        print(text, file=console.file, flush=True)
        return
    for block in _blocks(text):
        if isinstance(block, str):
            console.print(wrapped(block, console.width), markup=False, highlight=False, soft_wrap=True)
        else:
            _print_table(console, *block)


def show_table(
    title: str, heads: Sequence[str], rows: Iterable[Sequence[object]], console: Console | None = None
) -> None:
    """Prints one table under its title, as ``show`` does."""
    show(f"\n{title}\n\n{markdown_table(heads, rows)}\n", console)


def show_facts(title: str, facts: Iterable[tuple[str, str]], console: Console | None = None) -> None:
    """Prints a title, and below it names with what is to say of each, which may be several lines. On a terminal that is
    too narrow for a value beside its name, the value stands below it."""
    console = console or Console(highlight=False)
    rows = list(facts)
    wide = max(len(name) for name, _ in rows)
    lines = [title]
    for name, value in rows:
        values = value.split("\n")
        beside = [f"  {name if at == 0 else '':{wide}}   {one}" for at, one in enumerate(values)]
        fits = not console.is_terminal or max(map(len, beside)) <= console.width
        lines += beside if fits else [f"  {name}", *(f"    {one}" for one in values)]
    show("\n".join(lines), console)


def say_next(command: str) -> None:
    """The one line with which a command ends: what to try next. It goes to standard error, so that what a pipe reads
    is the command's output alone."""
    note(f"next: {command}")


def _blocks(text: str) -> Iterator[str | tuple[list[str], list[list[str]], list[bool]]]:
    """Lines of text, and tables as heads, rows, and which columns are right-aligned."""
    lines = text.split("\n")
    at = 0
    while at < len(lines):
        if _is_table(lines, at):
            heads, marks = _cells(lines[at]), _cells(lines[at + 1])
            at += 2
            rows = []
            while at < len(lines) and _is_row(lines[at]):
                rows.append(_cells(lines[at]))
                at += 1
            right = [
                mark.endswith(":")
                or (bool(rows) and all(_NUMBER.fullmatch(row[column]) for row in rows if column < len(row)))
                for column, mark in enumerate(marks)
            ]
            yield heads, rows, right
        else:
            if lines[at] or not _is_table(lines, at + 1):  # Markdown wants a blank line there, a drawing does not
                yield lines[at]
            at += 1


def _is_table(lines: Sequence[str], at: int) -> bool:
    """Whether a table begins at a line."""
    marks = lines[at + 1] if at + 1 < len(lines) else ""
    return bool(re.fullmatch(r"\|(\s*:?-+:?\s*\|)+", marks)) and _is_row(lines[at])


def _is_row(line: str) -> bool:
    return line.startswith("|") and line.rstrip().endswith("|")


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _print_table(console: Console, heads: list[str], rows: list[list[str]], right: list[bool]) -> None:
    """Draws a table if it fits the terminal; else each row is a paragraph, its first cell as the heading."""
    rows = [[_breakable(cell) for cell in row[: len(heads)]] for row in rows]
    columns = [[head, *(row[at] for row in rows if at < len(row))] for at, head in enumerate(heads)]
    widths = _widths(columns, right, console.width - _BETWEEN * (len(heads) - 1))
    if widths is not None:
        table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for head, is_right, width in zip(heads, right, widths):
            table.add_column(head, justify="right" if is_right else "left", width=width, overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
        return
    for row in rows:
        name = f"{heads[0]} {row[0]}" if _NUMBER.fullmatch(row[0]) else row[0]
        console.print(name, style="bold", markup=False, highlight=False)
        rest = ", ".join(f"{head} {cell}".strip() for head, cell in zip(heads[1:], row[1:]) if cell)
        console.print(Padding(Text(rest), (0, 0, 0, 2)))


def _breakable(cell: str) -> str:
    """A cell without Markdown's marks, and with places where a list such as a layout's sizes may be divided."""
    return re.sub(r",(?=[a-z])", ", ", cell.replace("**", ""))


def _widths(columns: Sequence[Sequence[str]], right: Sequence[bool], room: int) -> list[int] | None:
    """Widths of columns that fit into ``room`` together, text divided where it must be; None if they cannot fit."""
    widths = [max(map(len, cells)) for cells in columns]
    least = [_least_width(cells, is_right) for cells, is_right in zip(columns, right)]
    if sum(least) > room:
        return None
    while sum(widths) > room:
        at = max(range(len(widths)), key=lambda at: widths[at] - least[at])
        widths[at] -= 1
    return widths


def _least_width(cells: Sequence[str], is_right: bool) -> int:
    """Columns that a column of a table needs: numbers stay whole, and text is divided between words."""
    longest = max((len(word) for cell in cells for word in cell.split()), default=1)
    return max([longest, *map(len, cells[1:])]) if is_right else min(longest, 28)
