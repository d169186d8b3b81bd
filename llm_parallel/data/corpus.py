"""The corpus that every machine has: source and documentation of the Python standard library it runs on."""

from __future__ import annotations

import hashlib
import json
import math
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from llm_parallel.data.display import shown_progress
from llm_parallel.data.indexed import TokenFile
from llm_parallel.data.inputs import find_files
from llm_parallel.data.prepare import PrepareConfig, PrepareReport, prepare
from llm_parallel.data.vocabulary import vocabulary_from_files
from llm_parallel.errors import UserError
from llm_parallel.files import atomic_write
from llm_parallel.lines import say

SUFFIXES = (".py", ".txt", ".rst")
NOT_THE_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}
TESTS = {"test", "tests", "idle_test"}
ENOUGH_BYTES = 8 << 20
EVAL_SHARE = 0.02


@dataclass(frozen=True)
class PythonCorpus:
    """Result of ``prepare_python_corpus``. ``unigram_entropy_nats``: entropy of one token by its frequency in training
    and held-out text."""

    tokenizer: str
    train: PrepareReport
    eval: PrepareReport
    unigram_entropy_nats: float

    def describe(self) -> str:
        """One line for the console."""
        megabytes = (self.train.text_bytes + self.eval.text_bytes) / 1e6
        return (
            f"{self.train.documents:,} files of the Python library for training and {self.eval.documents:,} held out, "
            f"{megabytes:.1f} MB, {self.train.tokens + self.eval.tokens:,} tokens of {self.train.bytes_per_token:.2f} "
            f"bytes, vocabulary {self.train.vocab_size:,}, unigram entropy {self.unigram_entropy_nats:.3f} nats/token"
        )


def python_corpus() -> list[Path]:
    """Source and text files of the running interpreter's standard library, sorted; its tests only where the rest is
    less than 8 MB. Raises UserError if there are none."""
    library = _library()
    files = sorted(
        path
        for path in library.rglob("*")
        if path.suffix in SUFFIXES and path.is_file() and not NOT_THE_LIBRARY.intersection(path.parts)
    )
    if not files:
        raise UserError(f"the Python library folder {library} holds no source files; use a Python that has them")
    without_tests = [path for path in files if not TESTS.intersection(path.relative_to(library).parts)]
    enough = sum(path.stat().st_size for path in without_tests) > ENOUGH_BYTES
    return without_tests if enough else files


def prepare_python_corpus(out_dir: str | Path, vocab_size: int, workers: int | None = None) -> PythonCorpus:
    """Finds the files, trains a tokenizer and writes tokenizer.model, train.{bin,idx}, eval.{bin,idx} and
    corpus.report.json into ``out_dir``, showing progress. Two in a hundred files are held out, chosen by their path.

    Files that are there already and would come out the same are kept. Raises UserError as ``prepare`` does.
    """
    out = Path(out_dir)
    library = _library()
    by_hash = sorted(python_corpus(), key=lambda path: _hash(path.relative_to(library).as_posix()))
    held_out = math.ceil(EVAL_SHARE * len(by_hash))
    parts = {"eval": sorted(by_hash[:held_out]), "train": sorted(by_hash[held_out:])}
    say(f"training a tokenizer of {vocab_size} tokens on {len(parts['train'])} files")
    found = find_files([str(path) for path in parts["train"]])
    tokenizer = vocabulary_from_files(found.files, vocab_size, out, prefixes=sorted(parts))
    reports = {}
    for name, files in parts.items():
        with shown_progress(f"tokenising {name}") as progress:
            config = PrepareConfig(tuple(map(str, files)), str(out / name), str(tokenizer), workers=workers)
            reports[name] = prepare(config, progress)
    entropy = unigram_entropy(out / "train", out / "eval")
    corpus = PythonCorpus(str(tokenizer), reports["train"], reports["eval"], entropy)
    with atomic_write(out / "corpus.report.json") as handle:
        json.dump(asdict(corpus), handle, indent=2)
    return corpus


def unigram_entropy(*prefixes: str | Path) -> float:
    """Entropy of the token frequencies of some token files together, in nats per token: the loss of a model that knows
    how often each token occurs and nothing else. Raises UserError on missing or damaged files."""
    counts = np.zeros(0, np.int64)
    for prefix in prefixes:
        for chunk in TokenFile(prefix).token_chunks():
            found = np.bincount(chunk)
            longer, shorter = (counts, found) if len(counts) > len(found) else (found.astype(np.int64), counts)
            longer[: len(shorter)] += shorter
            counts = longer
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
