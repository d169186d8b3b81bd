"""Reads conversations, renders and encodes them, and writes them as files of tokens: once, in the process that starts a
run. ``chat_data.py`` says what the files are."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_parallel.config.tree import RunConfig
from llm_parallel.config.tree_tune import ChatConfig, ChatSource
from llm_parallel.data.chat import ChatEncoder
from llm_parallel.data.chat_counts import Counts, described
from llm_parallel.data.chat_data import REPORT, ChatData
from llm_parallel.data.chat_open import open_encoder
from llm_parallel.data.chat_rows import encoded
from llm_parallel.data.dataset_info import PREFERRED, Opened, open_source
from llm_parallel.data.indexed import token_dtype, write_index
from llm_parallel.data.prepare import file_errors_explained
from llm_parallel.data.template import DATE
from llm_parallel.errors import UserError
from llm_parallel.files import atomic_write, folder_in_whole, sha256_of, turn

VERSION = 3


def prepare_conversations(
    config: RunConfig, notice: Callable[[str], None] = lambda _: None, workers: int | None = None
) -> ChatData:
    """Reads, renders and encodes the conversations of ``config.chat``, unless the run folder has them already, and
    opens them. ``notice`` is told what was recognised, cut and left out; ``workers``: processes that encode (None: all
    cores for large files).

    Raises UserError on what cannot be read, on a template that refuses a conversation, and if nothing is left to train
    on."""
    chat = config.chat
    if not chat.train:
        raise UserError("chat.train is empty; give at least one file of conversations")
    if config.data.tokenizer is None:
        raise UserError("data.tokenizer is not given; give the tokenizer of the model")
    encoder = open_encoder(config)
    with file_errors_explained(Path(config.run_dir) / "data", kept=""):
        opened = opened_sources(chat)
        settings = settings_of(config, encoder, opened)
        folder = written_once(
            config, settings, lambda making: _write(making, config, encoder, opened, settings, workers)
        )
    data = ChatData.open(folder)
    for text in (*(text for source in opened for text in source.notices), *described(data.report)):
        notice(text)
    return data


def opened_sources(chat: ChatConfig, preferences: bool = False) -> list[Opened]:
    """The files of all sources of conversations, or of ``preferences``, those of training first. Raises UserError that
    names the field of one that is not there."""
    opened = []
    for number, one in enumerate((*chat.train, *chat.eval)):
        with named_source(chat, number):
            source = open_source(one, preferences)
            limits = [limit for limit in (source.limit, chat.max_records) if limit is not None]
            opened.append(replace(source, limit=min(limits, default=None)))
    return opened


def written_once(config: RunConfig, settings: dict[str, Any], write: Callable[[Path], None]) -> Path:
    """The folder of the run that has the content which ``settings`` say; ``write`` makes it if it is not there."""
    # The same tokenizer may lie elsewhere, as beside a newer checkpoint of the model that is fine-tuned.
    content = {key: value for key, value in settings.items() if key != "tokenizer"}
    name = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(config.run_dir) / "data" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Processes of one job under torchrun or srun all come here, and the first one does it.
    with turn(folder.parent / ".lock"):
        if not (folder / REPORT).is_file():
            shutil.rmtree(folder, ignore_errors=True)  # without a report it is not whole
            with folder_in_whole(folder) as making:
                write(making)
        _point_to_tokenizer(folder / REPORT, settings["tokenizer"])
    return folder


def _columns(source: Opened) -> dict[str, str | None]:
    """Names of fields; those of preferences only where they are given, since conversations do not depend on them."""
    named = source.columns.model_dump()
    return {field: name for field, name in named.items() if name is not None or field not in PREFERRED}


def _point_to_tokenizer(path: Path, tokenizer: str) -> None:
    """Writes where the tokenizer is into a report that says otherwise; one that cannot be read is refused later."""
    with suppress(OSError, ValueError):
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["tokenizer"] != tokenizer:
            with atomic_write(path) as handle:
                json.dump(report | {"tokenizer": tokenizer}, handle, indent=1, ensure_ascii=False)


def settings_of(config: RunConfig, encoder: ChatEncoder, opened: Sequence[Opened]) -> dict[str, Any]:
    """All that the content of the folder depends on."""
    chat, template = config.chat, encoder.template
    return {
        "version": VERSION,
        "files": [[[path.name, sha256_of(path)] for path in source.files] for source in opened],
        "sources": [[source.format, _columns(source), dict(source.roles)] for source in opened],
        "paths": [
            source.path if source.dataset is None else f"{source.path}: {source.dataset}"
            for source in (*chat.train, *chat.eval)
        ],
        "source_names": _names(chat.train),
        "weights": [source.weight for source in chat.train],
        "eval_fraction": 0.0 if chat.eval else chat.eval_fraction,
        "packing": chat.packing,
        "tokenizer": str(Path(encoder.tokenizer.tokenizer.name).resolve()),
        "tokenizer_fingerprint": encoder.tokenizer.tokenizer.fingerprint,
        "declared_stops": list(encoder.declared),
        "variables": encoder.tokenizer.variables,
        "template": template.source,
        "date": chat.date or DATE.isoformat(),
        "system": chat.system,
        "train_on": chat.train_on,
        "too_long": chat.too_long,
        "seq_length": config.data.seq_length_tokens,
        **({"limits": [source.limit for source in opened]} if any(source.limit for source in opened) else {}),
    }


def _write(
    making: Path,
    config: RunConfig,
    encoder: ChatEncoder,
    opened: Sequence[Opened],
    settings: dict[str, Any],
    workers: int | None,
) -> None:
    """Writes everything into the folder ``making``."""
    sources = (*config.chat.train, *config.chat.eval)
    counts = [Counts() for _ in sources]
    dtype = token_dtype(encoder.tokenizer.tokenizer.vocab_size)
    lengths: list[NDArray[np.int32]] = []
    with ExitStack() as stack:
        names = ("tokens", "weights", "sources", "lines")
        out = {name: stack.enter_context((making / f"{name}.bin").open("wb")) for name in names}
        for number, source in enumerate(opened):
            for block in blocks_of(config, number, encoded(source, config, encoder, workers)):
                counts[number].merge(block.counts)
                if not block.kept:
                    continue
                lines, held = zip(*block.kept)
                out["tokens"].write(np.concatenate([tokens.ids for tokens in held]).astype(dtype).tobytes())
                out["weights"].write(np.concatenate([tokens.weights for tokens in held]).tobytes())
                out["sources"].write(np.full(len(held), number, np.int32).tobytes())
                out["lines"].write(np.array(lines, np.int64).tobytes())
                lengths.append(np.array([len(tokens.ids) for tokens in held], np.int32))
        for handle in out.values():
            handle.flush()
            os.fsync(handle.fileno())
    refuse_empty(config.chat, counts, config.data.seq_length_tokens)
    with (making / "tokens.idx").open("wb") as index:
        write_index(index.write, dtype, lengths)
        index.flush()
        os.fsync(index.fileno())
    write_report(making, settings, encoder, counts)


def write_report(making: Path, settings: dict[str, Any], encoder: ChatEncoder, counts: Sequence[Counts]) -> None:
    """Writes ``report.json``, the last file of a folder."""
    report = {
        **settings,
        "template_origin": encoder.template.origin,
        "pad": encoder.tokenizer.pad,
        "stops": list(encoder.stops),
        "stop_names": [encoder.tokenizer.name_of(number) or str(number) for number in encoder.stops],
        "remarks": encoder.remarks(),
        "counts": [count.as_dict() for count in counts],
    }
    with atomic_write(making / REPORT) as text:
        json.dump(report, text, indent=1, ensure_ascii=False)


def _field(chat: ChatConfig, number: int) -> str:
    """The name of a source's field in the run file, by the number among all sources."""
    split, index = ("train", number) if number < len(chat.train) else ("eval", number - len(chat.train))
    return f"chat.{split}.{index}.path"


@contextmanager
def named_source(chat: ChatConfig, number: int) -> Iterator[None]:
    """Puts the field of a source before what is wrong about its file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{_field(chat, number)}: {error}") from None


def blocks_of(config: RunConfig, number: int, blocks: Iterator[Any]) -> Iterator[Any]:
    """The blocks of source ``number``; what is wrong about one of them names the source's field."""
    with named_source(config.chat, number):
        yield from blocks


def _names(sources: Sequence[ChatSource]) -> list[str]:
    """Short names of sources, each different."""
    names = [source.dataset or Path(source.path).name.split(".")[0] or source.path for source in sources]
    return [name if names.count(name) == 1 else f"{name}-{n + 1}" for n, name in enumerate(names)]


def refuse_empty(chat: ChatConfig, counts: Sequence[Counts], seq_length: int) -> None:
    """Raises UserError about a source of which nothing is kept."""
    for place, (source, count) in enumerate(zip((*chat.train, *chat.eval), counts)):
        if count.kept:
            continue
        raise UserError(f"{_field(chat, place)} = {source.path} {count.why_empty(seq_length)}")
