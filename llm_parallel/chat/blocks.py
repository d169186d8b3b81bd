"""Markdown that comes piece by piece, divided into blocks that later pieces do not change."""

from __future__ import annotations

import re

_FENCE = re.compile(r" *(`{3,}|~{3,})(.*)")
_LIST = re.compile(r" {0,3}([-*+]|\d{1,9}[.)]) ")


class Blocks:
    """A block ends at a blank line that is not inside code, and whose next line does not go on with it (indented text,
    or a further entry of a list). rest: what has come of the block under way."""

    def __init__(self) -> None:
        self.rest = ""

    def take(self, piece: str) -> list[str]:
        """Takes a piece and returns the blocks that are complete with it."""
        self.rest += piece
        found = []
        while (end := _end_of_block(self.rest)) is not None:
            block, self.rest = self.rest[:end].strip("\n"), self.rest[end:]
            if block:
                found.append(block)
        return found


def _end_of_block(text: str) -> int | None:
    """Where the first block of a text ends, or None if more may belong to it."""
    fence, at = "", 0
    begin = text.lstrip("\n")
    is_list = bool(_LIST.match(begin))
    at = len(text) - len(begin)
    while (line_end := text.find("\n", at)) >= 0:
        line, at = text[at:line_end], line_end + 1
        mark = _FENCE.fullmatch(line)
        if fence:
            if mark and mark[1].startswith(fence) and not mark[2].strip():
                fence = ""
            continue
        if mark:
            fence = mark[1]
        elif not line.strip() and at < len(text) and text[at] not in " \t\n" and not _continues(text, at, is_list):
            return at
    return None


def _continues(text: str, at: int, is_list: bool) -> bool:
    return is_list and (text[at] in "-*+" or text[at].isdigit())
