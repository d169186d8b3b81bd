"""One prepared corpus for all integration tests."""

from __future__ import annotations

import pytest

from tests.support.commands import Corpus, prepare_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Modules of Python's library from a to c, with a vocabulary of 400 words."""
    return prepare_corpus(tmp_path_factory.mktemp("corpus"))
