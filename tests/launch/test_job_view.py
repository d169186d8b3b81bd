"""What ``status`` says of a run that is a SLURM job, before, while and after it runs, from whatever machine."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llm_launch import run_status
from llm_launch.job_record import JobRecord
from llm_launch.job_view import JobView, look, word
from llm_launch.lease import BEAT_S, DEAD_BEATS, Lease
from llm_launch.run_status import SignsOfLife, living_holder
from llm_launch.show import show_status
from llm_launch.standing import stand

BEGUN = JobRecord("12", begun=True)
AGAIN = replace(BEGUN, start=0, kept=72, ended="requeued: time limit")
LOCAL = ("training", "")
STOPPED = ("stopped", "")
WORDS: dict[str, tuple[JobView, JobRecord, bool, tuple[str, str], tuple[str, str]]] = {
    "waits for the first time": (
        JobView("PENDING", reason="Resources"), JobRecord("12"), False, ("ended", ""),
        ("pending", "waits for its nodes (resources)"),
    ),
    "expected": (
        JobView("PENDING", reason="ReqNodeNotAvail", starts="2026-11-30T18:00:00"), JobRecord("12"), False,
        ("ended", ""), ("pending", "waits for its nodes (req node not avail), expected at 2026-11-30 18:00:00"),
    ),
    "on hold": (
        JobView("PENDING", reason="JobHeldUser", starts="2026-11-30T18:00:00"), JobRecord("12"), False, ("ended", ""),
        ("pending", "waits for its nodes (job held user), on hold: scontrol release 12 lets it run"),
    ),
    "requeued at its time limit": (
        JobView("PENDING", 1, "BeginTime"), AGAIN, False, STOPPED,
        ("requeued", "waits for its start 2 (begin time); its last start ended: time limit"),
    ),
    "requeued, and its processes are just ending": (
        JobView("COMPLETING", 1), AGAIN, False, STOPPED,
        ("requeued", "waits for its start 2; its last start ended: time limit"),
    ),
    "trains": (JobView("RUNNING", nodes="n[1-4]"), BEGUN, True, LOCAL, LOCAL),
    "trains in its second start": (JobView("RUNNING", 1), replace(BEGUN, start=1), True, LOCAL, LOCAL),
    "starts": (JobView("RUNNING"), JobRecord("12"), False, ("ended", ""), ("starting", "")),
    "starts again": (JobView("RUNNING", 1), AGAIN, False, STOPPED, ("starting", "")),
    "has just ended": (
        JobView("RUNNING"), replace(BEGUN, ended="SLURM refuses it"), False, STOPPED, ("ending", "SLURM refuses it"),
    ),
    "its first node is gone": (
        JobView("RUNNING"), BEGUN, False, ("ended", "the launcher is gone"),
        ("running", "its launcher gives no sign of life; SLURM has not missed its node yet"),
    ),
    "suspended": (
        JobView("SUSPENDED"), BEGUN, False, ("ended", "the launcher is gone"),
        ("suspended", "SLURM has stopped its processes, and scontrol resume lets them go on"),
    ),
    "cancelled": (JobView("CANCELLED"), BEGUN, False, STOPPED, ("cancelled", "")),
    "behind a job that trains": (
        JobView("PENDING", reason="Dependency"), JobRecord("12"), False, ("ended", "no step was begun"),
        ("pending", "waits for another job (dependency)"),
    ),
    "behind a job that failed": (
        JobView("CANCELLED", reason="DependencyNeverSatisfied"), JobRecord("12"), False, ("ended", "no step was begun"),
        ("cancelled", "a job that it was to start after has not made all its steps"),
    ),
    "being cancelled": (JobView("COMPLETING"), BEGUN, False, STOPPED, ("ending", "")),
    "cancelled when all was done": (JobView("CANCELLED"), BEGUN, False, ("finished", ""), ("finished", "")),
    "preempted for good": (
        JobView("PREEMPTED"), BEGUN, False, STOPPED,
        ("preempted", "SLURM gave its nodes to another job, and did not put it back into the queue"),
    ),
    "ended by its time limit": (
        JobView("TIMEOUT"), BEGUN, False, ("ended", "x"), ("stopped", "SLURM ended the job at its time limit"),
    ),
    "stopped by its user": (JobView("FAILED", exit_code="3:0"), BEGUN, False, STOPPED, STOPPED),
    "given up": (
        JobView("FAILED", exit_code="1:0"), replace(BEGUN, ended="5 starts in a row"), False, STOPPED,
        ("failed", "5 starts in a row"),
    ),
    "failed": (
        JobView("FAILED", exit_code="1:0"), BEGUN, False, ("failed", "boom"), ("failed", "boom"),
    ),
    "refused before it began": (
        JobView("FAILED", exit_code="2:0"), JobRecord("12"), False, ("ended", "no step was begun"),
        ("failed", "exit status 2; see its log"),
    ),
    "a node failed": (
        JobView("NODE_FAIL"), BEGUN, False, ("ended", "x"),
        ("failed", "one of its nodes failed, and SLURM did not put it back into the queue"),
    ),
    "no memory": (
        JobView("OUT_OF_MEMORY", exit_code="0:125"), BEGUN, False, ("ended", "x"),
        ("failed", "a process needed more of the host's memory than the job was given (sbatch --mem)"),
    ),
    "all steps": (JobView("COMPLETED"), BEGUN, False, ("finished", ""), ("finished", "")),
}  # fmt: skip


@pytest.mark.parametrize("name", WORDS)
def test_the_word_for_a_run(name: str) -> None:
    view, record, alive, local, expected = WORDS[name]
    assert word(view, record, alive, local) == expected


def slurm(folder: Path, **answers: str) -> dict[str, str]:
    """An environment in which SLURM's commands answer so; the others fail."""
    folder.mkdir(exist_ok=True)
    for name in ("scontrol", "sacct"):
        text = f"cat <<'END'\n{answers[name]}\nEND" if name in answers else "echo no such job >&2; exit 1"
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:/bin:/usr/bin"}


