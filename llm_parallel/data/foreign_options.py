"""Options by which Megatron-LM's ``preprocess_data.py`` is called, as those of ``prepare``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llm_parallel.errors import UserError
from llm_parallel.lines import note

SAME = {
    "--input": "",
    "--output-prefix": "--out",
    "--json-keys": "--key",
    "--json-key": "--key",
    "--tokenizer-model": "--tokenizer",
}
"""Name there → name here; empty for what is given by position."""
LEFT_OUT = {
    "--tokenizer-type": "the tokenizer's files say what it is",
    "--log-interval": "progress is shown all the time",
    "--partitions": "--workers divides the input by itself",
    "--dataset-impl": "token files are .bin/.idx pairs",
    "--keep-sequential-samples": "documents keep their order",
    "--find-optimal-num-workers": "--workers is all cores by default",
    "--workers-to-check": "--workers is all cores by default",
    "--max-documents": "--workers is all cores by default",
    "--use-gigatoken": "tokenizing is fast as it is",
    "--keep-newlines": "documents are kept as they are",
    "--tokenizer-vocab-size": "the vocabulary is the tokenizer's",
}
"""Options that ask for what happens here anyway → why."""
FLAGS = ("--keep-sequential-samples", "--find-optimal-num-workers", "--use-gigatoken", "--keep-newlines")
SEVERAL = ("--workers-to-check",)
"""Those of them that have no value, and that may have several."""
REFUSED = {
    "--vocab-file": "--tokenizer takes a SentencePiece .model or a Hugging Face tokenizer.json; transformers writes "
    "the latter by AutoTokenizer.from_pretrained(FOLDER).save_pretrained(TARGET)",
    "--merge-file": "--tokenizer takes a tokenizer.json, which holds the merges too",
    "--vocab-size": "the vocabulary is the tokenizer's; --train-vocab trains a tokenizer of that many tokens",
    "--split-sentences": "documents are not divided into sentences",
    "--lang": "documents are not divided into sentences",
}
"""Options without a counterpart → what to do."""


def translated(arguments: Sequence[str], notice: Callable[[str], None] = lambda text: note(text)) -> list[str]:
    """``arguments`` with Megatron-LM's options as those of ``prepare``; ``notice`` is called with one line for each.

    Raises UserError with what to do for one that has no counterpart."""
    found: list[str] = []
    rest = list(arguments)
    while rest:
        given = rest.pop(0)
        name, equals, value = given.partition("=")
        if name in REFUSED:
            raise UserError(f"{name} is not an option here: {REFUSED[name]}")
        if name not in SAME and name not in LEFT_OUT:
            found.append(given)
            continue
        values = [value] if equals else _values(rest)
        if not values and name not in FLAGS:
            raise UserError(f"{name} has no value")
        if name in LEFT_OUT:
            notice(f"{name} is left out: {LEFT_OUT[name]}")
            found += values if name in FLAGS else [] if name in SEVERAL else values[1:]
            continue
        ours = SAME[name]
        if ours == "--key" and len(values) > 1:
            raise UserError(
                f"{name} {' '.join(values)}: one pair of token files holds one field; call prepare once for each, with "
                "another --out"
            )
        notice(f"{name} is read as {ours or 'inputs'}")
        found += [ours, *values] if ours else values
    return found


def _values(rest: list[str]) -> list[str]:
    """The values of an option, removed from what follows it."""
    values = []
    while rest and not rest[0].startswith("--"):
        values.append(rest.pop(0))
    return values
