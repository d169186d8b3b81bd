"""Commands that train nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.support.commands import Corpus, assert_refused, environment, llm_parallel, train_in_ranks, write_run_file
from tests.support.in_process import in_process


def test_dry_run_shows_all_and_starts_nothing(corpus: Corpus, tmp_path: Path) -> None:
    run_file = write_run_file(corpus, tmp_path)
    result = llm_parallel("pretrain", run_file, "parallel.tp=2", "parallel.pp=2", "--dry-run")
    assert result.returncode == 0, result.stderr
    for part in (
        "| model.vocab_size | 400 | none | derived |",
        "| parallel.tp | 2 | 1 | override |",
        "TP 2 + SP x PP 2",
        "rank   3: tp 1 cp 0 dp 0 pp 1, layers 1-1",
        str(corpus.prefix),
    ):
        assert part in result.stdout
    assert "predicted memory of the fullest process" in result.stdout
    assert result.stderr.splitlines()[-1] == f"next: llm-parallel pretrain {run_file} parallel.tp=2 parallel.pp=2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml"]


def test_dry_run_refuses_what_a_run_would(corpus: Corpus, tmp_path: Path) -> None:
    result = in_process("pretrain", write_run_file(corpus, tmp_path), "parallel.pp=3", "--dry-run")
    assert_refused(result, "parallel.pp = 3")


def test_fields_are_listed_with_their_meaning() -> None:
    result = in_process("fields", "train.guard")
    assert result.returncode == 0
    names = [line for line in result.stdout.splitlines() if not line.startswith(" ")]
    assert names and all(name.startswith("train.guard") for name in names)
    assert not re.search(r"\b(None|True|False|Ellipsis|PydanticUndefined)\b|= \(", in_process("fields").stdout)
    assert "train.guard.max_consecutive_skips: " in result.stdout and "exit status 1" in result.stdout


def test_help_names_every_command() -> None:
    result = in_process("--help")
    assert result.returncode == 0
    for name in ("pretrain", "prepare", "convert", "generate", "plot", "fields", "quickstart"):
        assert name in result.stdout
        assert in_process(name, "--help").returncode == 0


def test_an_unknown_command_is_refused() -> None:
    result = llm_parallel("pretrian")
    assert result.returncode == 2
    assert "pretrian" in result.stderr and "Traceback" not in result.stderr


def test_plot_draws_one_run_and_compares_two(corpus: Corpus, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        train_in_ranks(write_run_file(corpus, tmp_path / name), 1, f"seed={seed}", "train.steps=3")
    for runs in ([tmp_path / "a" / "run"], [tmp_path / "a" / "run", tmp_path / "b" / "run"]):
        result = in_process("plot", *runs)
        assert result.returncode == 0, result.stderr
        pictures = result.stdout.split()
        assert pictures and all(Path(name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_plot_of_no_run_is_refused(tmp_path: Path) -> None:
    assert_refused(in_process("plot", tmp_path), str(tmp_path))


def test_the_command_starts_without_heavy_libraries() -> None:
    code = "import sys, llm_parallel.cli; print({'torch', 'megatron', 'numpy', 'matplotlib'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=120)
    assert done.stdout == "set()\n", done.stdout + done.stderr
