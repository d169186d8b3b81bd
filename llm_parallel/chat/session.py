"""A conversation under way: what the lines that a user writes do to it. It knows neither keyboard nor screen."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from llm_parallel.chat.backend import Backend, Interrupt, LeftOut, Text
from llm_parallel.chat.commands import help_text, params_text, parse, with_params
from llm_parallel.chat.conversation import Conversation, load, save
from llm_parallel.chat.request import Settings
from llm_parallel.errors import UserError


class Screen(Protocol):
    """Where a conversation is shown."""

    def say(self, text: str) -> None:
        """Shows a message of the program."""

    def answer(self) -> AbstractContextManager[Callable[[str], None]]:
        """Inside, the function shows a piece of an answer."""

    def ask(self, text: str, /) -> str | None:
        """Lets the user change a text; None if that cannot be, or the user does not want to."""


class Session:
    """The state of a chat. opener: opens a folder or an address, and closes the model that it is given first if both
    have no room; interrupted: whether the last answer was stopped."""

    def __init__(
        self,
        backend: Backend,
        opener: Callable[[str, Backend], Backend],
        screen: Screen,
        conversation: Conversation,
        settings: Settings,
    ) -> None:
        self.backend, self._opener, self._screen = backend, opener, screen
        self.conversation, self.settings = conversation, settings
        self._left_out = 0
        self.interrupted = False

    def take(self, line: str) -> bool:
        """Does what a line asks for. Returns whether to go on. Raises UserError."""
        self.interrupted = False
        meaning = parse(line)
        if meaning is None:
            return True
        if meaning.command == "quit":
            return False
        if meaning.command is None:
            self._ask(meaning.text)
        else:
            getattr(self, f"_{meaning.command}")(meaning.text)
        return True

    def _ask(self, text: str) -> None:
        if self.conversation.ask(text):
            self._screen.say("the question before had no answer and is left out")
        self._answer()

    def _answer(self) -> None:
        conversation, written, notes = self.conversation, [], []
        with Interrupt() as interrupt:
            try:
                with self._screen.answer() as show:
                    asked = conversation.all(), self.settings, conversation.tries, interrupt
                    for event in self.backend.answer(*asked):
                        if isinstance(event, Text):
                            written.append(event.text)
                            show(event.text)
                        elif isinstance(event, LeftOut):
                            self._say_left_out(event.count)
                        else:
                            notes.append(event.text)
            finally:
                conversation.take_answer("".join(written))
        for text in notes:
            self._screen.say(f"[{text}]")
        self.interrupted = interrupt.asked
        if interrupt.asked:
            kept = "what there is of it stays; /regenerate answers again" if written else "/regenerate answers"
            self._screen.say(f"[stopped; {kept}]")

    def _say_left_out(self, count: int) -> None:
        if count != self._left_out:
            what = "the oldest message is" if count == 1 else f"the oldest {count:,} messages are"
            self._screen.say(f"[{what} left out of what the model reads, since the context is full]")
        self._left_out = count

    def _system(self, text: str) -> None:
        if text:
            self.conversation.system = None if text == "off" else text
        system = self.conversation.system
        self._screen.say(f"system message: {system}" if system else "no system message")

    def _regenerate(self, _: str) -> None:
        if not self.conversation.drop_answer():
            raise UserError("there is no question to answer again; write one")
        self._answer()

    def _edit(self, text: str) -> None:
        question = self.conversation.question()
        if question is None:
            raise UserError("there is no question to change; write one")
        changed = text or self._screen.ask(question)
        if not changed:
            self._screen.say("the question stays as it is; /edit TEXT changes it")
            return
        self.conversation.drop_question()
        self._ask(changed)

    def _new(self, _: str) -> None:
        self.conversation = Conversation(self.conversation.system)
        self._left_out = 0
        self._screen.say("a new conversation; the system message stays")

    def _save(self, text: str) -> None:
        path = Path(text).expanduser()
        save(self.conversation, path)
        self._screen.say(f"{len(self.conversation.all()):,} messages are in {path}")

    def _load(self, text: str) -> None:
        self.conversation = load(Path(text).expanduser())
        self._left_out = 0
        question = self.conversation.question()
        last = f"; the last question: {question}" if question else ""
        self._screen.say(f"{len(self.conversation.all()):,} messages are loaded{last}")

    def _params(self, text: str) -> None:
        if text:
            self.settings = with_params(self.settings, text)
        self._screen.say(params_text(self.settings, self.backend.defaults))

    def _model(self, text: str) -> None:
        if not text:
            self._screen.say("\n".join([f"speaking with {self.backend.title}", *self.backend.models()]))
            return
        before = self.backend.system
        if not self.backend.choose(text):
            try:
                self.backend = self._opener(text, self.backend)
            except UserError as error:
                names = ", ".join(self.backend.models())
                raise UserError(f"{error}, or one of {names}") from None
        if self.conversation.system == before:
            self.conversation.system = self.backend.system
        self._left_out = 0
        self._screen.say(f"speaking with {self.backend.title}")
        if self.backend.remark:
            self._screen.say(self.backend.remark)

    def _help(self, _: str) -> None:
        self._screen.say(help_text())
