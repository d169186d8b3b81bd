"""The terminal chat on a terminal: the real command against a server whose answers the test decides, its screen read
back by a terminal in memory."""

from __future__ import annotations

import os
import pty
import select
import signal
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pyte
import pytest

from tests.support.chat_server import ChatServer, serving
from tests.support.commands import COMMAND, environment

COLUMNS, ROWS = 72, 30
TIMEOUT_S = 60.0


class Screen(pyte.Screen):
    """A screen that answers where its cursor is, as prompt_toolkit asks for."""

    terminal: int

    def write_process_input(self, data: str) -> None:
        os.write(self.terminal, data.encode())


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.execvpe(command[0], command, env)
        ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        self.screen = Screen(COLUMNS, ROWS)
        self.screen.terminal = self.terminal
        self._stream, self.status = pyte.ByteStream(self.screen), -1

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def type(self, keys: str) -> None:
        os.write(self.terminal, keys.encode())

    def until(self, holds: Callable[[], bool]) -> None:
        """Reads what the program writes until something holds."""
        end = time.monotonic() + TIMEOUT_S
        while not holds():
            assert time.monotonic() < end, self.text
            if select.select([self.terminal], [], [], 0.1)[0]:
                self._stream.feed(os.read(self.terminal, 65536))

    def until_shown(self, *parts: str) -> None:
        self.until(lambda: all(part in self.text for part in parts))

    def prompts(self) -> int:
        """How many lines begin as the prompt does."""
        return sum(line.startswith(">") for line in self.screen.display)

    def end(self) -> int:
        """Reads until the program ends; its exit status."""
        with suppress(OSError):  # when nobody holds the other side any longer
            self.until(lambda: False)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        env = environment({"TERM": "xterm-256color", "XDG_STATE_HOME": str(tmp_path)})
        env.pop("COLUMNS")
        opened.append(Terminal([*COMMAND, "chat", *arguments], env))
        return opened[-1]

    yield start
    for one in opened:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(one.pid, signal.SIGKILL)
            os.waitpid(one.pid, 0)
        os.close(one.terminal)


@pytest.mark.processes
def test_a_conversation_on_a_terminal(terminal: Callable[..., Terminal]) -> None:
    goes_on = threading.Event()

    def answer(body: dict[str, Any]) -> Iterator[str]:
        tries = len(server.asked)
        if tries == 1:
            yield "It is **written**"
            assert goes_on.wait(TIMEOUT_S)
            yield " now.\n\n```python\nx = 1\n```\n"
        elif tries == 2:
            yield "Another answer."
        else:
            while not server.gone.is_set():
                yield "more "
                server.gone.wait(0.05)

    server = ChatServer(answer)
    with serving(server):
        chat = terminal(server.address)
        chat.until(lambda: chat.prompts() == 1)
        assert "first-model at http://127.0.0.1" in chat.text and "/help lists commands" in chat.text
        chat.type("Is it\x0awritten?\r")  # Ctrl-J begins a line
        chat.until_shown("It is written")
        assert "now." not in chat.text, "the answer is shown while it comes"
        chat.type("/regenerate\r")  # ahead: the next prompt reads it as it was typed
        goes_on.set()
        chat.until_shown("It is written now.", "x = 1")
        chat.until_shown("> /regenerate", "Another answer.")
        assert "**" not in chat.text and "```" not in chat.text
        row = next(n for n, line in enumerate(chat.screen.display) if "It is written now." in line)
        bold = "".join(chat.screen.buffer[row][n].data for n in range(COLUMNS) if chat.screen.buffer[row][n].bold)
        assert bold == "written"

        chat.until(lambda: chat.prompts() == 3)
        question = [{"role": "user", "content": "Is it\nwritten?"}]
        assert [body["messages"] for body in server.asked] == [question, question]

        chat.type("/params temperature=0.5\r")
        chat.until_shown("temperature=0.5", "top_p: the server's")
        chat.type("Go on.\r")
        chat.until_shown("more more")
        chat.type("\x03")
        chat.until_shown("[stopped; what there is of it stays; /regenerate answers again]")
        assert server.gone.wait(TIMEOUT_S), "the server learns that nobody reads"
        assert server.asked[-1]["temperature"] == 0.5
        chat.until(lambda: chat.screen.display[chat.screen.cursor.y].startswith(">"))
        chat.type("/quit\r")
        assert chat.end() == 0
    assert "Traceback" not in chat.text