def test_what_slurmctld_says(tmp_path: Path) -> None:
    line = "JobId=12 JobState=PENDING Reason=BeginTime Restarts=2 ExitCode=0:0 StartTime=2026-11-30T18:00:00 NodeList="
    views, complaint = look("12", slurm(tmp_path, scontrol=line))
    assert views == [JobView("PENDING", 2, "BeginTime", starts="2026-11-30T18:00:00")] and not complaint


def test_what_the_accounting_says_when_slurmctld_has_forgotten(tmp_path: Path) -> None:
    views, complaint = look("12", slurm(tmp_path, sacct="12|CANCELLED by 0|0:15|n[1-4]"))
    assert views == [JobView("CANCELLED", exit_code="0:15", nodes="n[1-4]")] and not complaint


def test_what_is_said_when_nobody_knows(tmp_path: Path) -> None:
    assert look("12", slurm(tmp_path)) == ([], "SLURM knows no job 12 any more")
    assert look("12", {"PATH": str(tmp_path / "none")})[1].startswith("SLURM's commands are not installed here")
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho Unable to contact slurm controller >&2; exit 1\n")
    assert look("12", {"PATH": f"{tmp_path}:/bin:/usr/bin"})[1].startswith("slurmctld does not answer")


def test_tasks_of_an_array(tmp_path: Path) -> None:
    lines = "JobId=12 ArrayJobId=12 ArrayTaskId=3-5,8%2 JobState=PENDING\nJobId=14 ArrayTaskId=2 JobState=RUNNING"
    views, _ = look("12", slurm(tmp_path, scontrol=lines))
    assert [[number for number in range(10) if view.is_task(number)] for view in views] == [[3, 4, 5, 8], [2]]


