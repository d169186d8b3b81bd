"""What ``llm-parallel prepare`` is asked; each field's docstring is the help of its option."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llm_parallel.options import argument, option


@dataclass(frozen=True)
class PrepareRequest:
    """Raw text, and what to make of it."""

    inputs: Sequence[str] = argument()
    """Files, folders or globs: text, JSON lines, JSON, Parquet, Arrow, CSV; plain or in gz, zst, xz, bz2."""
    out: str = option()
    """Prefix of the .bin/.idx pair to write."""
    tokenizer: str | None = None
    """SentencePiece .model or Hugging Face tokenizer.json."""
    train_vocab: int | None = None
    """Train a tokenizer of that many tokens first."""
    key: str = "text"
    """Field or column that holds the text."""
    workers: int | None = None
    """Processes; all cores if not given."""
    append_eod: bool = True
    """End every document with the end-of-document token."""
    shard_megabytes: int = 16
    """Text of one shard: what is redone after a kill."""
    prepend_bos: bool = False
    """Begin every document with the tokenizer's begin token."""
    strict: bool = False
    """Stop at the first bad record instead of leaving it out."""
