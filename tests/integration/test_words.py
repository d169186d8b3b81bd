"""Words of the command that train nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import Corpus, assert_refused, environment, llm_parallel, train_in_ranks, write_run_file


def test_dry_run_shows_all_and_starts_nothing(corpus: Corpus, tmp_path: Path) -> None:
    run_file = write_run_file(corpus, tmp_path)
    result = llm_parallel("pretrain", run_file, "parallel.tp=2", "parallel.pp=2", "--dry-run")
    assert result.returncode == 0, result.stderr
    for words in (
        "vocab_size: 400",
        "TP 2 + SP x PP 2",
        "rank   3: tp 1 cp 0 dp 0 pp 1, layers 1-1",
        str(corpus.prefix),
    ):
        assert words in result.stdout
    assert "predicted memory of the fullest process" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml"]


def test_dry_run_refuses_what_a_run_would(corpus: Corpus, tmp_path: Path) -> None:
    result = llm_parallel("pretrain", write_run_file(corpus, tmp_path), "parallel.pp=3", "--dry-run")
    assert_refused(result, "parallel.pp = 3")


def test_fields_are_listed_with_their_meaning() -> None:
    result = llm_parallel("fields", "train.guard")
    assert result.returncode == 0
    names = [line for line in result.stdout.splitlines() if not line.startswith(" ")]
    assert names and all(name.startswith("train.guard") for name in names)
    assert "train.guard.max_consecutive_skips: " in result.stdout and "exit status 1" in result.stdout


def test_help_names_every_word() -> None:
    result = llm_parallel("--help")
    assert result.returncode == 0
    for word in ("pretrain", "prepare", "convert", "generate", "plot", "fields", "quickstart"):
        assert word in result.stdout
        assert llm_parallel(word, "--help").returncode == 0


def test_an_unknown_word_is_refused() -> None:
    result = llm_parallel("pretrian")
    assert result.returncode == 2
    assert "pretrian" in result.stderr and "Traceback" not in result.stderr


def test_plot_draws_one_run_and_compares_two(corpus: Corpus, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        train_in_ranks(write_run_file(corpus, tmp_path / name), 1, f"seed={seed}", "train.steps=3")
    for runs in ([tmp_path / "a" / "run"], [tmp_path / "a" / "run", tmp_path / "b" / "run"]):
        result = llm_parallel("plot", *runs)
        assert result.returncode == 0, result.stderr
        pictures = result.stdout.split()
        assert pictures and all(Path(name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_plot_of_no_run_is_refused(tmp_path: Path) -> None:
    assert_refused(llm_parallel("plot", tmp_path), str(tmp_path))


@pytest.mark.parametrize("heavy", ["torch", "megatron", "numpy", "matplotlib"])
def test_the_command_starts_without_heavy_libraries(heavy: str) -> None:
    code = f"import sys, llm_parallel.cli; raise SystemExit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), timeout=30).returncode == 0
