"""Prompts that the model answers itself: records with a prompt and anything that a judge needs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_parallel.config.tree import RunConfig
from llm_parallel.config.tree_tune import ChatConfig, Columns
from llm_parallel.data.chat import ChatEncoder
from llm_parallel.data.chat_data import REPORT
from llm_parallel.data.chat_files import opened_sources, settings_of, write_report, written_once
from llm_parallel.data.chat_open import open_encoder
from llm_parallel.data.dataset_info import Opened
from llm_parallel.data.epochs import derive_key
from llm_parallel.data.formats import BadRecord, Reader, refuse_media
from llm_parallel.data.prepare import file_errors_explained
from llm_parallel.data.readers import Problems, first_rows
from llm_parallel.data.template import Refused
from llm_parallel.errors import UserError
from llm_parallel.tasks.base import Asked

ORDER, HOLD_OUT = 11, 12
"""The uses of a derived key."""
VERSION = 1
PROMPTS = "prompts.jsonl"
"""One prompt in each line, as it was when the run began."""


@dataclass(frozen=True)
class Prompt:
    """One prompt. tokens: up to where the assistant answers; messages: the same as turns; record: all fields of the
    record, which may hold what a judge needs; where: its file and line."""

    tokens: tuple[int, ...]
    messages: Sequence[Mapping[str, Any]]
    record: Mapping[str, Any]
    where: str


class PromptReader:
    """Reads records with ``prompt`` (a text or messages), ``messages`` or ``conversations`` (whose last turns of the
    assistant are left out), or ``question`` or ``instruction`` with or without ``input``; ``system`` stands before."""

    def __init__(self, columns: Columns | None = None, roles: Mapping[str, str] | None = None) -> None:
        given = (columns or Columns()).model_dump()
        self._names = {field: name for field, name in given.items() if name is not None}
        self._turns = Reader("auto", columns, roles)

    def read(self, record: Any) -> list[dict[str, Any]]:
        """The messages of a record's prompt. Raises BadRecord."""
        if not isinstance(record, Mapping):
            raise BadRecord("is no record with named fields")
        refuse_media(record)
        messages = self._messages(record)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages or messages[-1]["role"] == "system":
            raise BadRecord("has no question")
        system = record.get(self._names.get("system", "system"))
        if isinstance(system, str) and system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        return messages

    def tools(self, record: Mapping[str, Any]) -> list[Any] | None:
        """What the assistant may call. Raises BadRecord."""
        return self._turns.tools(record)

    def _messages(self, record: Mapping[str, Any]) -> list[dict[str, Any]]:
        for field in ("prompt", "messages", "conversations", "question", "instruction"):
            value = self._turns.turns_or_text(record.get(self._names.get(field, field)))
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
    """Prompts of training and held-out ones. ``stops``: tokens that end an answer; ``tokenizer``: where it is."""

    folder: Path
    training: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    stops: frozenset[int]
    tokenizer: str

    @classmethod
    def open(cls, folder: str | Path) -> Prompts:
        """Opens a folder that ``prepare_prompts`` wrote."""
        report = report_of(Path(folder))
        prompts: dict[str, list[Prompt]] = {"train": [], "eval": []}
        with (Path(folder) / PROMPTS).open(encoding="utf-8") as lines:
            for line in lines:
                one = json.loads(line)
                prompt = Prompt(tuple(one["tokens"]), one["messages"], one["record"], one["where"])
                prompts[one["split"]].append(prompt)
        stops, tokenizer = frozenset(report["stops"]), str(report["tokenizer"])
        return cls(Path(folder), tuple(prompts["train"]), tuple(prompts["eval"]), stops, tokenizer)

    def asked(self) -> Iterator[Asked]:
        """All prompts as judges are told of them."""
        for prompt in (*self.training, *self.held_out):
            yield Asked(prompt.messages, prompt.record, prompt.where)

    def of_round(self, number: int, count: int, seed: int) -> list[tuple[int, Prompt]]:
        """The prompts of a round, each with its number in the run, from 0: all are asked once, in an order that follows
        from the seed, then all again in another."""
        orders: dict[int, Any] = {}
        found = []
        for place in range(number * count, (number + 1) * count):
            epoch, index = divmod(place, len(self.training))
            if epoch not in orders:
                generator = np.random.default_rng(derive_key(ORDER, seed, epoch))
                orders[epoch] = generator.permutation(len(self.training))
            found.append((place, self.training[orders[epoch][index]]))
        return found


