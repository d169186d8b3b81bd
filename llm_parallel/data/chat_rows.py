"""Records of one source, encoded in their order: in this process, or, where there are many, in several."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context
from typing import Any, TypeAlias

from llm_parallel.config.tree import RunConfig
from llm_parallel.data.chat import ChatEncoder, ChatTokens, holds_private
from llm_parallel.data.chat_counts import Counts
from llm_parallel.data.chat_open import open_encoder
from llm_parallel.data.dataset_info import Opened
from llm_parallel.data.formats import BadRecord, Reader
from llm_parallel.data.preference import was_disliked
from llm_parallel.data.readers import Problems, Row, first_rows
from llm_parallel.data.shards import end_with_parent
from llm_parallel.data.template import Refused
from llm_parallel.errors import UserError

Encode: TypeAlias = Callable[[Opened, RunConfig, ChatEncoder, Sequence[tuple[int, Row]]], Any]
"""Makes a block of some records of a source; a function at the top level of a module, as processes need it."""
ROWS = 256
"""Records that a process encodes at a time."""
BYTES_FOR_PROCESSES = 32 << 20
"""Size of a source from which on it is worth starting processes; one encodes about 1.5 MB/s."""
WAITING = 3
"""Blocks of records in flight for each process."""


@dataclass
class Block:
    """Number in the source and tokens of each conversation that is kept, and what became of all records."""

    kept: list[tuple[int, ChatTokens]] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)


def encoded(
    source: Opened,
    config: RunConfig,
    encoder: ChatEncoder,
    workers: int | None = None,
    encode: Encode | None = None,
) -> Iterator[Any]:
    """The conversations of a source in order, block by block, encoded by ``workers`` processes (None: as many as there
    are cores, if the source is large). ``encode``: what makes a block of records, ``encode_block`` if it is not given.
    Raises UserError on a record that the template refuses."""
    unread, encode = Block(), encode or encode_block
    blocks = _blocks(source, unread.counts)
    size = sum(path.stat().st_size for path in source.files)
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if size >= BYTES_FOR_PROCESSES else 1
    if workers > 1:
        yield from _in_processes((source, config, encode), blocks, workers)
    else:
        for block in blocks:
            yield encode(source, config, encoder, block)
    yield unread


def encode_block(source: Opened, config: RunConfig, encoder: ChatEncoder, block: Sequence[tuple[int, Row]]) -> Block:
    """Encodes some records. Raises UserError on one that the template refuses."""
    reader, found = Reader(source.format, source.columns, source.roles), Block()
    limit, cut = config.data.seq_length_tokens + 1, config.chat.too_long == "cut"
    for number, row in block:
        found.counts.records += 1
        try:
            conversation = reader.read(row.value)
            if holds_private(conversation):
                raise BadRecord("holds characters of Unicode's last private range (U+100000 to U+10FFFF)")
        except BadRecord as error:
            found.counts.broken(row.where, str(error))
            continue
        if was_disliked(row.value):
            found.counts.disliked += 1
            continue
        try:
            tokens = encoder.encode_within(conversation, limit, cut)
        except Refused as error:
            raise UserError(
                f"the chat template ({encoder.template.origin}) refuses {row.where}: {error}; mend or remove that "
                "record, or give another chat.template"
            ) from None
        if found.counts.add(tokens, conversation, encoder):
            assert tokens is not None
            if not tokens.answer_cut and int(tokens.ids[-1]) not in encoder.stops:
                refuse_stop(encoder, tokens, row.where)
            found.kept.append((number, tokens))
    found.counts.formats, found.counts.others_weighted = reader.found, reader.asked_for_others
    return found


def _blocks(source: Opened, counts: Counts) -> Iterator[list[tuple[int, Row]]]:
    read = enumerate(first_rows(source.files, _Problems(counts), source.limit))
    # Records that cannot be read are counted before the next one comes, and have numbers too.
    found = ((number + counts.records, row) for number, row in read)
    while block := list(islice(found, ROWS)):
        yield block


class _Problems(Problems):
    """Records that cannot be read, as records of their source."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts

    def add(self, where: str, reason: str) -> None:
        self._counts.records += 1
        self._counts.broken(where, reason)


def _in_processes(
    work: tuple[Opened, RunConfig, Encode], blocks: Iterator[list[tuple[int, Row]]], workers: int
) -> Iterator[Any]:
    """Blocks in order. No more are read than the processes are about to need: a source may be larger than memory."""
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, work)
    waiting: deque[Future[Any]] = deque()
    try:
        for block in blocks:
            waiting.append(pool.submit(_work, block))
            if len(waiting) >= WAITING * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a process that encodes conversations was killed (out of memory?); start again with fewer cores (taskset)"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker: tuple[Encode, Opened, RunConfig, ChatEncoder]
"""What a process encodes, and with what."""


def _start(source: Opened, config: RunConfig, encode: Encode) -> None:
    global _worker
    end_with_parent()
    _worker = encode, source, config, open_encoder(config)


def _work(block: list[tuple[int, Row]]) -> Any:
    encode, source, config, encoder = _worker
    return encode(source, config, encoder, block)


def refuse_stop(encoder: ChatEncoder, tokens: ChatTokens, where: str) -> None:
    """Raises UserError about an answer whose last token does not stop the model."""
    last = int(tokens.ids[-1])
    stops = ", ".join(encoder.tokenizer.name_of(number) or str(number) for number in encoder.stops)
    raise UserError(
        f"the answer of {where} ends with {encoder.tokenizer.tokenizer.decode([last])!r} (token {last}), which does "
        f"not stop the model: {stops} does; let {encoder.template.origin} write it within the answer"
    )
