"""One run folder, one run: whoever comes second is told who holds it, from this machine and from others."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llm_launch import lease as lease_module
from llm_launch.lease import Holder, Lease, read_holder
from llm_parallel.errors import UserError
from tests.integration.conftest import corpus  # noqa: F401  (a fixture)
from tests.launch.in_process import refusal
from tests.support.commands import COMMAND, Corpus, assert_refused, environment, llm_parallel, write_run_file

ELSEWHERE = Holder("node7", 4711, "another boot", "2026-11-29 10:00:00 UTC", "of another", "99", 0, 5)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beats a hundred times as often as a real run."""
    monkeypatch.setattr(lease_module, "BEAT_S", 0.05)


def hold(folder: Path) -> subprocess.Popen[str]:
    """Another process with the lease, until it is ended."""
    program = (
        "import sys, time; from pathlib import Path; from llm_launch.lease import Lease\n"
        "with Lease(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    return holder


@pytest.mark.parametrize("stopped", [False, True], ids=["alive", "stopped"])
def test_the_second_on_this_machine_is_refused(stopped: bool, tmp_path: Path) -> None:
    """For as long as the first exists: one that is stopped may go on. Killed, it is gone at once."""
    with hold(tmp_path) as holder:
        if stopped:
            holder.send_signal(signal.SIGSTOP)
        try:
            said = rf"run_dir = {tmp_path} is in use by process {holder.pid} on .*, since 20.*remove .*/lease\.json"
            with pytest.raises(UserError, match=said), Lease(tmp_path):
                pass
            (tmp_path / "lease.json").unlink()  # as the sentence says, though it is not gone
            with pytest.raises(UserError, match="is in use by another process"), Lease(tmp_path):
                pass
        finally:
            holder.kill()
    with Lease(tmp_path) as mine:
        assert read_holder(tmp_path / "lease.json") == mine.holder
    assert not (tmp_path / "lease.json").exists(), "given back"


def write(folder: Path, holder: Holder) -> None:
    """A record as another machine leaves it."""
    (folder / "lease.json").write_bytes(holder.encode())


@pytest.fixture
def living(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A holder on another machine, whose locks are not seen here, counts up: a hundred times while it is watched."""
    monkeypatch.setattr(lease_module, "BEAT_S", 2.0)
    over = threading.Event()

    def beat() -> None:
        with (tmp_path / "lease.json").open("r+b") as record:
            for count in range(10**6):
                os.pwrite(record.fileno(), replace(ELSEWHERE, beats=count).encode(), 0)
                if over.wait(0.07):
                    return

    write(tmp_path, ELSEWHERE)
    thread = threading.Thread(target=beat)
    thread.start()
    yield
    over.set()
    thread.join()


def test_one_that_lives_on_another_machine_is_seen(living: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="in use by process 4711 on node7, SLURM job 99, since"), Lease(tmp_path):
        pass


def test_one_that_died_on_another_machine_is_waited_for_and_replaced(tmp_path: Path) -> None:
    """By this machine's clock alone: the times in the record may be of any year."""
    write(tmp_path, replace(ELSEWHERE, since="2126-01-01 00:00:00 UTC"))
    began = time.monotonic()
    with Lease(tmp_path, {}) as mine:
        assert time.monotonic() - began >= lease_module.DEAD_BEATS * lease_module.BEAT_S
        assert read_holder(tmp_path / "lease.json").token == mine.holder.token  # type: ignore[union-attr]


def test_the_next_start_of_the_same_slurm_job_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "BEAT_S", 600.0)
    write(tmp_path, ELSEWHERE)
    with Lease(tmp_path, {"SLURM_JOB_ID": "99", "SLURM_RESTART_COUNT": "1"}):
        pass


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"{}"])
def test_a_damaged_record_keeps_nobody_out(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "lease.json").write_bytes(content)
    with Lease(tmp_path):
        pass


def test_a_holder_that_was_replaced_ends(tmp_path: Path) -> None:
    """As one that was cut off from the file system for so long that another machine took the folder."""
    said: list[str] = []
    told = threading.Event()

    def lost(text: str) -> None:
        said.append(text)
        told.set()

    with Lease(tmp_path, {}, lost):
        write(tmp_path, ELSEWHERE)
        assert told.wait(60)
    assert f"run_dir = {tmp_path} was taken over by process 4711 on node7" in said[0]
    assert read_holder(tmp_path / "lease.json") == ELSEWHERE, "the other's is left"


def test_a_record_that_somebody_removed_comes_back(tmp_path: Path) -> None:
    with Lease(tmp_path) as mine:
        (tmp_path / "lease.json").unlink()
        deadline = time.monotonic() + 60
        while read_holder(tmp_path / "lease.json") is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        beats = mine.holder.beats
        while mine.holder.beats <= beats:
            time.sleep(0.01)
        assert json.loads((tmp_path / "lease.json").read_text())["token"] == mine.holder.token


def test_a_lock_that_somebody_removed_is_taken_again(tmp_path: Path) -> None:
    """With the whole folder: a lock on a file without a name would keep nobody out."""
    with Lease(tmp_path / "run"):
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").mkdir()
        deadline = time.monotonic() + 60
        while not ((tmp_path / "run" / lease_module.LOCK_NAME).exists() and (tmp_path / "run" / "lease.json").exists()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(UserError, match="is in use by"), Lease(tmp_path / "run"):
            pass


def test_without_locks_the_record_decides(living: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared file system without flock refuses the call."""

    def refuse(*_: Any) -> None:
        raise OSError(38, os.strerror(38))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(UserError, match="in use by process 4711"), Lease(tmp_path):
        pass


@pytest.mark.gloo
@pytest.mark.parametrize("first", ["launch", pytest.param("pretrain", marks=pytest.mark.slow)])
def test_the_commands_keep_each_other_out(first: str, corpus: Corpus, tmp_path: Path) -> None:  # noqa: F811
    """Whichever comes first; one of those that come second is a process, whose status is 2."""
    run_file = write_run_file(corpus, tmp_path, train={"steps": 100_000})
    run_dir = tmp_path / "run"
    with subprocess.Popen([*COMMAND, first, str(run_file)], env=environment(), stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL) as running:  # fmt: skip
        try:
            deadline = time.monotonic() + 300
            while read_holder(run_dir / "lease.json") is None:
                assert running.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            assert_refused(llm_parallel("launch", run_file), "is in use by process", str(running.pid))
            assert f"is in use by process {running.pid}" in refusal("pretrain", run_file)
        finally:
            running.terminate()
            running.wait(300)
    assert not (run_dir / "lease.json").exists()
