"""Writes one shard of ``prepare``: turns text into tokens in a folder of parts, in a process of its own.

A shard is done when its record ``NUMBER.json`` exists, which is written after its tokens and lengths. Imports neither
torch nor the configuration, so that a worker starts in a fifth of a second.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_parallel.data.indexed import token_dtype
from llm_parallel.data.inputs import Losses, Piece, documents
from llm_parallel.data.tokenizer import Tokenizer, load_tokenizer
from llm_parallel.errors import UserError
from llm_parallel.files import atomic_write

BATCH_CHARACTERS = 1 << 20
MAX_TOKENS = (1 << 31) - 1


@dataclass(frozen=True)
class ShardRecord:
    """What a finished shard holds. ``input_bytes`` is its size on disk, ``text_bytes`` its text in UTF-8; ``bad``,
    ``first``, ``damaged`` and ``skipped`` are those of ``inputs.Losses``."""

    documents: int
    tokens: int
    text_bytes: int
    input_bytes: int
    empty: int
    bad: int
    first: list[tuple[str, str | int, str]]
    damaged: list[str]
    skipped: list[tuple[str, str]]


@dataclass(frozen=True)
class ShardWriter:
    """How shards are written: into folder ``parts``, with the tokenizer at ``tokenizer``. ``bos`` is the token that
    begins every document, if one does; with ``strict`` the first bad record is a UserError."""

    parts: Path
    tokenizer: str
    key: str
    append_eod: bool
    bos: int | None = None
    strict: bool = False

    def path(self, number: int, ending: str) -> Path:
        """File of a shard: ``bin`` (tokens), ``len`` (int32 lengths of its documents) or ``json`` (its record)."""
        return self.parts / f"{number:06d}.{ending}"

    def record(self, number: int) -> ShardRecord | None:
        """The record of a shard that is done, else None."""
        try:
            return ShardRecord(**json.loads(self.path(number, "json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None

    def write(self, number: int, pieces: list[Piece], tokenizer: Tokenizer) -> ShardRecord:
        """Tokenises one shard. Raises UserError on a document that is too long, and on bad input if ``strict``."""
        losses = Losses(self.strict)
        lengths: list[NDArray[np.int32]] = []
        tokens = text_bytes = 0
        with atomic_write(self.path(number, "bin"), "wb") as handle:
            for texts in _batches(pieces, self.key, losses):
                ids, held = self._tokenise(texts, tokenizer)
                handle.write(ids)
                lengths.append(held)
                tokens += len(ids)
                text_bytes += sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
        counts = np.concatenate(lengths) if lengths else np.zeros(0, np.int32)
        with atomic_write(self.path(number, "len"), "wb") as handle:
            handle.write(counts)
        record = ShardRecord(
            len(counts),
            tokens,
            text_bytes,
            sum(piece.end - piece.start for piece in pieces),
            losses.empty,
            losses.bad,
            losses.first,
            losses.damaged,
            losses.skipped,
        )
        with atomic_write(self.path(number, "json")) as handle:
            json.dump(asdict(record), handle)
        return record

    def _tokenise(self, texts: list[str], tokenizer: Tokenizer) -> tuple[NDArray[Any], NDArray[np.int32]]:
        """Tokens of all texts in the file's type, and how many each has."""
        parts = tokenizer.encode_batch(texts)
        lengths = np.array([len(part) for part in parts], np.int64)
        before = [np.array([self.bos], np.int32)] if self.bos is not None else []
        after = [np.array([tokenizer.eod], np.int32)] if self.append_eod else []
        if before or after:
            parts = [part for ids in parts for part in (*before, ids, *after)]
            lengths += len(before) + len(after)
        if lengths.max() > MAX_TOKENS:
            raise UserError(f"a document has {lengths.max()} tokens, more than the {MAX_TOKENS} that an index can hold")
        return np.concatenate(parts).astype(token_dtype(tokenizer.vocab_size)), lengths.astype(np.int32)


def _batches(pieces: list[Piece], key: str, losses: Losses) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for piece in pieces:
        for text in documents(piece, key, losses):
            batch.append(text)
            size += len(text)
            if size >= BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


_worker: tuple[ShardWriter, Tokenizer]
"""Writer and tokenizer of a worker process, which serves one ``prepare`` only."""


def start_worker(writer: ShardWriter) -> None:
    """Starts a worker process: loads the tokenizer, and makes the process end when its parent ends."""
    global _worker
    end_with_parent()
    _worker = writer, load_tokenizer(writer.tokenizer)


def work(number: int, pieces: list[Piece]) -> ShardRecord:
    """Tokenises a shard in a worker process."""
    writer, tokenizer = _worker
    return writer.write(number, pieces, tokenizer)


def end_with_parent() -> None:
    """Makes this process, which serves a pool, end when its parent ends."""
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: Any) -> None:
    # A pool's workers wait for more work for ever if their parent is killed.
    connection.wait([sentinel])
    os._exit(1)
