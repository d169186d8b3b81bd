"""``llm-parallel prepare``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llm_parallel.data.display import print_report, shown_progress
from llm_parallel.data.inputs import find_files
from llm_parallel.data.prepare import PrepareConfig, PrepareReport, file_errors_explained, prepare
from llm_parallel.data.vocabulary import vocabulary_from_files
from llm_parallel.errors import UserError
from llm_parallel.lines import say


def prepare_command(
    inputs: Sequence[str],
    out: str,
    *,
    tokenizer: str | None = None,
    train_vocab: int | None = None,
    **options: Any,
) -> PrepareReport:
    """Trains a tokenizer beside ``out`` if ``train_vocab`` asks for one, prepares, and prints the report. ``options``
    are further fields of PrepareConfig.

    Raises UserError on options that do not fit together and as ``prepare`` does.
    """
    if (tokenizer is None) == (train_vocab is None):
        given = "neither" if tokenizer is None else "both"
        raise UserError(f"--tokenizer and --train-vocab: {given} given; give one of them")
    config = PrepareConfig(tuple(inputs), out, tokenizer or "", **options)
    for name, value in (
        ("--train-vocab", train_vocab),
        ("--workers", config.workers),
        ("--shard-megabytes", config.shard_megabytes),
    ):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; give 1 or more")
    target = Path(out)
    if not target.name:
        raise UserError(f"--out {out!r} is not a prefix of files; give one such as data/corpus")
    if train_vocab is not None:
        say(f"training a tokenizer of {train_vocab} tokens")
        with file_errors_explained(target):
            files = find_files(inputs, config.extensions, config.strict).files
            prefixes = [target.name]
            trained = vocabulary_from_files(files, train_vocab, target.parent, config.key, prefixes=prefixes)
        config = replace(config, tokenizer=str(trained))
    with shown_progress("preparing") as progress:
        report = prepare(config, progress)
    print_report(report)
    return report
