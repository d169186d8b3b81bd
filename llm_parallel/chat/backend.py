"""What answers: the same interface for a model in this process and for a server."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol, TypeVar

from llm_parallel.chat.conversation import Message
from llm_parallel.chat.request import Settings


@dataclass(frozen=True)
class Text:
    """A piece of the answer, as the model wrote it."""

    text: str


@dataclass(frozen=True)
class LeftOut:
    """How many of the oldest messages the model does not see, since they do not fit; it comes before any text."""

    count: int


@dataclass(frozen=True)
class Note:
    """Something to say under the answer."""

    text: str


Event = Text | LeftOut | Note
T = TypeVar("T")


class Interrupt:
    """Ctrl-C while an answer is written: it stops the answer, not the program, and nothing in the middle of its work.

    asked: whether it came."""

    def __init__(self) -> None:
        self.asked = False
        self._waiting = False
        self._before: Any = None

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if self._waiting:
            self._waiting = False  # a second Ctrl-C is not raised again
            raise KeyboardInterrupt

    def wait(self, work: Callable[[], T]) -> T | None:
        """Returns what ``work`` returns, which waits for another process. Ctrl-C ends the waiting at once; it is noted
        in ``asked`` and not raised, and None is returned."""
        try:
            self._waiting = True
            result = None if self.asked else work()
            self._waiting = False
            return result
        except KeyboardInterrupt:
            self.asked = True
            return None
        finally:
            self._waiting = False


class Backend(Protocol):
    """Attributes: ``system`` is the system message that the model was trained with, if any; ``defaults`` says what
    holds for settings that are None; ``remark`` is what the user should know before the first message, if anything."""

    system: str | None
    defaults: dict[str, object]
    remark: str | None

    @property
    def title(self) -> str:
        """What answers, in a few words."""

    def models(self) -> list[str]:
        """Names that ``choose`` takes, the one that answers first. Raises UserError."""

    def choose(self, name: str) -> bool:
        """Lets another model of the same server answer. False if there is none of that name. Raises UserError."""

    def answer(
        self, messages: Sequence[Message], settings: Settings, tries: int, interrupt: Interrupt
    ) -> Iterator[Event]:
        """Answers, until the model ends or ``interrupt`` is asked. Another number of ``tries`` draws other tokens.
        Raises UserError."""

    def close(self) -> None:
        """Gives back what the model occupies."""

    def reopen(self) -> None:
        """Takes up again what ``close`` gave back. Raises UserError."""