def written(run_dir: Path, steps: int, total: int, phase: str) -> Path:
    """The folder of an elastic run after some steps."""
    run_dir.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = [{"event": "run_start", "step": 0, "total_steps": total}]
    records += [{"step": step, "train/loss": 1.5} for step in range(1, steps + 1)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    elastic = {"state": phase, "generation": 1, "step": steps, "world_size": 4, "layout": "DP 4", "recoveries": 0}
    elastic |= {"lost_steps": 0, "nodes": [], "excluded": [], "crowded": None}
    elastic["goodput"] = {"elapsed_s": 9.0, "down_s": 0.0, "fraction": 1.0}
    (run_dir / "elastic.json").write_text(json.dumps(elastic))
    return run_dir


def shown(run_dir: Path, environment: dict[str, str]) -> tuple[Sequence[str], str]:
    out = io.StringIO()
    hint = show_status(run_dir, Console(file=out, width=120), environment)
    return out.getvalue().splitlines(), hint


def test_a_requeued_run(tmp_path: Path) -> None:
    run_dir = written(tmp_path / "run", 72, 200, "stopped")
    AGAIN.write(run_dir)
    lines, hint = shown(run_dir, slurm(tmp_path / "bin", scontrol="JobId=12 JobState=PENDING Reason=None Restarts=1"))
    assert lines[0] == (
        f"{run_dir}: requeued (SLURM job 12, start 2): waits for its start 2; its last start ended: time limit"
    )
    assert lines[1].startswith("step 72 of 200, loss 1.5000, generation 1, 4 processes")
    assert hint == "squeue --start --jobs 12"


def test_a_run_that_has_never_begun(tmp_path: Path) -> None:
    JobRecord("12").write(tmp_path)
    lines, hint = shown(tmp_path, slurm(tmp_path / "bin", scontrol="JobId=12 JobState=PENDING Reason=Priority"))
    assert lines[0] == f"{tmp_path}: pending (SLURM job 12): waits for its nodes (priority)"
    assert hint == "squeue --start --jobs 12"


def test_a_cancelled_run_goes_on_by_its_batch_file(tmp_path: Path) -> None:
    run_dir = written(tmp_path / "run", 72, 200, "stopped")
    (run_dir / "submit.sbatch").touch()
    BEGUN.write(run_dir)
    lines, hint = shown(run_dir, slurm(tmp_path / "bin", sacct="12|CANCELLED by 0|0:15|n1"))
    assert lines[0] == f"{run_dir}: cancelled (SLURM job 12 on n1)" and hint == f"sbatch {run_dir}/submit.sbatch"


def test_what_slurm_says_nothing_of(tmp_path: Path) -> None:
    run_dir = written(tmp_path / "run", 72, 200, "stopped")
    BEGUN.write(run_dir)
    lines, _ = shown(run_dir, slurm(tmp_path / "bin"))
    assert lines[0] == f"{run_dir}: stopped (SLURM job 12)" and "SLURM knows no job 12 any more" in lines


def test_a_run_outside_of_slurm_in_the_folder_of_a_job(tmp_path: Path) -> None:
    run_dir = written(tmp_path / "run", 72, 200, "training")
    BEGUN.write(run_dir)
    with Lease(run_dir, {}):
        found = stand(run_dir, BEGUN, ([JobView("CANCELLED")], ""))
    assert found.status.state == "training" and not found.status.job


def test_an_array(tmp_path: Path) -> None:
    """A line for each run: one is done, one trains, one waits, and has no folder."""
    JobRecord("12", folders=["lr=1", "lr=2", "lr=3"]).write(tmp_path)
    JobRecord("12_0", begun=True).write(written(tmp_path / "lr=1", 200, 200, "finished"))
    JobRecord("12_1", begun=True).write(written(tmp_path / "lr=2", 72, 200, "training"))
    answer = "JobId=13 ArrayTaskId=0 JobState=COMPLETED\nJobId=14 ArrayTaskId=1 JobState=RUNNING\n"
    answer += "JobId=12 ArrayTaskId=2 JobState=PENDING Reason=Resources"
    with Lease(tmp_path / "lr=2", {"SLURM_JOB_ID": "14"}):
        lines, hint = shown(tmp_path, slurm(tmp_path / "bin", scontrol=answer))
    assert lines[0] == f"{tmp_path}: SLURM job 12, an array of 3 runs"
    assert [line.replace(" ", "") for line in lines if line.startswith("| lr=")] == [
        "|lr=1|finished|step200of200||",
        "|lr=2|training|step72of200||",
        "|lr=3|pending|step0|waitsforitsnodes(resources)|",
    ]
    assert hint == f"llm-parallel status {tmp_path}/lr=1"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Lease:
    """The record of a run on another machine, whose clock is 45 s behind this one's."""
    lease = Lease(tmp_path)
    lease.holder = replace(lease.holder, host="n1", boot="another", job="12")
    beat(tmp_path, lease)
    return lease


def beat(folder: Path, lease: Lease) -> None:
    lease.holder = replace(lease.holder, beats=lease.holder.beats + 1)
    (folder / "lease.json").write_bytes(lease.holder.encode())
    os.utime(folder / "lease.json", (time.time() - 45, time.time() - 45))


def test_a_wrong_clock_hides_no_run(elsewhere: Lease, tmp_path: Path) -> None:
    """It is seen to live by its next beat."""
    waits: list[float] = []

    def pause(seconds: float) -> None:
        waits.append(seconds)
        if sum(waits) >= BEAT_S:
            beat(tmp_path, elsewhere)

    assert living_holder(tmp_path, pause) == elsewhere.holder and sum(waits) == BEAT_S


def test_a_record_without_beats_is_of_no_run(elsewhere: Lease, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(run_status, "time", Moving(now))
    assert living_holder(tmp_path, lambda seconds: now.__setitem__(0, now[0] + seconds)) is None
    assert now[0] == pytest.approx(DEAD_BEATS * BEAT_S, abs=BEAT_S)


def test_whoever_follows_is_not_held_up(elsewhere: Lease, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits in ``look``; a run that has beaten once is over when it has not beaten for 17.5 s."""
    now = [0.0]
    monkeypatch.setattr(run_status, "time", Moving(now))
    signs = SignsOfLife(tmp_path)
    assert signs.look() == (elsewhere.holder, False)
    beat(tmp_path, elsewhere)
    now[0] = 15.0
    assert signs.look() == (elsewhere.holder, True)
    now[0] = 15.0 + DEAD_BEATS * BEAT_S
    assert signs.look() == (elsewhere.holder, False)
    now[0] += 1.0
    assert signs.look() == (None, True)


class Moving:
    """A clock in a test's hands."""

    def __init__(self, now: list[float]) -> None:
        self.now = now

    def monotonic(self) -> float:
        """The time given."""
        return self.now[0]

    def time(self) -> float:
        """The real one."""
        return time.time()
