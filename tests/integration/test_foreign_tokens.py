"""What the command says about token files that do not belong to the tokenizer or hold ids that the model lacks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llm_parallel.data.tokenizer import train_sentencepiece
from tests.support.commands import Corpus, assert_refused, llm_parallel, write_run_file
from tests.support.data_helpers import WORDS, prepare_small, write_token_file
from tests.support.in_process import in_process

pytestmark = pytest.mark.gloo


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder with corpus a and the tokenizer that was trained on it."""
    prepare_small("a", tmp_path, "a")
    return tmp_path / "set"


def test_the_commands_say_it(made: Path, tmp_path: Path) -> None:
    """Files from elsewhere; a tokenizer that was replaced by hand."""
    model = {"vocab_size": 300}
    run_file = write_run_file(Corpus(made / "a", made / "tokenizer.model", ""), tmp_path, model=model)
    foreign = write_token_file(made / "foreign", [np.arange(290, dtype=np.int32) % 290] * 10)
    source = f"data.train=[{{path: {foreign}}}]"
    said = in_process("pretrain", run_file, source, "data.eval_fraction=0", "--dry-run")
    assert said.returncode == 0 and "foreign came without a report of `prepare`" in said.stderr, said.stderr
    train_sentencepiece([WORDS["b"]] * 50, 290, made)
    assert_refused(in_process("pretrain", run_file, "--dry-run"), "a was prepared with another tokenizer")


@pytest.mark.parametrize("tp", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ids_deep_in_a_foreign_file_end_a_run_with_one_sentence(tp: int, made: Path, tmp_path: Path) -> None:
    """Behind the 16 million tokens that the check at the start looks at; half of all samples have some."""
    half = 1 << 24
    ids = np.repeat(np.array([7, 305], np.uint16), half)
    foreign = Path(write_token_file(made / "foreign", [ids[:half], ids[half:]], np.uint16))
    data = {"eval_fraction": 0.0}
    corpus = Corpus(foreign, made / "tokenizer.model", "")
    run_file = write_run_file(corpus, tmp_path, model={"vocab_size": 300}, data=data, parallel={"tp": tp})
    done = llm_parallel("pretrain", run_file)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "foreign holds the token id 305, and model.vocab_size=300 has" in done.stderr.splitlines()[-1]
