"""A run that is told to stop, or out of time, saves and goes on later as if nothing had happened."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from llm_parallel.errors import EXIT_STOPPED
from tests.support.commands import (
    COMMAND,
    TIMEOUT_S,
    Corpus,
    environment,
    events,
    losses,
    train_in_ranks,
    write_run_file,
)
from tests.support.harness import run_ranks

pytestmark = pytest.mark.gloo

# The learning rate must not depend on how many steps a run is meant to take.
CONSTANT = {"schedule": "constant", "min_lr": 3e-3}


def test_sigterm_saves_and_the_next_start_continues_exactly(corpus: Corpus, tmp_path: Path) -> None:
    run_file = write_run_file(
        corpus, tmp_path / "stopped", optim=CONSTANT, train={"steps": 100_000}, parallel={"tp": 2}
    )
    run_dir = tmp_path / "stopped" / "run"
    with subprocess.Popen(
        [*COMMAND, "pretrain", str(run_file)],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as launcher:
        try:
            deadline = time.monotonic() + TIMEOUT_S
            while not (run_dir / "metrics.jsonl").exists() or not losses(run_dir):
                assert launcher.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            launcher.send_signal(signal.SIGTERM)
            output, errors = launcher.communicate(timeout=TIMEOUT_S)
        finally:
            launcher.kill()
    assert launcher.returncode == EXIT_STOPPED, output + errors
    assert errors.splitlines() == [f"next: llm-parallel pretrain {run_file}"]
    assert "stopping after step" in output
    assert sorted(path.name for path in (run_dir / "logs").glob("rank_*.log")) == ["rank_0.log", "rank_1.log"]
    stopped = max(losses(run_dir))
    latest = run_dir / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert int(latest.read_text()) == stopped
    assert [event["step"] for event in events(run_dir, "stop")] == [stopped]
    steps = f"train.steps={stopped + 3}"
    assert train_in_ranks(run_file, 2, steps) == [stopped + 3] * 2
    undisturbed = write_run_file(corpus, tmp_path / "undisturbed", optim=CONSTANT, parallel={"tp": 2})
    train_in_ranks(undisturbed, 2, steps)
    assert losses(run_dir) == losses(tmp_path / "undisturbed" / "run")


def test_the_time_limit_saves_and_ends_the_run(corpus: Corpus, tmp_path: Path) -> None:
    run_file = write_run_file(corpus, tmp_path, optim=CONSTANT, train={"steps": 100_000})
    stopped = train_in_ranks(run_file, 1, "train.time_limit_s=1.5")[0]
    assert 1 <= stopped < 100_000
    run_dir = tmp_path / "run"
    assert [event["step"] for event in events(run_dir, "stop")] == [stopped]
    assert (run_dir / "checkpoints" / f"iter_{stopped:07d}").is_dir()
    assert train_in_ranks(run_file, 1, f"train.steps={stopped + 2}") == [stopped + 2]
    assert list(losses(run_dir)) == list(range(1, stopped + 3))


def threads_of_a_failed_start(rank: int, world_size: int, run_file: str) -> list[str]:
    """Threads that are left when a start fails after the first of them began."""
    from llm_parallel.config.load import load_config
    from llm_parallel.train import open as opening
    from llm_parallel.train.loop import run_training
    from llm_parallel.train.preflight import preflight
    from llm_parallel.train.run import Place

    def fails(*_: object) -> None:
        assert "micro-batches" in {thread.name for thread in threading.enumerate()}
        raise ConnectionError("a peer is gone")

    opening.open_comm_time = fails
    before = set(threading.enumerate())
    with pytest.raises(ConnectionError, match="a peer is gone"):
        run_training(preflight(load_config(run_file, notice=lambda _: None), world_size), Place(rank, 1, rank))
    return [thread.name for thread in set(threading.enumerate()) - before]


def test_a_start_that_fails_leaves_no_thread(corpus: Corpus, tmp_path: Path) -> None:
    """A survivor of a recovery would hold the groups of every generation that it could not enter."""
    run_file = write_run_file(corpus, tmp_path, log={"tensorboard": True})
    assert run_ranks(threads_of_a_failed_start, 1, str(run_file)) == [[]]
