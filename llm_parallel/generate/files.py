"""Files of prompts: what their lines mean, and what is written about each answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_parallel.config.tree import RunConfig
from llm_parallel.data.chat import ChatEncoder
from llm_parallel.data.chat_open import open_encoder
from llm_parallel.data.template import Refused
from llm_parallel.data.tokenizer import Tokenizer
from llm_parallel.errors import UserError
from llm_parallel.generate.answer import Answer
from llm_parallel.generate.requests import Finished, Request, check_fits
from llm_parallel.generate.sampling import Sampling
from llm_parallel.generate.structure import Structure


@dataclass(frozen=True)
class FileJob:
    """source: JSON lines, each with ``prompt`` (a text), ``prompt_tokens`` (token ids) or ``messages`` (a conversation,
    with ``tools`` if it has any), and an ``id`` if wanted; target: where the answers go; samples: answers to each;
    best_of: as in ``Request``; structure: the form of all answers."""

    source: Path
    target: Path
    sampling: Sampling
    stop: tuple[str, ...] = ()
    samples: int = 1
    best_of: int | None = None
    max_running: int = 32
    structure: Structure | None = None

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError(f"samples is {self.samples}; it must be at least 1")

    def fingerprint(self, checkpoint: str) -> str:
        """What tells answers of this job from those of others."""
        settings: list[Any] = [checkpoint, asdict(self.sampling), self.stop, self.samples]
        if self.best_of is not None:
            settings.append({"best_of": self.best_of})
        if self.structure is not None:
            settings.append(asdict(self.structure))
        digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=8)
        digest.update(self.source.read_bytes())
        return digest.hexdigest()


class PromptReader:
    """Turns lines of a file into requests to the model of a configuration. ``begin``: tokens before a plain text;
    ``ends``: tokens that end answers."""

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, begin: Sequence[int], ends: frozenset[int]) -> None:
        self._config, self.tokenizer, self._begin, self._ends = config, tokenizer, tuple(begin), ends
        self._encoder: ChatEncoder | None = None

    def request(self, record: Any, where: str, job: FileJob, number: int) -> Request:
        """The request of one line. Raises UserError that begins with ``where``."""
        if not isinstance(record, dict):
            raise UserError(f"{where} is no JSON object; give one with prompt, prompt_tokens or messages")
        given = [name for name in ("prompt", "prompt_tokens", "messages") if name in record]
        if len(given) != 1:
            found = " and ".join(given) if given else f"only {', '.join(map(repr, record)) or 'nothing'}"
            raise UserError(f"{where} has {found}; give one of prompt, prompt_tokens and messages")
        prompt, ends = getattr(self, f"_{given[0]}")(record, where), self._ends
        if given[0] == "messages":
            ends = ends | frozenset(self._chat().stops)
        model = self._config.model
        more: dict[str, Any] = {"structure": job.structure, "best_of": job.best_of}
        request = Request(number, prompt, job.sampling, ends, job.stop, job.samples, **more)
        assert model.vocab_size is not None
        try:
            check_fits(request, model.max_seq_length_tokens, model.max_seq_length_tokens, model.vocab_size)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        return request

    def _prompt(self, record: dict[str, Any], where: str) -> tuple[int, ...]:
        text = record["prompt"]
        if not isinstance(text, str):
            raise UserError(f"prompt in {where} is {json.dumps(text)[:80]}; it must be a text")
        tokens = (*self._begin, *map(int, self.tokenizer.encode(text)))
        if not tokens:
            raise UserError(f"prompt in {where} is empty, and the model begins no text with a token; give a text")
        return tokens

    def _prompt_tokens(self, record: dict[str, Any], where: str) -> tuple[int, ...]:
        tokens = record["prompt_tokens"]
        if not isinstance(tokens, list) or not tokens or not all(type(token) is int for token in tokens):
            raise UserError(f"prompt_tokens in {where} is {json.dumps(tokens)[:80]}; it must be a list of token ids")
        return tuple(tokens)

    def _messages(self, record: dict[str, Any], where: str) -> tuple[int, ...]:
        messages = record["messages"]
        if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
            raise UserError(f"messages in {where} is {json.dumps(messages)[:80]}; it must be a list of messages")
        tools = record.get("tools")
        if tools is not None and not (isinstance(tools, list) and all(isinstance(one, dict) for one in tools)):
            raise UserError(f"tools in {where} is {json.dumps(tools)[:80]}; it must be a list of tools")
        try:
            return tuple(map(int, self._chat().prompt(messages, tools)))
        except Refused as error:
            raise UserError(f"messages in {where} cannot be written by the chat template: {error}") from None

    def _chat(self) -> ChatEncoder:
        if self._encoder is None:
            self._encoder = open_encoder(self._config)
        return self._encoder


def read_source(path: Path) -> Iterator[tuple[str, Any]]:
    """Place and content of each line that is not blank. Raises UserError for a file or line that cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"input {path} cannot be read: {reason}; give a file of JSON lines") from None
    if not any(map(str.strip, lines)):
        raise UserError(f"input {path} holds no prompts; give a file of JSON lines")
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield f"line {number} of {path}", json.loads(line)
            except ValueError as error:
                raise UserError(f"line {number} of {path} is no JSON: {error}") from None


def answer_line(answer: Finished, request: Request, record: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """What is written about an answer; its text is without the token or the text that ended it."""
    text = Answer(tokenizer, request.prompt, request.stop)
    for token in answer.tokens[: -1 if answer.tokens and answer.tokens[-1] in request.ends else None]:
        text.add(token)
    line: dict[str, Any] = {}
    if "id" in record:
        line["id"] = record["id"]
    line |= {"text": text.text(), "reason": answer.reason.value, "truncated": answer.truncated}
    line |= {"tokens": answer.tokens, "log_probs": answer.log_probs}
    if request.sampling.top_log_probs:
        line["top"] = answer.top
    return line
