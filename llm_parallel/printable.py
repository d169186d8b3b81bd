"""Text that others wrote, made fit for a terminal: it cannot move the cursor, change colours or titles, fill the
clipboard, or show its letters in another order than they have."""

from __future__ import annotations

from llm_parallel.lines import CONTROL, printable

__all__ = ["CONTROL", "Pieces", "printable"]


class Pieces:
    """The same for a text that comes in pieces: a carriage return at the end of one may be half of a line end."""

    def __init__(self) -> None:
        self._held = ""

    def take(self, piece: str) -> str:
        """The printable form of what is certain."""
        text = self._held + piece
        self._held = "\r" if text.endswith("\r") else ""
        return printable(text[: len(text) - len(self._held)])

    def end(self) -> str:
        """The printable form of the rest."""
        held, self._held = self._held, ""
        return printable(held)
