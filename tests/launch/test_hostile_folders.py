"""Run folders in which somebody else has put what no run of ours writes: pipes, devices, files without an end, links,
names and texts that a terminal or a shell would act on."""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from llm_launch.copy_files import run_number
from llm_launch.job_record import JobRecord, read_record
from llm_launch.lease import Lease, read_holder
from llm_launch.show import next_command, show_events, show_status
from llm_launch.standing import read_elastic
from llm_parallel.errors import UserError
from llm_parallel.files import open_to_append, read_small
from llm_parallel.jsonlines import JsonLines, read_jsonlines
from llm_parallel.lines import CONTROL, note, say
from llm_parallel.screen import say_next, show
from tests.launch.test_private import STRANGER, as_stranger, needs_root, shm  # noqa: F401  (a fixture)

READ = (
    *("lease.json", ".lease.lock", "run_id", "elastic.json", "slurm.json", "config.yaml", "metrics.jsonl"),
    *("events.jsonl", "checkpoints/latest_checkpointed_iteration.txt", "logs/error_rank_0.json"),
)
"""Files that are read by their names."""
RECORD = {"event": "run_start", "step": 0, "total_steps": 10, "time": "2026-11-30T02:46:18+00:00"}


def a_pipe(path: Path) -> None:
    """At which a reader waits for ever."""
    os.mkfifo(path)


def a_device(path: Path) -> None:
    """Without an end."""
    path.symlink_to("/dev/zero")


def a_sparse_file(path: Path) -> None:
    """Larger than the memory of a machine, on a disk of any size; of one line."""
    with path.open("wb") as handle:
        handle.truncate(1 << 30)


def lists_within_lists(path: Path) -> None:
    """More than Python's stack holds."""
    path.write_text("[" * 200_000 + "\n")


def a_run(folder: Path) -> Path:
    """The folder of a run that has begun."""
    for name in ("checkpoints", "logs"):
        (folder / name).mkdir(parents=True)
    for name in ("metrics.jsonl", "events.jsonl"):
        (folder / name).write_text(json.dumps(RECORD) + "\n")
    (folder / "config.yaml").write_text("method: {kind: sft}\n")
    return folder


LOOK = """
import io, resource, sys
from pathlib import Path
from rich.console import Console
from llm_launch.show import show_events, show_status
from llm_parallel import files, jsonlines
from llm_parallel.errors import UserError
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
jsonlines.LINE_BYTES = 1 << 22
files.read_small.__defaults__ = (1 << 22,)
for folder in map(Path, sys.argv[1:]):
    for look in (
        lambda: show_status(folder, Console(file=io.StringIO()), {}),
        lambda: show_events(folder, False, False, lambda _: None),
        lambda: show_events(folder, True, False, lambda _: None),
    ):
        try:
            look()
        except UserError as error:
            assert "cannot read" in str(error), error
    print(folder.name, flush=True)
"""


@pytest.mark.processes
def test_whatever_lies_in_a_run_folder_can_be_looked_at(tmp_path: Path) -> None:
    """By ``status`` and ``events`` with a gigabyte of memory, before the time that ends a hang."""
    folders = []
    for make in (a_pipe, a_device, a_sparse_file, lists_within_lists):
        for name in READ:
            folder = a_run(tmp_path / f"{make.__name__}-{name.replace('/', '-')}")
            (folder / name).unlink(missing_ok=True)
            make(folder / name)
            folders.append(folder)
    done = subprocess.run([sys.executable, "-c", LOOK, *folders], capture_output=True, text=True, timeout=600)
    assert done.stdout.split() == [folder.name for folder in folders], done.stderr[-2000:]


@pytest.mark.parametrize("make", [a_pipe, a_device, a_sparse_file, lists_within_lists])
def test_a_start_takes_nothing_else_for_a_record(make: Callable[[Path], None], tmp_path: Path) -> None:
    """What a start reads: nobody holds the folder, no number, no earlier state, and the lease is taken."""
    for name in ("lease.json", "slurm.json", "elastic.json"):
        make(tmp_path / name)
    assert read_holder(tmp_path / "lease.json") is read_record(tmp_path) is read_elastic(tmp_path) is None
    with Lease(tmp_path):
        holder = read_holder(tmp_path / "lease.json")
        assert holder is not None and holder.pid == os.getpid()


def test_only_regular_files_of_a_sensible_size_are_read(tmp_path: Path) -> None:
    a_pipe(tmp_path / "pipe")
    a_device(tmp_path / "device")
    (tmp_path / "large").write_bytes(b"1" * 100)
    for name, why in (("pipe", "no regular file"), ("device", "no regular file"), ("large", "File too large")):
        with pytest.raises(OSError, match=why):
            read_small(tmp_path / name, 99)
    assert read_small(tmp_path / "large", 100) == b"1" * 100
    with pytest.raises(OSError, match="no regular file"):
        run_number_of(tmp_path)


