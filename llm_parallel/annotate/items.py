"""What is shown to a person: prompts with their answers, out of any file that has both, or out of a run's rounds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_parallel.data.chat_counts import some
from llm_parallel.data.formats import BadRecord, Reader
from llm_parallel.data.groups import Messages
from llm_parallel.data.preference import NAMES, ONE_TEXT
from llm_parallel.data.prompts import PromptReader
from llm_parallel.data.readers import Problems, rows
from llm_parallel.errors import UserError
from llm_parallel.tune.round_texts import kept_rounds, read_round

GENERATED = ("number", "sample", "text")
"""Fields of the lines that ``generate --output`` writes."""
QUESTIONS = (*NAMES["prompt"], "messages", "conversations", "instruction")
FORMS = "'prompt' or 'messages' with 'responses', a list; the answers of `llm-parallel generate`; or a run in rounds"


@dataclass(frozen=True)
class Item:
    """A prompt and at least one answer; no two answers are the same.

    id: the same for the same prompt and answers, wherever they come from; models: what wrote each answer, or None;
    where: file and line."""

    id: str
    prompt: Messages
    answers: tuple[Messages, ...]
    models: tuple[str | None, ...]
    tools: list[Any] | None
    where: str


def text_of(messages: Messages) -> str:
    """What an answer says: its text, with calls of tools as JSON, and other turns under the name of their role."""
    parts = []
    for message in messages:
        text = str(message.get("content") or "")
        for call in message.get("tool_calls") or ():
            text += ("\n" if text else "") + json.dumps(call.get("function", call), ensure_ascii=False)
        parts.append(text if message["role"] == "assistant" else f"[{message['role']}]\n{text}")
    return "\n\n".join(parts)


def read_items(
    path: Path, prompts: Path | None = None, notice: Callable[[str], None] = lambda _: None
) -> tuple[Item, ...]:
    """The items of a file or of a run folder, in order. ``prompts``: the file that was answered, for answers of
    ``generate``. ``notice`` is told what is left out. Raises UserError if nothing can be read."""
    problems = Problems()
    if path.is_dir():
        raw = _of_rounds(path)
    elif not path.exists():
        raise UserError(f"{path} does not exist; give a file with {FORMS}")
    else:
        raw = _of_file(path, prompts, problems)
    found: dict[str, Item] = {}
    twice = joined = 0
    for item, same in raw:
        twice += item.id in found
        joined += same
        found.setdefault(item.id, item)
    if summary := problems.summary():
        notice(f"{path}: {summary}")
    if twice:
        notice(f"{path}: left out {some(twice, 'record')} that are there already" if twice > 1 else
               f"{path}: left out 1 record that is there already")  # fmt: skip
    if joined:
        notice(f"{path}: {some(joined, 'answer')} that another one of the same prompt repeats, shown once")
    if not found:
        raise UserError(f"{path} has no prompt with answers: {summary or 'it has no records'}; known are {FORMS}")
    return tuple(found.values())


def _item(
    prompt: Sequence[Any], answers: Sequence[Messages], models: Sequence[str | None], tools: Any, where: str
) -> tuple[Item, int]:
    """An item without repeated answers, and how many these were."""
    first: dict[str, int] = {}
    for place, answer in enumerate(answers):
        first.setdefault(json.dumps(answer, sort_keys=True, ensure_ascii=False), place)
    kept = list(first.values())
    content = json.dumps([list(prompt), list(first)], sort_keys=True, ensure_ascii=False).encode()
    made = Item(
        hashlib.blake2b(content, digest_size=8).hexdigest(),
        tuple(prompt),
        tuple(answers[place] for place in kept),
        tuple(models[place] for place in kept),
        tools,
        where,
    )
    return made, len(answers) - len(kept)


def _of_rounds(run_dir: Path) -> Iterator[tuple[Item, int]]:
    numbers = kept_rounds(run_dir)
    if not numbers:
        raise UserError(f"{run_dir} has no rounds/ with answers; give the run folder of a run in rounds, or a file")
    for number in numbers:
        for one in read_round(run_dir, number):
            answers = [({"role": "assistant", "content": answer.text},) for answer in one.answers]
            tools = one.prompt.record.get("tools")
            where = f"round {number}, {one.prompt.where}"
            names = [f"round {number}"] * len(answers)
            yield _item(one.prompt.messages, answers, names, tools if isinstance(tools, list) else None, where)


def _of_file(path: Path, prompts: Path | None, problems: Problems) -> Iterator[tuple[Item, int]]:
    reader = _RecordReader()
    generated: dict[Any, list[tuple[str, Mapping[str, Any]]]] = {}
    for row in rows(path, problems):
        if isinstance(row.value, Mapping) and all(name in row.value for name in GENERATED):
            generated.setdefault(row.value["number"], []).append((row.where, row.value))
            continue
        try:
            yield reader.read(row.value, row.where)
        except BadRecord as error:
            problems.add(row.where, str(error))
    if generated:
        yield from _of_generated(path, prompts, generated, problems)


class _RecordReader:
    """Reads records that hold a prompt and its answers."""

    def __init__(self) -> None:
        self._prompts, self._turns = PromptReader(), Reader("auto")

    def read(self, record: Any, where: str) -> tuple[Item, int]:
        """The item of a record. Raises BadRecord."""
        if not isinstance(record, Mapping):
            raise BadRecord("is no record with named fields")
        names = NAMES["responses"]
        responses = next((record[name] for name in names if record.get(name) is not None), None)
        if responses is None and record.get("chosen") is not None and record.get("rejected") is not None:
            responses = [record["chosen"], record["rejected"]]
        if responses is None:
            raise BadRecord(f"has no field 'responses'; its fields are {', '.join(map(repr, record)) or 'none'}")
        if not isinstance(responses, (list, tuple)) or not responses:
            raise BadRecord("has 'responses' that are no list of answers")
        prompt = self.prompt(record)
        answers = [self._answer(one, prompt) for one in responses]
        given = record.get("models")
        models = [one.get("model") if isinstance(one, Mapping) else None for one in responses]
        if isinstance(given, (list, tuple)) and len(given) == len(responses):
            models = list(given)
        tools = record.get("tools")
        names_ = [None if name is None else str(name) for name in models]
        return _item(prompt, answers, names_, tools if isinstance(tools, list) else None, where)

    def prompt(self, record: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The messages of a record's prompt. Raises BadRecord."""
        if record.get("prompt") is None and isinstance(record.get("query"), (str, list)):
            record = {**record, "prompt": record["query"]}
        return self._prompts.read(record)

    def _answer(self, value: Any, prompt: Sequence[Any]) -> Messages:
        if isinstance(value, Mapping) and "role" not in value:
            value = next((value[name] for name in ONE_TEXT if value.get(name) is not None), None)
        if isinstance(value, str):
            if not value.strip():
                raise BadRecord("has an empty answer, of which nothing can be seen")
            return ({"role": "assistant", "content": value},)
        if value is None:
            raise BadRecord(f"has a response without {' or '.join(map(repr, ONE_TEXT[:2]))}")
        turns = self._turns.turns([value] if isinstance(value, Mapping) else value, "responses")
        if turns[: len(prompt)] == list(prompt):  # a whole conversation
            turns = turns[len(prompt) :]
        if not any(message["role"] == "assistant" for message in turns):
            raise BadRecord("has an answer without a turn of the assistant")
        return tuple(turns)


def _of_generated(
    path: Path, prompts: Path | None, lines: Mapping[Any, list[tuple[str, Mapping[str, Any]]]], problems: Problems
) -> Iterator[tuple[Item, int]]:
    """Answers of ``generate``, which lie apart, by the number of their prompt."""
    asked = None if prompts is None else list(rows(prompts, problems))
    reader = _RecordReader()
    for number, answers in lines.items():
        where, record = answers[0]
        if not any(record.get(name) is not None for name in QUESTIONS):
            if asked is None:
                raise UserError(
                    f"{path} has answers of `llm-parallel generate` without their prompts; give the file that was "
                    "answered with --prompts"
                )
            if not isinstance(number, int) or not 0 <= number < len(asked):
                problems.add(where, f"answers prompt {number!r}, and {prompts} has {some(len(asked), 'prompt')}")
                continue
            record = asked[number].value
        try:
            prompt = reader.prompt(record)
            texts = [str(line["text"]) for _, line in sorted(answers, key=lambda one: one[1]["sample"])]
            whole = {"prompt": prompt, "responses": texts, "tools": record.get("tools")}
            yield reader.read(whole, where)
        except (BadRecord, TypeError) as error:
            problems.add(where, str(error))
