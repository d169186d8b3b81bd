"""Runs of adapters by their commands: trained, resumed, lost and recovered, used for text, and what is refused."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import Corpus, assert_refused, llm_parallel, losses, train_in_ranks, write_run_file
from tests.support.in_process import in_process

pytestmark = pytest.mark.gloo

SETTINGS: dict[str, Any] = {"adapter": {"rank": 4, "dropout": 0.2}}


@pytest.fixture(scope="module")
def base(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of the model to adapt."""
    folder = tmp_path_factory.mktemp("base")
    train_in_ranks(write_run_file(corpus, folder), 1, "train.steps=4")
    return folder / "run"


def run_file(corpus: Corpus, folder: Path, base: Path, **sections: Any) -> Path:
    load = {"load": str(base), "interval_steps": 4}
    return write_run_file(corpus, folder, **{**SETTINGS, "checkpoint": load, **sections})


@pytest.fixture(scope="module")
def trained(corpus: Corpus, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run file whose run of adapters is over."""
    folder = tmp_path_factory.mktemp("trained")
    train_in_ranks(run_file(corpus, folder, base), 1)
    return folder


def test_a_run_that_is_interrupted_goes_on_as_one_that_is_not(
    corpus: Corpus, base: Path, trained: Path, tmp_path: Path
) -> None:
    """Bit for bit, dropout included; and it writes text with its adapters."""
    interrupted = run_file(corpus, tmp_path, base)
    assert train_in_ranks(interrupted, 1, stop_at=6) == [6]
    train_in_ranks(interrupted, 1)
    whole = losses(trained / "run")
    assert losses(tmp_path / "run") == whole
    text = in_process("generate", trained / "run", "--prompt", "import os", "--max-new-tokens", "8", "--device", "cpu")
    assert text.returncode == 0 and text.stdout.startswith("import os"), text.stdout + text.stderr


BAD: list[tuple[str, list[str], tuple[str, ...]]] = [
    ("rank 0", ["adapter.rank=0"], ("adapter.rank", "0")),
    ("a target that does not exist", ["adapter.targets=[q,qkv]"], ("adapter.targets", "qkv")),
    ("no target", ["adapter.targets=[]"], ("adapter.targets",)),
    ("dropout of all", ["adapter.dropout=1.0"], ("adapter.dropout", "1.0")),
    ("a base of another kind", ["adapter.base=int4"], ("adapter.base", "int4")),
    ("an unknown field", ["adapter.r=8"], ("unknown key adapter.r", "fields adapter")),
    ("no base", ["checkpoint.load=null"], ("adapter is given", "checkpoint.load")),
    ("a base that is not there", ["checkpoint.load=/nowhere"], ("checkpoint.load = /nowhere does not exist",)),
    ("adapters that are not there", ["adapter.load=/nowhere"], ("adapter.load = /nowhere does not exist",)),
    ("odd rows in four bits", ["adapter.base=nf4", "model.ffn_hidden_size=129"], ("adapter.base = nf4", "129")),
]


@pytest.mark.parametrize(("overrides", "words"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_settings_are_one_sentence(
    corpus: Corpus, base: Path, tmp_path: Path, overrides: list[str], words: tuple[str, ...]
) -> None:
    assert_refused(in_process("pretrain", run_file(corpus, tmp_path, base), *overrides), *words)


def test_folders_that_do_not_fit_are_one_sentence(corpus: Corpus, base: Path, trained: Path, tmp_path: Path) -> None:
    """Adapters as a base, whole weights as adapters, adapters without their base, and a merge of nothing."""
    here = run_file(corpus, tmp_path, base)
    wrong = in_process("pretrain", here, f"checkpoint.load={trained / 'run'}")
    assert wrong.returncode == 2 and f"adapter.load={trained}/run/checkpoints/iter_0000012" in wrong.stderr
    wrong = in_process("pretrain", here, f"adapter.load={base}", f"run_dir={tmp_path / 'other'}")
    assert wrong.returncode == 2 and "holds whole weights, and this run trains adapters" in wrong.stderr
    assert_refused(in_process("convert", base, tmp_path / "hf", "--merge"), "holds no adapters that could be merged")
    alone = tmp_path / "alone"
    shutil.copytree(trained / "run" / "checkpoints", alone / "checkpoints")
    moved = base.with_name("moved")
    base.rename(moved)
    try:
        gone = in_process("generate", alone, "--prompt", "x", "--device", "cpu")
        assert_refused(gone, "holds adapters of the model in", "which does not exist; put it there")
    finally:
        moved.rename(base)


def test_a_dry_run_predicts_less_memory_in_fewer_bits(corpus: Corpus, base: Path, tmp_path: Path) -> None:
    found = {}
    for kind in ("full", "nf4"):
        path = run_file(corpus, tmp_path, base, adapter={"rank": 4, "base": kind})
        done = in_process("pretrain", path, "--dry-run")
        assert done.returncode == 0, done.stderr
        [found[kind]] = [line for line in done.stdout.splitlines() if "predicted memory" in line]
    assert found["full"] != found["nf4"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["bit flipped", "node lost"])
def test_frozen_weights_and_adapters_survive(corpus: Corpus, base: Path, tmp_path: Path, fault: str) -> None:
    """A flipped bit in a frozen weight, which the base's folder mends, and a lost node: 60 steps as undisturbed."""
    path = run_file(corpus, tmp_path, base, adapter={"rank": 4})
    drill = llm_parallel(
        "drill", path, "--folder", tmp_path / "drill", "--blame", "1", "--kinds", fault, timeout_s=600.0
    )
    assert drill.returncode == 0 and fault in drill.stdout, drill.stdout + drill.stderr
    [run] = [folder for folder in (tmp_path / "drill").iterdir() if folder.is_dir()]
    saved = max((run / "checkpoints").glob("iter_*")) / "config.yaml"
    layout = ("parallel.dp=null", "parallel.tp=1", "parallel.pp=1", f"run_dir={tmp_path / 'undisturbed'}")
    train_in_ranks(saved, 1, *layout)
    expected, found = losses(tmp_path / "undisturbed"), losses(run)
    assert expected.keys() == found.keys() and len(expected) > 20
    assert max(abs(expected[step] - found[step]) for step in expected) <= 1e-6
    assert all(map(math.isfinite, found.values()))
