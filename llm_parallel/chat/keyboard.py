"""Input on a terminal: several lines, a history that outlives the program, and completion of commands."""

from __future__ import annotations

import os
import sys
import termios
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.key_binding.key_processor import KeyPressEvent
from prompt_toolkit.output.color_depth import ColorDepth

from llm_parallel.chat.commands import HELP
from llm_parallel.lines import note

PROMPT, CONTINUED = "> ", ". "


def history_path(environment: Mapping[str, str]) -> Path:
    """Where the lines that were written stay."""
    state = environment.get("XDG_STATE_HOME") or ""
    folder = Path(state) if Path(state).is_absolute() else Path.home() / ".local" / "state"
    return folder / "llm-parallel" / "chat_history"


def open_history(path: Path) -> History:
    """The history in a file that only its owner may read; one in memory, and a sentence, where there can be none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(fd, 0o600)
        finally:
            os.close(fd)
    except OSError as error:
        note(f"the history is not kept, since {path} cannot be written: {error.strerror}")
        return InMemoryHistory()
    return _FileHistory(str(path))


class _FileHistory(FileHistory):
    def store_string(self, string: str) -> None:
        """A disk that is full does not end the chat."""
        with suppress(OSError):
            super().store_string(string)


class _Commands(Completer):
    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """Commands that begin as the line does."""
        text = document.text_before_cursor
        if text.startswith("/") and not any(letter.isspace() for letter in text):
            for name, (takes, does) in HELP.items():
                if name.startswith(text[1:]):
                    yield Completion(f"/{name}" + (" " if takes else ""), -len(text), display_meta=does)


def _bindings() -> KeyBindings:
    """Enter sends. Alt-Enter and Ctrl-J begin a line."""
    bindings = KeyBindings()

    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    bindings.add("enter")(lambda event: event.current_buffer.validate_and_handle())
    bindings.add("escape", "enter")(begin_line)
    bindings.add("c-j")(begin_line)
    return bindings


@contextmanager
def typing_ahead() -> Iterator[None]:
    """What is typed while no prompt reads it stays for the next prompt as it was typed: it is not shown in an answer,
    and Enter is not turned into the key that begins a line. Ctrl-C still interrupts."""
    try:
        fd = sys.stdin.fileno()
        before = termios.tcgetattr(fd)
    except (termios.error, OSError, ValueError):
        yield
        return
    changed = [*before]
    changed[0] &= ~termios.ICRNL
    changed[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(fd, termios.TCSANOW, changed)
    try:
        yield
    finally:
        with suppress(termios.error):
            termios.tcsetattr(fd, termios.TCSANOW, before)


class Keyboard:
    """Reads messages from the terminal."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._session: PromptSession[str] = PromptSession(
            history=open_history(history_path(environment)),
            completer=_Commands(),
            complete_while_typing=False,
            key_bindings=_bindings(),
            multiline=True,
            prompt_continuation=CONTINUED,
            color_depth=ColorDepth.DEPTH_1_BIT if environment.get("NO_COLOR") else None,
        )

    def read(self, default: str = "") -> str:
        """A message. Raises EOFError at Ctrl-D and KeyboardInterrupt at Ctrl-C."""
        text = self._session.prompt(PROMPT, default=default)
        return text.encode("utf-8", "replace").decode("utf-8")  # bytes that are no UTF-8 come as halves of characters

    def change(self, text: str) -> str | None:
        """Lets the user change a text; None at Ctrl-C and Ctrl-D."""
        try:
            return self.read(text)
        except (EOFError, KeyboardInterrupt):
            return None
