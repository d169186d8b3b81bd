"""Lines that commands print for people: whole in a pipe or a file, divided between words on a terminal.

A terminal breaks a long line wherever it is full, in the middle of a word, a number or a path. So everything that is a
sentence for people goes through ``say`` or ``note``; what a program may read (JSON, a batch file, a model's text) is
printed as it is.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import stat
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

_COMMAND = re.compile(r"\s*(next: )?(\S*/)?(llm-parallel|python[\d.]* -m) ")
"""How a line begins that is to be copied into a shell."""
_UNIT = re.compile(r"""(?:`[^`]+`|[^\s`]|`)+""")
"""What stays together in a sentence: a word, a path, a number, or a command between backquotes."""
_ARGUMENT = re.compile(r"""(?:--[\w-]+ (?=[^-\s]))?(?:"[^"]*"|'[^']*'|[^\s"']|["'])+""")
"""What stays together in a command: an argument, an option with its value."""


def say(text: str, stream: TextIO | None = None) -> None:
    """Prints lines for people on standard output (or ``stream``), at once. Names of files, errors and the like may be
    somebody else's text, so control characters are shown and not sent."""
    stream = sys.stdout if stream is None else stream
    width, text = terminal_width(stream), printable(text)
    print(text if width is None else wrapped(text, width), file=stream, flush=True)


CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 without tab and line feed, delete, C1 (0x9b alone begins a sequence)
    "\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks that reorder the text around them
    "\u2028\u2029\ud800-\udfff]"  # other line separators; halves of characters, which no terminal can be sent
)
"""Characters of somebody else's text that must not reach a terminal."""


def printable(text: str) -> str:
    """The text with each control character replaced by a visible one, such as ␛ for escape."""
    return CONTROL.sub(_sign, text.replace("\r\n", "\n"))


def _sign(found: re.Match[str]) -> str:
    number = ord(found[0])
    if number < 0x20:
        return chr(0x2400 + number)
    return "\u2421" if number == 0x7F else "\ufffd"


def note(text: str) -> None:
    """Prints lines for people on standard error, so that what a pipe reads is the command's output alone. If nobody can
    read there any more, because a pipe's reader has ended or a terminal is gone, the text is lost: it ends nothing."""
    try:
        say(text, sys.stderr)
    except OSError:
        silence(sys.stderr)


def silence(stream: TextIO) -> None:
    """Lets whatever is written to a stream disappear from now on, what waits in its buffer included."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def reader_is_gone(fd: int) -> bool:
    """Whether a descriptor is a pipe or a socket that nobody reads any more, as standard output is when ``head`` has
    seen enough or the connection of ``ssh`` has ended. Asks the system; nothing is written."""
    try:
        kind = os.fstat(fd).st_mode
        if not (stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind)):
            return False
        poll = select.poll()
        poll.register(fd, 0)
        return any(state & (select.POLLERR | select.POLLHUP) for _, state in poll.poll(0))
    except OSError:
        return False


class Unheard:
    """Standard output, for a command that must not end because nobody reads it any more, as a context: what is printed
    inside then disappears."""

    def __enter__(self) -> Unheard:
        self._stream: TextIO = sys.stdout
        self._gone = False
        sys.stdout = cast(TextIO, self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.stdout = self._stream
        if self._gone:
            silence(self._stream)  # what its buffer holds must not fail when Python ends

    def write(self, text: str) -> int:
        """As a stream does, but never raises OSError."""
        with self._lost():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As a stream does, but never raises OSError."""
        with self._lost():
            self._stream.flush()

    @contextlib.contextmanager
    def _lost(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._gone = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def terminal_width(stream: TextIO) -> int | None:
    """Columns of the terminal that a stream writes to; None if it is none."""
    if not stream.isatty():
        return None
    from rich.console import Console

    return Console(file=stream).width


def wrapped(text: str, width: int, hang: int = 2) -> str:
    """Each line in pieces of at most ``width`` columns; those after the first stand ``hang`` columns to its right.

    What stands between spaces is never divided, and a command between backquotes only where it does not fit at all. A
    command gets the shell's mark that it goes on, so that it can be copied."""
    return "\n".join(piece for line in text.split("\n") for piece in _pieces(line, width, hang))


def _pieces(line: str, width: int, hang: int) -> Iterator[str]:
    if _columns(line) <= width:
        yield line
    elif _COMMAND.match(line):
        yield from _filled(line, _ARGUMENT, width, 2, " \\")
    else:
        for piece in _filled(line, _UNIT, width, hang, ""):
            if _columns(piece) > width:  # it is one unit; if that is a command, it has arguments
                yield from _filled(piece, _ARGUMENT, width, 2, " \\")
            else:
                yield piece


def _filled(line: str, units: re.Pattern[str], width: int, hang: int, mark: str) -> Iterator[str]:
    """Pieces of a line that end before a unit would run over the edge; all but the last end with ``mark``."""
    indent = line[: len(line) - len(line.lstrip(" "))] + " " * hang
    piece, end = "", 0
    for unit in units.finditer(line):
        longer = piece + line[end : unit.start()] + unit.group()
        end = unit.end()
        last = not line[end:].strip()
        if piece.strip() and _columns(longer) + (0 if last else len(mark)) > width:
            yield piece + mark
            piece = indent + unit.group()
        else:
            piece = longer
    yield piece


def _columns(text: str) -> int:
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)
