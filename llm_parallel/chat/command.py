"""``llm-parallel chat``."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from io import TextIOWrapper

from llm_parallel.chat.backend import Backend
from llm_parallel.chat.conversation import Conversation, load
from llm_parallel.chat.remote import RemoteModel, is_address
from llm_parallel.chat.request import ChatRequest
from llm_parallel.chat.session import Screen, Session
from llm_parallel.errors import UserError
from llm_parallel.lines import say
from llm_parallel.printable import printable


def chat_command(request: ChatRequest) -> int:
    """Runs a conversation until its end. Returns the exit status. Raises UserError."""
    conversation = load(request.load) if request.load else None
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    chat = _on_terminal if on_terminal else _in_pipe
    backend = _open(request, request.model, request.name)
    if conversation is None:
        conversation = Conversation(backend.system)
    if request.system is not None:
        conversation.system = request.system or None
    try:
        return chat(request, backend, conversation)
    except UserError as error:
        raise UserError(printable(str(error))) from None


def _open(request: ChatRequest, model: str, name: str | None = None) -> Backend:
    if is_address(model):
        if request.weights is not None and model == request.model:
            raise UserError(f"--weights is given, and {model} is a server, which holds its own; leave it out")
        return RemoteModel(model, name, request.environment)
    if name is not None:
        raise UserError(f"--name is given, and {model} is no address of a server; leave it out")
    from llm_parallel.chat.local import LocalModel

    return LocalModel(model, request.held())


def _opener(request: ChatRequest) -> Callable[[str, Backend], Backend]:
    """Opens another model. One in this process has to go before the next one comes; what can be known before is asked
    before, and the first comes back if the next one fails."""

    def opener(model: str, before: Backend) -> Backend:
        if is_address(model):
            found = _open(request, model)
            before.close()
            return found
        from llm_parallel.generate.load import describe_folder

        describe_folder(model)
        before.close()
        try:
            return _open(request, model)
        except UserError:
            before.reopen()
            raise

    return opener


def _session(request: ChatRequest, backend: Backend, conversation: Conversation, screen: Screen) -> Session:
    if backend.remark:
        screen.say(backend.remark)
    return Session(backend, _opener(request), screen, conversation, request.settings)


def _in_pipe(request: ChatRequest, backend: Backend, conversation: Conversation) -> int:
    """Each line of standard input is a message or a command; standard output is answers alone. The first error ends
    it, since what follows builds on what came before."""
    from llm_parallel.chat.screen import PlainScreen

    session = _session(request, backend, conversation, PlainScreen(sys.stderr))
    try:
        for line in sys.stdin:
            if not session.take(line):
                break
            if session.interrupted:
                return 128 + signal.SIGINT
    except BrokenPipeError:  # whoever reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    finally:
        session.backend.close()
    return 0


def _on_terminal(request: ChatRequest, backend: Backend, conversation: Conversation) -> int:
    from rich.console import Console

    from llm_parallel.chat.keyboard import Keyboard, typing_ahead
    from llm_parallel.chat.screen import THEME, MarkdownScreen, PlainScreen

    keyboard, console = Keyboard(request.environment), Console(theme=THEME, highlight=False)
    plain = request.plain or console.is_dumb_terminal
    screen: Screen = PlainScreen(sys.stdout, keyboard.change) if plain else MarkdownScreen(console, keyboard.change)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    session = _session(request, backend, conversation, screen)
    screen.say(f"{backend.title}\n/help lists commands and keys; Ctrl-D ends")
    try:
        with suppress(EOFError), typing_ahead():
            while _turn(session, keyboard.read, screen):
                pass
    finally:
        session.backend.close()
    return 0


def _turn(session: Session, read: Callable[[], str], screen: Screen) -> bool:
    """One message. An error or Ctrl-C ends it alone. Raises EOFError at Ctrl-D."""
    try:
        return session.take(read())
    except UserError as error:
        say(f"error: {printable(str(error))}")
    except KeyboardInterrupt:
        screen.say("Ctrl-D or /quit ends")
    return True


def _leave(number: int, _: object) -> None:
    """The terminal is put back as it was."""
    sys.exit(128 + number)
