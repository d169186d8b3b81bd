"""Reads preferences, renders and encodes them, and writes them as files of tokens: once, in the process that starts a
run. ``group_data.py`` says what the files are."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_parallel.config.tree import RunConfig
from llm_parallel.data.chat import ChatEncoder
from llm_parallel.data.chat_files import (
    blocks_of,
    opened_sources,
    refuse_empty,
    settings_of,
    write_report,
    written_once,
)
from llm_parallel.data.chat_open import open_encoder
from llm_parallel.data.chat_rows import encoded
from llm_parallel.data.dataset_info import Opened
from llm_parallel.data.group_data import COLUMNS, GroupData
from llm_parallel.data.group_rows import GroupCounts, described_groups, encode_groups
from llm_parallel.data.indexed import token_dtype, write_index
from llm_parallel.data.prepare import file_errors_explained
from llm_parallel.errors import UserError

VERSION = 3


def prepare_groups(
    config: RunConfig, notice: Callable[[str], None] = lambda _: None, workers: int | None = None
) -> GroupData:
    """Reads, renders and encodes the preferences of ``config.chat`` for the run's method, unless the run folder has
    them already, and opens them. ``notice`` is told what was recognised and left out; ``workers``: processes that
    encode (None: all cores for large files).

    Raises UserError on what cannot be read, on a template that refuses a conversation, and if nothing is left to train
    on."""
    chat = config.chat
    if not chat.train:
        raise UserError("chat.train is empty; give at least one file of preferences")
    if config.data.tokenizer is None:
        raise UserError("data.tokenizer is not given; give the tokenizer of the model")
    encoder = open_encoder(config)
    with file_errors_explained(Path(config.run_dir) / "data", kept=""):
        opened = opened_sources(chat, preferences=True)
        settings = {**settings_of(config, encoder, opened), "method": config.trains, "groups": VERSION}
        folder = written_once(
            config, settings, lambda making: _write(making, config, encoder, opened, settings, workers)
        )
    data = GroupData.open(folder)
    for text in (*(text for source in opened for text in source.notices), *described_groups(data.report)):
        notice(text)
    if data.method == "kto" and 0 in data.liked:
        kind, other = ("liked", "not liked") if data.liked[0] else ("not liked", "liked")
        notice(
            f"all {sum(data.liked):,} answers to train on are {kind}, and kto compares both kinds; add answers that "
            f"were {other}"
        )
    return data


def _write(
    making: Path,
    config: RunConfig,
    encoder: ChatEncoder,
    opened: Sequence[Opened],
    settings: dict[str, Any],
    workers: int | None,
) -> None:
    """Writes everything into the folder ``making``."""
    counts = [GroupCounts() for _ in opened]
    dtype = token_dtype(encoder.tokenizer.tokenizer.vocab_size)
    lengths: list[NDArray[np.int32]] = []
    groups = 0
    with ExitStack() as stack:
        out = {name: stack.enter_context((making / f"{name}.bin").open("wb")) for name in ("tokens", *COLUMNS)}

        def write(name: str, values: Any) -> None:
            out[name].write(np.asarray(values, COLUMNS[name]).tobytes())

        for number, source in enumerate(opened):
            for block in blocks_of(config, number, encoded(source, config, encoder, workers, encode_groups)):
                counts[number].merge(block.counts)
                for line, group in block.kept:
                    size = len(group.answers)
                    out["tokens"].write(np.concatenate([one.ids for one in group.answers]).astype(dtype).tobytes())
                    write("weights", np.concatenate([one.weights for one in group.answers]))
                    write("sources", [number] * size)
                    write("lines", [line] * size)
                    write("groups", [groups] * size)
                    write("scores", group.scores)
                    write("margins", [group.margin] * size)
                    lengths.append(np.array([len(one.ids) for one in group.answers], np.int32))
                    groups += 1
        for handle in out.values():
            handle.flush()
            os.fsync(handle.fileno())
    refuse_empty(config.chat, counts, config.data.seq_length_tokens)
    with (making / "tokens.idx").open("wb") as index:
        write_index(index.write, dtype, lengths)
        index.flush()
        os.fsync(index.fileno())
    write_report(making, settings, encoder, counts)