def report_of(folder: Path) -> dict[str, Any]:
    """What ``report.json`` of a folder of prompts holds."""
    found: dict[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    return found


def prepare_prompts(config: RunConfig, notice: Callable[[str], None] = lambda _: None) -> Prompts:
    """Reads and encodes the prompts of ``chat.train`` and ``chat.eval``, unless the run folder has them already, and
    opens them. ``notice`` is told what is left out. Raises UserError."""
    chat, new_tokens = config.chat, config.method.rollout.max_new_tokens
    encoder = open_encoder(config)
    room = min(config.data.seq_length_tokens + 1, config.model.max_seq_length_tokens) - new_tokens
    if room < 1:
        raise UserError(
            f"method.rollout.max_new_tokens = {new_tokens} leaves no room for a prompt in data.seq_length_tokens = "
            f"{config.data.seq_length_tokens} and model.max_seq_length_tokens = {config.model.max_seq_length_tokens}; "
            "make it smaller, or these larger"
        )
    with file_errors_explained(Path(config.run_dir) / "data", kept=""):
        opened = opened_sources(chat)
        settings = {**settings_of(config, encoder, opened), "method": "rounds", "prompts": VERSION, "room": room}
        folder = written_once(config, settings, lambda making: _write(making, config, encoder, opened, settings))
    for text in (text for source in opened for text in source.notices):
        notice(text)
    for text in report_of(folder)["said"]:
        notice(text)
    return Prompts.open(folder)


def _write(
    making: Path, config: RunConfig, encoder: ChatEncoder, opened: Sequence[Opened], settings: dict[str, Any]
) -> None:
    chat = config.chat
    said: list[str] = []
    by_source = [_read(chat, number, one, encoder, settings["room"], said) for number, one in enumerate(opened)]
    training = [prompt for prompts in by_source[: len(chat.train)] for prompt in prompts]
    held_out = [prompt for prompts in by_source[len(chat.train) :] for prompt in prompts]
    if not chat.eval and chat.eval_fraction:
        order = np.random.default_rng(derive_key(HOLD_OUT)).permutation(len(training))
        chosen = set(order[: min(round(chat.eval_fraction * len(training)), len(training) - 1)].tolist())
        held_out = [prompt for number, prompt in enumerate(training) if number in chosen]
        training = [prompt for number, prompt in enumerate(training) if number not in chosen]
    said.append(f"{len(training):,} prompts to train on, {len(held_out):,} held out")
    with (making / PROMPTS).open("w", encoding="utf-8") as out:
        for split, prompts in (("train", training), ("eval", held_out)):
            for prompt in prompts:
                line = {"split": split, **vars(prompt)}
                out.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
        out.flush()
        os.fsync(out.fileno())
    write_report(making, {**settings, "said": said}, encoder, [])


def _read(
    chat: ChatConfig, number: int, opened: Opened, encoder: ChatEncoder, room: int, said: list[str]
) -> list[Prompt]:
    """The prompts of one source; ``said`` gets what was left out."""
    train = number < len(chat.train)
    source = chat.train[number] if train else chat.eval[number - len(chat.train)]
    field = f"chat.train.{number}" if train else f"chat.eval.{number - len(chat.train)}"
    reader, problems, too_long = PromptReader(opened.columns, opened.roles), Problems(), 0
    found: list[Prompt] = []
    for row in first_rows(opened.files, problems, opened.limit):
        try:
            messages = reader.read(row.value)
            ids = encoder.prompt(messages, reader.tools(row.value))
        except BadRecord as error:
            problems.add(row.where, str(error))
            continue
        except Refused as error:
            raise UserError(
                f"the chat template ({encoder.template.origin}) refuses {row.where}: {error}; mend or remove that "
                "record, or give another chat.template"
            ) from None
        if len(ids) > room:
            too_long += 1
            continue
        found.append(Prompt(tuple(ids.tolist()), messages, row.value, row.where))
    if opened.limit is not None:
        said.append(f"{field}: of the first {opened.limit:,} records")
    if summary := problems.summary():
        said.append(f"{field}: {summary}")
    if too_long:
        said.append(f"{field}: left out {too_long:,} prompts of more than {room} tokens, which do not fit")
    if not found:
        raise UserError(
            f"{field}.path = {source.path} has no prompt that can be answered: "
            + (f"{too_long:,} are longer than {room} tokens" if too_long else summary or "it has no records")
        )
    return found
