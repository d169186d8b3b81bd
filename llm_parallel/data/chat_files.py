"""Reads conversations, renders and encodes them, and writes them as files of tokens: once, in the process that starts a
run. ``chat_data.py`` says what the files are."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_parallel.config.tree import RunConfig
from llm_parallel.config.tree_tune import ChatConfig, ChatSource
from llm_parallel.data.chat import ChatEncoder, ChatTokens, holds_private
from llm_parallel.data.chat_counts import Counts, described
from llm_parallel.data.chat_data import REPORT, ChatData
from llm_parallel.data.chat_tokens import ChatTokenizer
from llm_parallel.data.dataset_info import Opened, open_source
from llm_parallel.data.formats import BadRecord, Reader
from llm_parallel.data.indexed import token_dtype, write_index
from llm_parallel.data.prepare import file_errors_explained
from llm_parallel.data.readers import Problems, rows
from llm_parallel.data.template import DATE, ChatTemplate, Refused, chatml, own_template
from llm_parallel.data.tokenizer import load_tokenizer
from llm_parallel.errors import UserError
from llm_parallel.files import atomic_write, open_own

VERSION = 1


def prepare_conversations(config: RunConfig, notice: Callable[[str], None] = lambda _: None) -> ChatData:
    """Reads, renders and encodes the conversations of ``config.chat``, unless the run folder has them already, and
    opens them. ``notice`` is told what was recognised, cut and left out.

    Raises UserError on what cannot be read, on a template that refuses a conversation, and if nothing is left to train
    on."""
    chat = config.chat
    if not chat.train:
        raise UserError("chat.train is empty; give at least one file of conversations")
    if config.data.tokenizer is None:
        raise UserError("data.tokenizer is not given; give the tokenizer of the model")
    encoder = open_encoder(config)
    with file_errors_explained(Path(config.run_dir) / "data"):
        opened = [open_source(source) for source in (*chat.train, *chat.eval)]
        settings = _settings(config, encoder, opened)
        name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        folder = Path(config.run_dir) / "data" / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _turn(folder.parent / ".lock"):
            if not (folder / REPORT).is_file():
                _write(folder, config, encoder, opened, settings)
    data = ChatData.open(folder)
    for text in (*(text for source in opened for text in source.notices), *described(data.report)):
        notice(text)
    return data


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """One process after the other: those of one job under torchrun or srun all prepare, and the first one does it."""
    fd = open_own(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def open_encoder(config: RunConfig) -> ChatEncoder:
    """The encoder of a configuration: its tokenizer and template. Raises UserError."""
    assert config.data.tokenizer is not None
    tokenizer = ChatTokenizer(load_tokenizer(config.data.tokenizer))
    return ChatEncoder(tokenizer, open_template(config.chat, tokenizer), config.chat.train_on, config.chat.system)


def open_template(chat: ChatConfig, tokenizer: ChatTokenizer) -> ChatTemplate:
    """The template that ``chat.template`` names, else the tokenizer's own, else ChatML. Raises UserError."""
    day = DATE
    if chat.date is not None:
        try:
            day = date.fromisoformat(chat.date)
        except ValueError:
            raise UserError(f"chat.date = {chat.date!r} is no date; give one such as 2026-01-31") from None
    source: tuple[str, str] | None
    if chat.template not in (None, "chatml"):
        try:
            source = Path(chat.template).read_text(encoding="utf-8"), chat.template
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise UserError(
                f"chat.template = {chat.template} cannot be read: {reason}; give a file with a Jinja template, or "
                "chatml"
            ) from None
    else:
        source = own_template(tokenizer.folder) if chat.template is None else None
    if source is None:
        begin, end = turn_tokens(tokenizer)
        source = chatml(begin, end), f"ChatML with {begin} and {end}"
    return ChatTemplate(*source, tokenizer.variables, day)


def turn_tokens(tokenizer: ChatTokenizer) -> tuple[str, str]:
    """The tokens with which ChatML begins and ends a turn: its own, if the tokenizer has them, else those that begin
    and end a text. No row of the embedding is added for it."""
    if "<|im_start|>" in tokenizer.added and "<|im_end|>" in tokenizer.added:
        return "<|im_start|>", "<|im_end|>"
    end = tokenizer.name_of(tokenizer.eos)
    if end is None:
        raise UserError(
            f"tokenizer {tokenizer.tokenizer.name} has no special token that could end an answer; give chat.template"
        )
    return tokenizer.variables.get("bos_token", end), end


def _settings(config: RunConfig, encoder: ChatEncoder, opened: Sequence[Opened]) -> dict[str, Any]:
    """All that the content of the folder depends on."""
    chat, template = config.chat, encoder.template
    return {
        "version": VERSION,
        "files": [[[path.name, _digest(path)] for path in source.files] for source in opened],
        "sources": [[source.format, source.columns.model_dump(), dict(source.roles)] for source in opened],
        "source_names": _names(chat.train),
        "weights": [source.weight for source in chat.train],
        "eval_fraction": 0.0 if chat.eval else chat.eval_fraction,
        "packing": chat.packing,
        "tokenizer_fingerprint": encoder.tokenizer.tokenizer.fingerprint,
        "variables": encoder.tokenizer.variables,
        "template": template.source,
        "date": chat.date or DATE.isoformat(),
        "system": chat.system,
        "train_on": chat.train_on,
        "too_long": chat.too_long,
        "seq_length": config.data.seq_length_tokens,
    }


