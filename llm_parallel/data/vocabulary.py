"""A tokenizer trained on the inputs of ``prepare`` themselves."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llm_parallel.data.indexed import REPORT_ENDING
from llm_parallel.data.inputs import Input, Losses, Piece, documents, plan_shards
from llm_parallel.data.tokenizer import MODEL_NAME, TRAIN_BYTES, fingerprint_of, sentencepiece_model
from llm_parallel.errors import UserError
from llm_parallel.files import atomic_write, locked

SOURCE_NAME = "tokenizer.source.json"
STRETCH_BYTES = 1 << 20
MAX_STRETCHES = 4096
"""Largest number of stretches that the inputs are divided into, whatever their size."""


def vocabulary_from_files(
    files: Sequence[Input], vocab_size: int, out_dir: str | Path, key: str = "text", *, prefixes: Sequence[str]
) -> Path:
    """Trains ``out_dir``/tokenizer.model on a sample from all over ``files``, for the token files ``prefixes`` (names
    in that folder), and returns its path. A tokenizer that is there already is kept if it came from the same files or
    is the same.

    Raises UserError as ``sentencepiece_model`` and ``inputs.documents`` do, and rather than replace a tokenizer with
    which other token files were or are being made, or that ``prepare`` did not train."""
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    stats = [file.identity for file in files]
    source = {
        "vocab_size": vocab_size,
        "inputs": hashlib.sha256(json.dumps([stats, key, TRAIN_BYTES]).encode()).hexdigest()[:32],
    }
    model, mark = out_dir / MODEL_NAME, out_dir / SOURCE_NAME
    held = f"another process is training {model}; wait for it or end it, or give --out another folder"
    with locked(out_dir / f".{MODEL_NAME}.lock", held):
        known = _read(mark)
        users = {*known.pop("prefixes", ()), *prefixes}
        if not (model.is_file() and known == source):
            content = sentencepiece_model(_sample(files, key), vocab_size, threads=len(os.sched_getaffinity(0)))
            if model.exists() and fingerprint_of(model.read_bytes()) != fingerprint_of(content):
                _refuse_to_replace(model, users - set(prefixes), prefixes, ours=bool(known))
                users = set(prefixes)
            # Before the model is overwritten, so that no mark is ever beside a model that it does not describe.
            mark.unlink(missing_ok=True)
            with atomic_write(model, "wb") as handle:
                handle.write(content)
        with atomic_write(mark) as handle:
            json.dump({**source, "prefixes": sorted(users)}, handle)
    return model


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _refuse_to_replace(model: Path, others: set[str], prefixes: Sequence[str], ours: bool) -> None:
    """Raises UserError if ``model`` is in use by token files that this command does not write again, or was not trained
    by ``prepare``. others: names of those that it was trained for; ours: whether ``prepare`` trained it."""
    fingerprint = fingerprint_of(model.read_bytes())
    for report in sorted(model.parent.glob(f"*{REPORT_ENDING}")):
        name = report.name.removesuffix(REPORT_ENDING)
        if name not in prefixes and _read(report).get("tokenizer_fingerprint") == fingerprint:
            others.add(name)
    if ours and not others:
        return
    whose = f"the tokenizer of {model.parent / min(others)}" if others else "a tokenizer from elsewhere"
    raise UserError(
        f"{model} is {whose}, and --train-vocab would replace it by another; give --out another folder, or"
        f" --tokenizer {model} to use this one, or remove it if nothing needs it"
    )


def _sample(files: Sequence[Input], key: str) -> Iterator[str]:
    """Documents from the heads of shuffled stretches, so that the first megabytes represent the whole."""
    total = sum(file.size for file in files)
    stretches = plan_shards(files, max(STRETCH_BYTES, total // MAX_STRETCHES))
    random.Random(0).shuffle(stretches)
    share = max(STRETCH_BYTES, TRAIN_BYTES // max(len(stretches), 1))
    for stretch in stretches:
        yield from _head(stretch, key, share)


def _head(pieces: Sequence[Piece], key: str, size: int) -> Iterator[str]:
    for piece in pieces:
        for text in documents(piece, key, Losses()):
            yield text
            size -= len(text)
            if size <= 0:
                return
