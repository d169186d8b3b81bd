"""From prepared text through the real command to the files that a run writes, in several layouts."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.commands import (
    Corpus,
    events,
    llm_parallel,
    losses,
    read_records,
    train_in_ranks,
    write_run_file,
)

pytestmark = pytest.mark.gloo

STEPS = 12
TOLERANCE = 1e-5
TP2_PP2 = ("parallel.tp=2", "parallel.pp=2")
RAMP = {"train": {"rampup": {"start": 2, "increment": 2, "samples": 16}, "global_batch_size": 8}}


def assert_same_losses(run_dir: Path, reference: Path) -> None:
    found, expected = losses(run_dir), losses(reference)
    assert list(found) == list(expected) == list(range(1, STEPS + 1))
    worst = max(abs(found[step] - expected[step]) for step in expected)
    assert worst <= TOLERANCE, worst


@pytest.fixture(scope="module")
def alone(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """An undisturbed run of the command in one process, with TensorBoard and plots."""
    folder = tmp_path_factory.mktemp("alone")
    run_file = write_run_file(corpus, folder, log={"tensorboard": True, "plots": True})
    result = llm_parallel("pretrain", run_file, "train.deterministic=true")
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "run", result


@pytest.fixture(scope="module")
def in_four(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the same run with TP 2 x PP 2."""
    folder = tmp_path_factory.mktemp("in_four")
    run_file = write_run_file(corpus, folder, checkpoint={"interval_steps": 5})
    assert train_in_ranks(run_file, 4, *TP2_PP2) == [STEPS] * 4
    return folder / "run"


def test_prepare_reports_what_it_made(corpus: Corpus) -> None:
    assert "vocabulary 400" in corpus.output
    assert str(corpus.tokenizer) in corpus.output
    assert Path(f"{corpus.prefix}.bin").stat().st_size > 100_000


def test_losses_fall(alone: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    values = list(losses(alone[0]).values())
    assert sum(values[-3:]) / 3 < sum(values[:3]) / 3 - 0.5


def test_a_run_leaves_its_files(alone: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run_dir, result = alone
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["model"]["vocab_size"] == 400
    assert (run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").read_text().strip() == str(STEPS)
    assert (run_dir / "checkpoints" / f"iter_{STEPS:07d}" / "tokenizer" / "tokenizer.model").is_file()
    assert (run_dir / "logs" / "rank_0.log").is_file()
    assert [record["event"] for record in read_records(run_dir / "events.jsonl")] == ["run_start", "end"]
    assert list(run_dir.rglob("events.out.tfevents.*"))
    pictures = [line.removeprefix("plot: ") for line in result.stdout.splitlines() if line.startswith("plot: ")]
    assert pictures
    assert all(Path(name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert result.stderr == f'next: llm-parallel generate {run_dir} --prompt "…"\n'
    assert (run_dir / "schema.json").is_file()


def test_the_console_shows_mixture_steps_and_evaluation(alone: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    output = alone[1].stdout
    assert "Training mixture" in output
    assert sum(line.startswith("step ") for line in output.splitlines()) == STEPS
    assert f"evaluation after step {STEPS}" in output


def assert_is_the_run_of_one_process(run_dir: Path, alone: Path) -> None:
    assert_same_losses(run_dir, alone)
    held_out = [
        record["eval/loss"]
        for folder in (alone, run_dir)
        for record in read_records(folder / "metrics.jsonl")
        if "eval/loss" in record
    ]
    assert held_out[0] == pytest.approx(held_out[1], abs=TOLERANCE)
    saved = sorted(path.name for path in (run_dir / "checkpoints").glob("iter_*"))
    assert saved == ["iter_0000005", "iter_0000010", "iter_0000012"]


def test_three_dimensions_give_the_losses_of_one_process(
    alone: tuple[Path, subprocess.CompletedProcess[str]], in_four: Path
) -> None:
    assert_is_the_run_of_one_process(in_four, alone[0])


@pytest.mark.slow
def test_the_command_starts_the_processes_of_a_layout(
    corpus: Corpus, alone: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """The same by the real command; by default test_stopping.py has the command that starts two processes."""
    run_file = write_run_file(corpus, tmp_path, checkpoint={"interval_steps": 5})
    result = llm_parallel("pretrain", run_file, *TP2_PP2)
    assert result.returncode == 0, result.stdout + result.stderr
    assert_is_the_run_of_one_process(tmp_path / "run", alone[0])
    logs = sorted(path.name for path in (tmp_path / "run" / "logs").glob("rank_*.log"))
    assert logs == [f"rank_{rank}.log" for rank in range(4)]


def test_a_finished_run_started_again_changes_nothing(corpus: Corpus, in_four: Path, tmp_path: Path) -> None:
    before = losses(in_four)
    run_file = write_run_file(corpus, tmp_path)
    assert train_in_ranks(run_file, 1, f"run_dir={in_four}") == [STEPS]
    assert losses(in_four) == before


def test_another_layout_goes_on_as_the_undisturbed_run(
    corpus: Corpus, alone: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    run_file = write_run_file(corpus, tmp_path)
    assert train_in_ranks(run_file, 4, *TP2_PP2, stop_at=6) == [6] * 4
    assert train_in_ranks(run_file, 2, "parallel.dp=2") == [STEPS] * 2
    assert_same_losses(tmp_path / "run", alone[0])
    assert [event["step"] for event in events(tmp_path / "run", "stop")] == [6]


def test_another_layout_goes_on_during_batch_ramp_up(corpus: Corpus, tmp_path: Path) -> None:
    reference = write_run_file(corpus, tmp_path / "reference", **RAMP)
    train_in_ranks(reference, 1)
    run_file = write_run_file(corpus, tmp_path / "resumed", **RAMP)
    assert train_in_ranks(run_file, 2, "parallel.pp=2", stop_at=3) == [3] * 2
    assert train_in_ranks(run_file, 4, "parallel.tp=2", "parallel.dp=2") == [STEPS] * 4
    assert_same_losses(tmp_path / "resumed" / "run", tmp_path / "reference" / "run")
    sizes = [
        record["train/global_batch_size"]
        for record in read_records(tmp_path / "resumed" / "run" / "metrics.jsonl")
        if "train/loss" in record
    ]
    # Sizes 2, 4 and 6 for 16/3 samples each, then 8.
    assert sizes == [2, 2, 2, 4, 4, 6, 8, 8, 8, 8, 8, 8]


def test_deterministic_runs_record_the_same_numbers(
    corpus: Corpus, alone: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    run_file = write_run_file(corpus, tmp_path)
    train_in_ranks(run_file, 1, "train.deterministic=true")
    first, second = (
        [
            (record["step"], record["train/loss"], record["train/grad_norm"])
            for record in read_records(run_dir / "metrics.jsonl")
            if "train/loss" in record
        ]
        for run_dir in (alone[0], tmp_path / "run")
    )
    assert first == second
