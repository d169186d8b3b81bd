"""Text that others wrote, made fit for a terminal: it cannot move the cursor, change colours or titles, fill the
clipboard, or show its letters in another order than they have."""

from __future__ import annotations

import re

CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 without tab and line feed, delete, C1 (0x9b alone begins a sequence)
    "\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks that reorder the text around them
    "\u2028\u2029\ud800-\udfff]"  # other line separators; halves of characters, which no terminal can be sent
)


def printable(text: str) -> str:
    """The text with each control character replaced by a visible one, such as ␛ for escape."""
    return CONTROL.sub(_sign, text.replace("\r\n", "\n"))


def _sign(found: re.Match[str]) -> str:
    number = ord(found[0])
    if number < 0x20:
        return chr(0x2400 + number)
    return "\u2421" if number == 0x7F else "\ufffd"


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