def _write(
    folder: Path, config: RunConfig, encoder: ChatEncoder, opened: Sequence[Opened], settings: dict[str, Any]
) -> None:
    making = folder.with_name(f"{folder.name}.making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    sources = (*config.chat.train, *config.chat.eval)
    counts = [Counts() for _ in sources]
    dtype = token_dtype(encoder.tokenizer.tokenizer.vocab_size)
    lengths: list[NDArray[np.int32]] = []
    with ExitStack() as stack:
        names = ("tokens", "weights", "sources", "lines")
        out = {name: stack.enter_context((making / f"{name}.bin").open("wb")) for name in names}
        block: list[int] = []
        for number, source in enumerate(opened):
            for line, tokens in _encoded(source, encoder, config, counts[number]):
                out["tokens"].write(tokens.ids.astype(dtype).tobytes())
                out["weights"].write(tokens.weights.tobytes())
                out["sources"].write(np.int32(number).tobytes())
                out["lines"].write(np.int64(line).tobytes())
                block.append(len(tokens.ids))
                if len(block) == 1 << 16:
                    lengths.append(np.array(block, np.int32))
                    block = []
        lengths.append(np.array(block, np.int32))
        for handle in out.values():
            handle.flush()
            os.fsync(handle.fileno())
    _refuse_empty(config.chat, counts, config.data.seq_length_tokens)
    with (making / "tokens.idx").open("wb") as index:
        write_index(index.write, dtype, lengths)
        index.flush()
        os.fsync(index.fileno())
    report = {
        **settings,
        "tokenizer": str(Path(encoder.tokenizer.tokenizer.name).resolve()),
        "template_origin": encoder.template.origin,
        "pad": encoder.tokenizer.pad,
        "stops": list(encoder.stops),
        "stop_names": [encoder.tokenizer.name_of(number) or str(number) for number in encoder.stops],
        "declared_stops": list(encoder.declared),
        "paths": [source.path for source in sources],
        "counts": [count.as_dict() for count in counts],
    }
    with atomic_write(making / REPORT) as text:
        json.dump(report, text, indent=1, ensure_ascii=False)
    shutil.rmtree(folder, ignore_errors=True)
    making.rename(folder)


def _encoded(
    source: Opened, encoder: ChatEncoder, config: RunConfig, counts: Counts
) -> Iterator[tuple[int, ChatTokens]]:
    """Number of the record and tokens of each conversation that is kept."""
    reader, problems = Reader(source.format, source.columns, source.roles), _Problems(counts)
    limit = config.data.seq_length_tokens + 1
    found = (row for path in source.files for row in rows(path, problems))
    for number, row in enumerate(found):
        counts.records += 1
        try:
            conversation = reader.read(row.value)
            if holds_private(conversation):
                raise BadRecord("holds characters of Unicode's last private range (U+100000 to U+10FFFF)")
        except BadRecord as error:
            counts.broken(row.where, str(error))
            continue
        try:
            tokens = encoder.encode_within(conversation, limit, config.chat.too_long == "cut")
        except Refused as error:
            raise UserError(
                f"the chat template ({encoder.template.origin}) refuses {row.where}: {error}; mend or remove that "
                "record, or give another chat.template"
            ) from None
        counts.formats = reader.found
        if counts.add(tokens, conversation, encoder):
            assert tokens is not None
            if not tokens.answer_cut and int(tokens.ids[-1]) not in encoder.stops:
                _refuse_stop(encoder, tokens, row.where)
            yield number, tokens


class _Problems(Problems):
    """Records that cannot be read, as records of their source."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts

    def add(self, where: str, reason: str) -> None:
        self._counts.records += 1
        self._counts.broken(where, reason)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _names(sources: Sequence[ChatSource]) -> list[str]:
    """Short names of sources, each different."""
    names = [source.dataset or Path(source.path).name.split(".")[0] or source.path for source in sources]
    return [name if names.count(name) == 1 else f"{name}-{n + 1}" for n, name in enumerate(names)]


def _refuse_empty(chat: ChatConfig, counts: Sequence[Counts], seq_length: int) -> None:
    for place, (source, count) in enumerate(zip((*chat.train, *chat.eval), counts)):
        if count.kept:
            continue
        split, index = ("train", place) if place < len(chat.train) else ("eval", place - len(chat.train))
        raise UserError(f"chat.{split}.{index}.path = {source.path} {count.why_empty(seq_length)}")


def _refuse_stop(encoder: ChatEncoder, tokens: ChatTokens, where: str) -> None:
    last = int(tokens.ids[-1])
    stops = ", ".join(encoder.tokenizer.name_of(number) or str(number) for number in encoder.stops)
    raise UserError(
        f"the answer of {where} ends with {encoder.tokenizer.tokenizer.decode([last])!r} (token {last}), which does "
        f"not stop the model: {stops} does; let {encoder.template.origin} write it within the answer"
    )
