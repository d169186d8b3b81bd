"""What the tests under Slurm share."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import Corpus


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder that Slurm's daemons may enter."""
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Corpus:
    """Token files of a few modules of Python's library."""
    return make_corpus(folder)


def make_corpus(folder: Path) -> Corpus:
    """The same, in a folder."""
    documents = []
    for name in ("argparse", "ast", "bdb"):
        documents.append(str(folder / f"{name}.txt"))
        shutil.copy(Path(os.__file__).parent / f"{name}.py", documents[-1])
    command = [sys.executable, "-m", "llm_parallel.cli", "prepare", *documents, "--out", str(folder / "docs")]
    done = subprocess.run([*command, "--train-vocab", "600"], capture_output=True, text=True, check=True)
    return Corpus(folder / "docs", folder / "tokenizer.model", done.stdout)
