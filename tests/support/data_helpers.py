"""What several tests of the data part need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llm_parallel.data.indexed import write_index


def write_token_file(prefix: Path, documents: Sequence[NDArray[np.int32]], dtype: type = np.int32) -> str:
    """A .bin/.idx pair of these documents; returns the prefix."""
    kind = np.dtype(dtype)
    flat = np.concatenate(documents) if documents else np.zeros(0)
    Path(f"{prefix}.bin").write_bytes(flat.astype(kind).tobytes())
    with Path(f"{prefix}.idx").open("wb") as handle:
        write_index(handle.write, kind, [np.array([len(document) for document in documents], np.int32)])
    return str(prefix)


def numbered_documents(lengths: Sequence[int], first: int = 0) -> list[NDArray[np.int32]]:
    """Documents in which no token occurs twice: they count on from ``first``."""
    ends = first + np.cumsum(lengths)
    return [np.arange(end - length, end, dtype=np.int32) for end, length in zip(ends, lengths)]


WORDS = {"a": "the quick brown fox jumps over the lazy dog", "b": "zwölf boxkämpfer jagen viktor quer über den sylter"}


def text_of(name: str, folder: Path) -> Path:
    """A text file whose words are those of a corpus."""
    words = WORDS[name].split()
    rng = np.random.default_rng(0)
    path = folder / f"{name}.txt"
    path.write_text("\n".join(" ".join(rng.choice(words, 8)) for _ in range(300)), encoding="utf-8")
    return path


def prepare_small(name: str, folder: Path, out: str, vocab: int | None = 300, tokenizer: str | None = None) -> None:
    """``llm-parallel prepare`` of a corpus into ``folder/out``."""
    from llm_parallel.data.command import prepare_command

    prepare_command(
        [str(text_of(name, folder))], str(folder / "set" / out), train_vocab=vocab, tokenizer=tokenizer, workers=1
    )