def run_number_of(folder: Path) -> str | None:
    """The run's number, where a pipe has its name."""
    a_pipe(folder / "run_id")
    return run_number(folder)


@pytest.mark.parametrize("record", [{"job": "--help"}, {"job": "1 -M x"}, {"job": "12;x"}])
def test_a_job_is_a_number_before_any_command_gets_it(record: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "slurm.json").write_text(json.dumps(record))
    assert read_record(tmp_path) is None
    for good in ("12", "12_3", "12_[0-3%2]", "12+1"):
        (tmp_path / "slurm.json").write_text(json.dumps({"job": good}))
        assert read_record(tmp_path) == JobRecord(good)


@pytest.mark.parametrize("state", ["finished", "failed", "running", "stopped"])
@pytest.mark.parametrize("elastic", [False, True])
def test_the_next_command_is_one_command_whatever_the_folders_name(state: str, elastic: bool, tmp_path: Path) -> None:
    """A name with which a copied line would run something else."""
    folder = tmp_path / "x; touch pwned $(id) 'y"
    folder.mkdir()
    words = shlex.split(next_command(folder, state, elastic), comments=True)
    assert words[0] == "llm-parallel" and len(words) <= 5
    assert any(word.startswith(str(folder)) for word in words), words


EVIL = "n\x1b[2J\x1b]52;c;AAAA\x07\x9b1\u202e"


@pytest.mark.parametrize("way", [note, say, show, say_next])
def test_no_text_acts_on_a_terminal(way: Callable[[str], None], capsys: pytest.CaptureFixture[str]) -> None:
    """A file's name in an error, a node's in a message, a folder's in the next command."""
    way(f"error: {EVIL} cannot be read")
    out, err = capsys.readouterr()
    assert "␛[2J" in out + err and not CONTROL.search(out + err)


def test_a_folders_name_in_the_status_does_nothing_on_a_terminal(tmp_path: Path) -> None:
    folder, out = a_run(tmp_path / EVIL.replace("/", "")), io.StringIO()
    show_status(folder, Console(file=out), {})
    assert not CONTROL.search(out.getvalue())
    with pytest.raises(UserError, match="cannot read"):
        show_events(tmp_path / "none", False, False, lambda _: None)


@needs_root
def test_no_log_is_written_through_a_strangers_link(shm: Path, tmp_path: Path) -> None:  # noqa: F811
    """Into which our lines would go; a link of our own is followed. A pipe that nobody reads is not waited for."""
    victim = tmp_path / "authorized_keys"
    victim.write_text("mine\n")
    shared = shm / "run"
    shared.mkdir()
    shared.chmod(0o777)
    assert (
        as_stranger(f"cd {shared} && ln -s {victim} events.jsonl && ln -s {victim} n1.log && mkfifo pipe").returncode
        == 0
    )
    with pytest.raises(UserError, match=f"events.jsonl: it is a symbolic link of user {STRANGER}"):
        JsonLines(shared / "events.jsonl")
    with pytest.raises(PermissionError, match="symbolic link of user"):
        open_to_append(shared / "n1.log")
    with pytest.raises(OSError, match="No such device"):
        open_to_append(shared / "pipe")
    assert victim.read_text() == "mine\n"
    (tmp_path / "mine").symlink_to(victim)
    os.close(open_to_append(tmp_path / "mine"))
    lines = JsonLines(tmp_path / "mine")
    lines.append({"step": 1})
    lines.close()
    assert [record["step"] for record in read_jsonlines(victim)] == [1]


@needs_root
def test_a_run_folder_that_a_stranger_prepared_is_refused(shm: Path, tmp_path: Path) -> None:  # noqa: F811
    """A link in it to a folder of the victim's, and a folder of his around it, in which he could exchange it."""
    shared = shm / "run"
    shared.mkdir()
    shared.chmod(0o777)
    assert as_stranger(f"ln -s {tmp_path} {shared}/logs; mkdir -m 777 {shm}/theirs").returncode == 0
    with pytest.raises(UserError, match=f"run/logs is a symbolic link of user {STRANGER}; remove it"), Lease(shared):
        pass
    with pytest.raises(UserError, match=f"theirs belongs to user {STRANGER}"), Lease(shm / "theirs" / "run"):
        pass


def test_a_run_folder_that_everyone_may_change_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o777)
    with Lease(tmp_path):
        pass
    said = capsys.readouterr().err
    assert "every user of this machine may change the run and its checkpoints (mode 0777)" in said
    assert f"chmod o-w {tmp_path}" in said
    tmp_path.chmod(0o775)
    with Lease(tmp_path):
        pass
    assert not capsys.readouterr().err
