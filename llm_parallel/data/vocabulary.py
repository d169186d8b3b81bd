"""A tokenizer trained on the inputs of ``prepare`` themselves."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from llm_parallel.data.inputs import Piece, Skipped, documents, plan_shards
from llm_parallel.data.tokenizer import MODEL_NAME, TRAIN_BYTES, train_sentencepiece
from llm_parallel.files import atomic_write

SOURCE_NAME = "tokenizer.source.json"
STRETCH_BYTES = 1 << 20
MAX_STRETCHES = 4096
"""Terabytes are divided into no more than this."""


def vocabulary_from_files(files: Sequence[Path], vocab_size: int, out_dir: str | Path, key: str = "text") -> Path:
    """``out_dir``/tokenizer.model, trained on a sample from all over ``files``; the one that is there already if it
    came from the same files. Raises UserError as ``train_sentencepiece`` and ``inputs.documents`` do."""
    out_dir = Path(out_dir)
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    source = {
        "vocab_size": vocab_size,
        "inputs": hashlib.sha256(json.dumps([stats, key, TRAIN_BYTES]).encode()).hexdigest()[:32],
    }
    model, mark = out_dir / MODEL_NAME, out_dir / SOURCE_NAME
    try:
        if model.is_file() and json.loads(mark.read_text(encoding="utf-8")) == source:
            return model
    except (OSError, ValueError):
        pass
    # Before the model is overwritten, so that no mark is ever beside a model that it does not describe.
    mark.unlink(missing_ok=True)
    train_sentencepiece(_sample(files, key), vocab_size, out_dir, threads=len(os.sched_getaffinity(0)))
    with atomic_write(mark) as handle:
        json.dump(source, handle)
    return model


def _sample(files: Sequence[Path], key: str) -> Iterator[str]:
    """Documents from the heads of shuffled stretches, so that the first megabytes are a picture of the whole."""
    total = sum(path.stat().st_size for path in files)
    stretches = plan_shards(files, max(STRETCH_BYTES, total // MAX_STRETCHES))
    random.Random(0).shuffle(stretches)
    share = max(STRETCH_BYTES, TRAIN_BYTES // max(len(stretches), 1))
    for stretch in stretches:
        yield from _head(stretch, key, share)


def _head(pieces: Sequence[Piece], key: str, size: int) -> Iterator[str]:
    for piece in pieces:
        for text in documents(piece, key, Skipped()):
            yield text
            size -= len(text)
            if size <= 0:
                return
