"""A model in this process as what answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count

from llm_parallel.chat.backend import Event, Interrupt, LeftOut, Note, Text
from llm_parallel.chat.conversation import Message, fitting
from llm_parallel.chat.request import Settings
from llm_parallel.data.template import Refused
from llm_parallel.errors import UserError
from llm_parallel.generate.answer import Answer
from llm_parallel.generate.draw import Choice
from llm_parallel.generate.engine import Generator, GeneratorOptions
from llm_parallel.generate.held import Held
from llm_parallel.generate.requests import Reason, Request
from llm_parallel.generate.sampling import Sampling
from llm_parallel.parallel.groups import close_groups
from llm_parallel.serve.open import open_model
from llm_parallel.serve.request import ServeRequest

DEFAULTS = Settings(temperature=0.7, top_p=0.95, max_new_tokens=1024, seed=0)


class LocalModel:
    """See ``Backend``. Raises UserError if there is no model with a tokenizer and a template that works."""

    def __init__(self, folder: str, held: Held) -> None:
        self._name, self._held = folder, held
        self.remark: str | None = None
        self.defaults: dict[str, object] = vars(DEFAULTS)
        self._numbers = count()
        self._tokens: list[int] = []
        self.reopen()

    def reopen(self) -> None:
        """Loads the model."""
        opened = open_model(ServeRequest(self._name, device=self._held.device, weights=self._held.weights))
        try:
            self._tokenizer, self._encoder = opened.tokenizer, opened.encoder()
        except BaseException:
            close_groups()
            raise
        self._ends = frozenset({*opened.ends, *self._encoder.stops})
        self._generator = Generator(opened.loaded.network, GeneratorOptions(max_running=1), on_token=self._take)
        limits = self._generator.limits
        self.context = min(opened.loaded.config.model.max_seq_length_tokens, limits.num_pages * limits.page_tokens)
        self.system: str | None = opened.system

    def _take(self, number: int, sample: int, chosen: Choice) -> None:
        self._tokens.append(chosen.token)

    @property
    def title(self) -> str:
        """The folder and the context."""
        return f"{self._name} ({self.context:,} tokens of context)"

    def models(self) -> list[str]:
        """This model alone."""
        return [self._name]

    def choose(self, name: str) -> bool:
        """There is no other one."""
        return name == self._name

    def close(self) -> None:
        """Gives the memory and the process groups back."""
        del self._generator
        close_groups()

    def answer(
        self, messages: Sequence[Message], settings: Settings, tries: int, interrupt: Interrupt
    ) -> Iterator[Event]:
        """Answers. Turns are left out until a quarter of the context, or ``max_new_tokens``, is free."""
        wanted = DEFAULTS.max_new_tokens if settings.max_new_tokens is None else settings.max_new_tokens
        assert wanted is not None
        room = min(wanted, max(1, self.context // 4))
        kept = fitting(messages, lambda some: len(self._prompt(some)) + room <= self.context)
        turn = kept or fitting(messages, lambda some: len(self._prompt(some)) < self.context)
        if turn is None:
            last = _without_older_turns(messages)
            raise UserError(
                f"the message and the system message have {len(self._prompt(last)):,} tokens, and the model's context "
                f"is {self.context:,}; shorten one of them"
            )
        if turn[1]:
            yield LeftOut(turn[1])
        prompt = self._prompt(turn[0])
        length = min(wanted, self.context - len(prompt))
        sampling = Sampling(
            max_new_tokens=length,
            temperature=_or(settings.temperature, DEFAULTS.temperature),
            top_p=_or(settings.top_p, DEFAULTS.top_p),
            seed=int(_or(settings.seed, DEFAULTS.seed)),
        )
        yield from self._written(prompt, sampling, tries, interrupt, is_cut=length < wanted)

    def _prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        try:
            return tuple(self._encoder.prompt(messages).tolist())
        except Refused as error:
            raise UserError(f"the model's chat template refuses the conversation: {error}") from None

    def _written(
        self, prompt: tuple[int, ...], sampling: Sampling, tries: int, interrupt: Interrupt, is_cut: bool
    ) -> Iterator[Event]:
        number = next(self._numbers)
        # Draws depend on the length of the prompt, so that not every answer begins with the same draws.
        stream = len(prompt) * 1000 + tries
        self._tokens.clear()
        answer, shown = Answer(self._tokenizer, prompt), 0
        self._generator.submit(Request(number, prompt, sampling, self._ends, stream=stream))
        reason = None
        try:
            while reason is None:
                if interrupt.asked:
                    self._generator.cancel(number)
                for finished in self._generator.tick():
                    reason = finished.reason
                for token in self._tokens:
                    if token not in self._ends:
                        answer.add(token)
                self._tokens.clear()
                text = answer.text() if reason is not None else answer.certain()
                if len(text) > shown:
                    yield Text(text[shown:])
                    shown = len(text)
        finally:
            if reason is None:  # whoever reads has gone away
                self._generator.cancel(number)
                while not self._generator.idle:
                    self._generator.tick()
        if reason is Reason.LENGTH:
            yield Note(
                f"the context of {self.context:,} tokens is full, and the answer ended there"
                if is_cut
                else f"the answer ended after {sampling.max_new_tokens:,} tokens; /params max_new_tokens=… changes it"
            )
        elif not shown and reason is Reason.STOP:
            yield Note("the answer is empty")


def _without_older_turns(messages: Sequence[Message]) -> list[Message]:
    """The system message and the last turn."""
    found: list[Message] = []

    def remember(some: Sequence[Message]) -> bool:
        found[:] = some
        return False

    fitting(messages, remember)
    return found


def _or(value: float | None, default: float | None) -> float:
    chosen = default if value is None else value
    assert chosen is not None
    return chosen
