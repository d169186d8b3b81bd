"""One prepared corpus for all integration tests."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.support.commands import Corpus, llm_parallel


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Modules of Python's library from a to c, with a vocabulary of 400 words."""
    folder = tmp_path_factory.mktemp("corpus")
    text = folder / "text"
    text.mkdir()
    for source in Path(os.__file__).parent.glob("[a-c]*.py"):
        shutil.copy(source, text / f"{source.stem}.txt")
    prefix = folder / "tokens"
    result = llm_parallel("prepare", text, "--out", prefix, "--train-vocab", "400", "--workers", "1")
    assert result.returncode == 0, result.stderr
    return Corpus(prefix, folder / "tokenizer.model", result.stdout)
