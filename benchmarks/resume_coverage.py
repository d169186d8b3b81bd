"""Counts which tokens of an epoch a run sees whose data section changes in the middle of it.

    python benchmarks/resume_coverage.py [--tokens 2000000] [--out FILE]

Source A has ``--tokens`` tokens that are all different, in documents of 700 tokens on average, and so have B and C.
The run reads half an epoch of A with samples of 256 tokens, then the change is made, and it goes on until as many
tokens of A were read as an epoch has. ``twice`` and ``never``: shares of A's tokens that were then an input more than
once, or not at all; of the documents that training may read under both settings. The ideal is 0 for both: half of the
epoch was left, and as much was read. ``held out``: share of the tokens held out after the change that training had as a
label with weight, before or after it; the ideal is 0, or what was learned before documents joined the held-out ones.

``before``: the samples as they were when a sample was a function of the present data section and its number alone.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_parallel.config.tree import DataConfig, Source
from llm_parallel.data.indexed import write_index
from llm_parallel.data.samples import Sample, SampleSource

LENGTH = 256
MEAN_DOCUMENT = 700
SEED = 1234
FIRST = {"data": {"sources": {"A": 2, "B": 1}, "seq_length_tokens": LENGTH, "eval_fraction": 0.01}, "seed": SEED}
CHANGES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "mixture 2:1 to 1:3": {"sources": {"A": 1, "B": 3}},
    "source C added": {"sources": {"A": 2, "B": 1, "C": 1}},
    "source B removed": {"sources": {"A": 1}},
    "A and B change places": {"sources": {"B": 1, "A": 2}},
    "sequence length x 2": {"seq_length_tokens": 2 * LENGTH},
    "sequence length / 2": {"seq_length_tokens": LENGTH // 2},
    "sequence length x 16": {"seq_length_tokens": 16 * LENGTH},
    "sequence length 256 to 200": {"seq_length_tokens": 200},
    "packing isolate": {"packing": "isolate"},
    "seed": {"seed": SEED + 1},
    "held-out share 1 % to 3 %": {"eval_fraction": 0.03},
    "held-out share 1 % to 0.2 %": {"eval_fraction": 0.002},
    "mixture, length x 2 and seed": {"sources": {"A": 1, "B": 3}, "seq_length_tokens": 2 * LENGTH, "seed": SEED + 1},
}


@dataclass(frozen=True)
class Covered:
    """Shares from 0 to 1."""

    twice: float
    never: float
    held_out: float


def write_numbered(folder: Path, tokens: int) -> None:
    """Files A, B and C; token ids count on over them."""
    rng = np.random.default_rng(0)
    for number, name in enumerate("ABC"):
        lengths = rng.geometric(1 / MEAN_DOCUMENT, 2 * tokens // MEAN_DOCUMENT).astype(np.int32)
        lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), tokens))]
        lengths = np.append(lengths, np.int32(tokens - lengths.sum()))
        ids = np.arange(number * tokens, (number + 1) * tokens, dtype=np.int32)
        (folder / f"{name}.bin").write_bytes(ids.tobytes())
        with (folder / f"{name}.idx").open("wb") as handle:
            write_index(handle.write, np.dtype(np.int32), [lengths])


def data_of(folder: Path, changes: dict[str, Any]) -> tuple[DataConfig, int]:
    """The data section and the seed of the first part of the run with these changes."""
    fields = {**FIRST["data"], **changes}  # type: ignore[dict-item]
    seed = fields.pop("seed", SEED)
    sources = tuple(Source(path=str(folder / name), weight=weight) for name, weight in fields.pop("sources").items())
    return DataConfig(train=sources, **fields), seed


def held_out(data: DataConfig, seed: int, tokens: int, history: Any = ()) -> NDArray[np.bool_]:
    """Which of A's tokens are held out."""
    source = SampleSource(
        data.model_copy(update={"train": tuple(one for one in data.train if one.path.endswith("A"))}),
        seed,
        "eval",
        None,
        history,
    )
    found = np.zeros(3 * tokens, np.bool_)
    number = 0
    while not found[(ids := source.sample(number).tokens)].all():
        found[ids] = True
        number += 1
    return found[:tokens]


def covered(folder: Path, changes: dict[str, Any], tokens: int, *, segments: bool) -> Covered:
    """What a run sees; ``segments``: with the sources' positions, or without."""
    seen, learned = np.zeros(tokens, np.int64), np.zeros(tokens, np.bool_)
    (first, seed), (second, other) = data_of(folder, {}), data_of(folder, changes)

    def read_until(wanted: int, sample: Callable[[int], Sample], number: int) -> int:
        while seen.sum() < wanted:
            found = sample(number)
            if found.tokens[0] < tokens:
                seen[found.tokens] += 1
                labels = found.labels[found.weights > 0]
                learned[labels[labels < tokens]] = True
            number += 1
        return number

    before = SampleSource(first, seed, "train")
    out_before = held_out(first, seed, tokens)
    epoch = tokens - int(out_before.sum())
    number = read_until(epoch // 2, before.sample, 0)
    history = before.history if segments else ()
    after = SampleSource(second, other, "train", None, history, number if segments else 0)
    out_after = held_out(second, other, tokens, after.history if segments else ())
    read_until(epoch, after.sample, number)
    counted = seen[~out_before & ~out_after]
    return Covered(float((counted > 1).mean()), float((counted == 0).mean()), float(learned[out_after].mean()))


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    ways = ("before", "after")
    names = [f"{what} {way}" for what in ("twice", "never", "held out") for way in ways]
    lines = [f"| change | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
    with tempfile.TemporaryDirectory() as folder:
        write_numbered(Path(folder), arguments.tokens)
        for name, changes in CHANGES.items():
            rows = [covered(Path(folder), changes, arguments.tokens, segments=way == "after") for way in ways]
            shares = [getattr(row, what) for what in ("twice", "never", "held_out") for row in rows]
            lines.append(f"| {name} | " + " | ".join(f"{100 * share:.3f} %" for share in shares) + " |")
            print(lines[-1], file=sys.stderr)
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
