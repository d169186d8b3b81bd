"""A checkpoint that changed on disk is never trained from: the one before it is taken, or the run is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.commands import Corpus, assert_refused, llm_parallel, losses, train_in_ranks, write_run_file

pytestmark = pytest.mark.gloo


def flip(folder: Path, pattern: str) -> Path:
    """Flips one bit in the middle of the largest file of a checkpoint that matches."""
    path = max(folder.glob(pattern), key=lambda found: found.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(bytes(content))
    return path


@pytest.fixture(scope="module")
def trained_once(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 8 of 12 steps in two processes, with checkpoints after 4 and 8."""
    folder = tmp_path_factory.mktemp("trained")
    run_file = write_run_file(corpus, folder, checkpoint={"interval_steps": 4})
    train_in_ranks(run_file, 2, "parallel.tp=2", stop_at=8)
    return folder / "run"


@pytest.fixture
def trained(corpus: Corpus, trained_once: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of that run, to damage, and its run file."""
    run_file = write_run_file(corpus, tmp_path, checkpoint={"interval_steps": 4})
    shutil.copytree(trained_once, tmp_path / "run")
    return tmp_path / "run", run_file


def assert_the_checkpoint_before_was_taken(run_dir: Path, undisturbed: dict[int, float]) -> None:
    again = losses(run_dir)
    for step in range(5, 9):
        assert again[step] == pytest.approx(undisturbed[step], abs=1e-5)
    kept = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert {"iter_0000008.damaged", "iter_0000008", "iter_0000012"} <= kept


def test_the_checkpoint_before_is_taken(trained: tuple[Path, Path]) -> None:
    """By the command, which says so."""
    run_dir, run_file = trained
    undisturbed = losses(run_dir)
    damaged = flip(run_dir / "checkpoints" / "iter_0000008", "*.distcp")
    done = llm_parallel("pretrain", run_file, "parallel.dp=2")
    assert done.returncode == 0, done.stderr
    assert f"iter_0000004; iter_0000008 is damaged ({damaged.name} changed" in done.stdout.replace("\n", " ")
    assert_the_checkpoint_before_was_taken(run_dir, undisturbed)


def test_common_state_that_changed_is_noticed_too(trained: tuple[Path, Path]) -> None:
    run_dir, run_file = trained
    undisturbed = losses(run_dir)
    flip(run_dir / "checkpoints" / "iter_0000008", "common.pt")
    assert train_in_ranks(run_file, 2, "parallel.dp=2") == [12, 12]
    assert_the_checkpoint_before_was_taken(run_dir, undisturbed)


def test_without_verification_it_would_be_trained_from(trained: tuple[Path, Path]) -> None:
    """What the checksums are for: torch loads a flipped bit without a word."""
    run_dir, run_file = trained
    flip(run_dir / "checkpoints" / "iter_0000008", "*.distcp")
    assert train_in_ranks(run_file, 2, "parallel.dp=2", "checkpoint.verify=false") == [12, 12]
    assert not list((run_dir / "checkpoints").glob("*.damaged"))


def test_if_none_is_left_the_run_is_refused(trained: tuple[Path, Path]) -> None:
    run_dir, run_file = trained
    for name in ("iter_0000004", "iter_0000008"):
        flip(run_dir / "checkpoints" / name, "*.distcp")
    with pytest.raises(
        AssertionError, match=r"UserError: .*no checkpoint of.*iter_0000004 is damaged.*another run_dir"
    ):
        train_in_ranks(run_file, 1)


def test_a_named_checkpoint_is_refused(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run_dir, run_file = trained
    flip(run_dir / "checkpoints" / "iter_0000008", "*.distcp")
    with pytest.raises(AssertionError, match=r"UserError: .*iter_0000008 is damaged.*give another checkpoint"):
        train_in_ranks(run_file, 1, f"run_dir={tmp_path / 'other'}", f"checkpoint.load={run_dir}")


@pytest.mark.slow
def test_the_command_refuses_with_one_sentence(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """The two refusals above, from launcher to worker and back."""
    run_dir, run_file = trained
    flip(run_dir / "checkpoints" / "iter_0000008", "*.distcp")
    other = f"run_dir={tmp_path / 'other'}"
    refused = llm_parallel("pretrain", run_file, other, f"checkpoint.load={run_dir}")
    assert_refused(refused, "iter_0000008 is damaged", "give another checkpoint")
    flip(run_dir / "checkpoints" / "iter_0000004", "*.distcp")
    assert_refused(llm_parallel("pretrain", run_file), "no checkpoint of", "iter_0000004 is damaged", "another run_dir")
