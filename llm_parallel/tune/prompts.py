"""Prompts that the model answers itself: records with a prompt and anything that a judge needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_parallel.config.tree import RunConfig
from llm_parallel.data.chat import ChatEncoder
from llm_parallel.data.chat_open import open_encoder
from llm_parallel.data.dataset_info import open_source
from llm_parallel.data.epochs import derive_key
from llm_parallel.data.formats import BadRecord, Reader
from llm_parallel.data.readers import Problems, rows
from llm_parallel.data.template import Refused
from llm_parallel.errors import UserError
from llm_parallel.tasks.base import Asked

ORDER, HOLD_OUT = 11, 12
"""The uses of a derived key."""


@dataclass(frozen=True)
class Prompt:
    """Token ids up to where the assistant answers, and the record that they are of."""

    tokens: tuple[int, ...]
    asked: Asked


class PromptReader:
    """Reads records with ``prompt`` (a text or messages), ``messages`` or ``conversations`` (whose last turns of the
    assistant are left out), or ``question`` or ``instruction`` with or without ``input``; ``system`` stands before."""

    def __init__(self, names: Mapping[str, str] | None = None) -> None:
        self._names = dict(names or {})
        self._turns = Reader()

    def read(self, record: Any) -> list[dict[str, Any]]:
        """The messages of a record's prompt. Raises BadRecord."""
        if not isinstance(record, Mapping):
            raise BadRecord("is no record with named fields")
        messages = self._messages(record)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages or messages[-1]["role"] == "system":
            raise BadRecord("has no question")
        system = record.get(self._names.get("system", "system"))
        if isinstance(system, str) and system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        return messages

    def _messages(self, record: Mapping[str, Any]) -> list[dict[str, Any]]:
        for field in ("prompt", "messages", "conversations", "question", "instruction"):
            value = record.get(self._names.get(field, field))
            if value is None:
                continue
            if isinstance(value, str):
                extra = record.get(self._names.get("input", "input")) if field == "instruction" else None
                text = f"{value}\n{extra}" if isinstance(extra, str) and extra else value
                if not text.strip():
                    raise BadRecord(f"has an empty {field}")
                return [{"role": "user", "content": text}]
            return list(self._turns.turns(value, field))
        raise BadRecord(f"has no prompt; its fields are {', '.join(map(repr, record)) or 'none'}")


@dataclass(frozen=True)
class Prompts:
    """Prompts of training and held-out ones. ``stops``: tokens that end an answer."""

    training: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    stops: frozenset[int]
    seed: int

    def of_round(self, number: int, count: int) -> list[tuple[int, Prompt]]:
        """The prompts of a round, each with its number in the run, from 0: all are asked once, in an order that follows
        from the seed, then all again in another."""
        found = []
        for place in range(number * count, (number + 1) * count):
            epoch, index = divmod(place, len(self.training))
            found.append((place, self.training[self._order(epoch)[index]]))
        return found

    def _order(self, epoch: int) -> Any:
        return np.random.default_rng(derive_key(ORDER, self.seed, epoch)).permutation(len(self.training))


def open_prompts(config: RunConfig, notice: Callable[[str], None] = lambda _: None) -> Prompts:
    """Reads ``chat.train`` and ``chat.eval``. ``notice`` is told what is left out. Raises UserError."""
    encoder = open_encoder(config)
    chat = config.chat
    room = config.data.seq_length_tokens + 1 - config.method.rollout.max_new_tokens
    if config.model.max_seq_length_tokens is not None:
        room = min(room, config.model.max_seq_length_tokens - config.method.rollout.max_new_tokens)
    if room < 1:
        raise UserError(
            f"method.rollout.max_new_tokens = {config.method.rollout.max_new_tokens} leaves no room for a prompt in "
            f"data.seq_length_tokens = {config.data.seq_length_tokens}; shorten one or lengthen the other"
        )
    training = _read(chat.train, "train", encoder, room, notice)
    held_out = _read(chat.eval, "eval", encoder, room, notice)
    if not chat.eval and chat.eval_fraction:
        order = np.random.default_rng(derive_key(HOLD_OUT)).permutation(len(training))
        count = min(round(chat.eval_fraction * len(training)), len(training) - 1)
        chosen = set(order[:count].tolist())
        held_out = [prompt for number, prompt in enumerate(training) if number in chosen]
        training = [prompt for number, prompt in enumerate(training) if number not in chosen]
    if not training:
        raise UserError("chat.train has no prompt to answer; give records with a prompt that fits the model")
    return Prompts(tuple(training), tuple(held_out), frozenset(encoder.stops), config.seed)


def _read(
    sources: Sequence[Any], split: str, encoder: ChatEncoder, room: int, notice: Callable[[str], None]
) -> list[Prompt]:
    found: list[Prompt] = []
    for number, source in enumerate(sources):
        columns = {name: value for name, value in source.columns.model_dump().items() if value is not None}
        reader, problems, too_long = PromptReader(columns), Problems(), 0
        opened = open_source(source)
        for text in opened.notices:
            notice(text)
        before = len(found)
        for path in opened.files:
            for row in rows(Path(path), problems):
                try:
                    messages = reader.read(row.value)
                    ids = encoder.prompt(messages, row.value.get("tools"))
                except BadRecord as error:
                    problems.add(row.where, str(error))
                    continue
                except Refused as error:
                    raise UserError(
                        f"the chat template ({encoder.template.origin}) refuses {row.where}: {error}; mend or remove "
                        "that record, or give another chat.template"
                    ) from None
                if len(ids) > room:
                    too_long += 1
                    continue
                found.append(Prompt(tuple(ids.tolist()), Asked(tuple(messages), row.value, row.where)))
        if said := problems.summary():
            notice(f"chat.{split}.{number}: {said}")
        if too_long:
            notice(
                f"chat.{split}.{number}: left out {too_long} prompts of more than {room} tokens, which with "
                "method.rollout.max_new_tokens do not fit data.seq_length_tokens"
            )
        if len(found) == before:
            raise UserError(f"chat.{split}.{number}.path = {source.path} has no prompt that can be answered")
    return found
