"""What becomes of a SLURM job at the end of its launcher. Status 0 means that all steps are done and nothing else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_launch import supervised_job as supervised
from llm_launch.job_end import GIVEN_UP, Act, Decision, Known, decide
from llm_launch.job_record import NAME, JobRecord, read_record
from llm_launch.journal import Journal
from llm_launch.live_run import read_lines
from llm_launch.slurm import Fate, SlurmAway, SlurmError, SlurmJob
from llm_launch.states import EXIT_TOO_FEW
from llm_launch.supervised_job import SupervisedJob
from llm_parallel.config.tree import ElasticConfig, ModelConfig, RunConfig
from llm_parallel.errors import EXIT_STOPPED, EXIT_USER_ERROR

STOP, FEW = EXIT_STOPPED, EXIT_TOO_FEW
RUNNING, PREEMPTED, QUEUED, OVER = Fate.RUNNING, Fate.PREEMPTED, Fate.QUEUED, Fate.OVER
TABLE: dict[str, tuple[Known, Decision]] = {
    "all steps": (Known(0), Decision(Act.END, 0)),
    "all steps, just when the time limit was announced": (Known(0, True), Decision(Act.END, 0)),
    "a mistake of the user": (Known(EXIT_USER_ERROR), Decision(Act.END, EXIT_USER_ERROR)),
    "an error of the program, at the time limit": (Known(1, True), Decision(Act.END, 1)),
    "killed": (Known(137), Decision(Act.END, 137)),
    "stopped by its user": (Known(STOP), Decision(Act.END, STOP)),
    "time limit": (Known(STOP, True), Decision(Act.REQUEUE, STOP, "time limit")),
    "time limit while it waited for devices": (Known(FEW, True), Decision(Act.REQUEUE, FEW, "time limit")),
    "too few devices": (Known(FEW), Decision(Act.REQUEUE, FEW, "too few devices")),
    "stopped by its user, who was not heard before too few devices were left": (
        Known(FEW, stop_asked=True),
        Decision(Act.END, FEW),
    ),
    "time limit, and too few devices are left to save": (
        Known(FEW, True, True),
        Decision(Act.REQUEUE, FEW, "time limit"),
    ),
    "preempted": (Known(STOP, fate=PREEMPTED), Decision(Act.REQUEUE, STOP, "preempted")),
    "preempted by the user's signal": (Known(STOP, True, fate=PREEMPTED), Decision(Act.REQUEUE, STOP, "preempted")),
    "preempted while it waited": (Known(FEW, fate=PREEMPTED), Decision(Act.REQUEUE, FEW, "preempted")),
    "in the queue, as asked": (
        Known(STOP, True, fate=QUEUED, asked="time limit"),
        Decision(Act.END, STOP, "time limit", queued=True),
    ),
    "in the queue, as asked, preempted": (
        Known(STOP, fate=QUEUED, asked="preempted"),
        Decision(Act.END, STOP, "preempted", queued=True, counts=False),
    ),
    "in the queue by SLURM": (
        Known(FEW, fate=QUEUED),
        Decision(Act.END, STOP, "SLURM or an operator requeued it", queued=True, counts=False),
    ),
    "cancelled": (
        Known(STOP, fate=OVER),
        Decision(Act.END, STOP, "SLURM has ended this job already", counts=False),
    ),
    "cancelled while it waited": (
        Known(FEW, fate=OVER),
        Decision(Act.END, STOP, "SLURM has ended this job already", counts=False),
    ),
    "cancelled after the request": (
        Known(STOP, True, fate=OVER, asked="time limit"),
        Decision(Act.END, STOP, "SLURM has ended this job already", counts=False),
    ),
    "slurmctld away": (Known(STOP, True, fate=None, waited_s=299.0), Decision(Act.ASK_AGAIN, STOP)),
    "slurmctld away in a long warning": (
        Known(STOP, True, fate=None, waited_s=999.0, patience_s=1000.0),
        Decision(Act.ASK_AGAIN, STOP),
    ),
    "slurmctld away for good": (
        Known(STOP, True, fate=None, waited_s=300.0),
        Decision(Act.END, STOP, "slurmctld has not answered for 300 s", given_up=True),
    ),
    "too few devices, slurmctld away for good": (
        Known(FEW, fate=None, waited_s=300.0),
        Decision(Act.END, FEW, "slurmctld has not answered for 300 s", given_up=True),
    ),
    "--no-requeue": (
        Known(STOP, True, refusal="it may not"),
        Decision(Act.END, STOP, "SLURM refuses it: it may not", given_up=True),
    ),
    "a user's stop, and SLURM knows no such job": (Known(STOP, refusal="no job"), Decision(Act.END, STOP)),
    "the last start but one without progress": (
        Known(STOP, True, fruitless=4),
        Decision(Act.REQUEUE, STOP, "time limit"),
    ),
    "preempted again and again": (Known(STOP, fate=PREEMPTED, fruitless=9), Decision(Act.REQUEUE, STOP, "preempted")),
}
"""What is known → what is done."""


@pytest.mark.parametrize("name", TABLE)
def test_the_decision(name: str) -> None:
    known, decision = TABLE[name]
    assert decide(known) == decision


@pytest.mark.parametrize(("status", "up"), [(STOP, True), (FEW, False)])
def test_requeues_without_progress_are_bounded(status: int, up: bool) -> None:
    found = decide(Known(status, up, fruitless=5))
    assert (found.act, found.status, found.given_up) == (Act.END, GIVEN_UP, True)
    assert found.cause.startswith("5 starts of this job in a row have not kept a later step")
    assert found.cause.endswith("so it is not started again (elastic.max_fruitless)")


ALL = st.builds(
    Known,
    st.sampled_from([0, 1, EXIT_USER_ERROR, STOP, FEW, 130, 137]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, *Fate]),
    st.sampled_from(["", "time limit", "preempted", "too few devices"]),
    st.sampled_from(["", "it may not"]),
    st.floats(0, 1e4),
    st.floats(300, 1e4),
    st.integers(0, 9),
)


@given(ALL)
def test_what_always_holds(known: Known) -> None:
    """Status 0 is that of the run alone; an end that is no requeue has a reason where the run could go on; nothing is
    asked of SLURM for a job that it has ended."""
    found = decide(known)
    assert (found.status == 0) == (known.status == 0)
    assert found.act is not Act.REQUEUE or known.fate in (RUNNING, PREEMPTED)
    assert not (found.given_up or found.queued) or found.cause
    assert found.act is not Act.ASK_AGAIN or known.waited_s < known.patience_s
    assert not (found.queued and known.fate is not QUEUED)


class Job(SlurmJob):
    """A job of which slurmctld says one thing after the other; the last stays. Each is a fate or an error."""

    def __init__(self, *fates: Fate | SlurmError, requeue: SlurmError | None = None, left: float | None = None) -> None:
        super().__init__("7", 0, "n1", {})
        self.__dict__.update(fates=list(fates), refusal=requeue, requeued=[], released=[], left=left)

    def fate(self) -> Fate:
        """The next one."""
        fates = self.__dict__["fates"]
        found = fates.pop(0) if len(fates) > 1 else fates[0]
        if isinstance(found, SlurmError):
            raise found
        return found

    def seconds_left(self) -> float | None:
        """As given."""
        return self.__dict__["left"]

    def requeue(self, exclude: Any = ()) -> None:
        """Notes it."""
        if self.__dict__["refusal"]:
            raise self.__dict__["refusal"]
        self.__dict__["requeued"].append(list(exclude))

    def release(self, exclude: Any) -> None:
        """Notes it."""
        self.__dict__["released"].append(list(exclude))


class Clock:
    """Moves only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        """Seconds slept."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Takes no time."""
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The launcher's, when it asks slurmctld."""
    clock = Clock()
    monkeypatch.setattr(supervised, "time", clock)
    return clock


@pytest.fixture
def journal(tmp_path: Path, clock: Clock) -> Iterator[Journal]:
    """Of a run whose launcher waits in no time."""
    journal = Journal(tmp_path, ElasticConfig(), "of this test")
    yield journal
    journal.close()


def events(folder: Path, journal: Journal) -> list[dict[str, Any]]:
    """What the journal has written."""
    done = threading.Event()
    journal.later(done.set)
    assert done.wait(60)
    return read_lines(folder / "events.jsonl")


def config_of(folder: Path) -> RunConfig:
    return RunConfig(run_dir=str(folder), model=ModelConfig(vocab_size=100))


AWAY, REFUSED = SlurmAway("no answer"), SlurmError("Requested operation is presently disabled")
ENDS = {
    "stopped by its user": (STOP, False, Job(RUNNING), STOP, 0, None),
    "cancelled while it trained": (STOP, False, Job(OVER), STOP, 0, None),
    "cancelled while it waited": (FEW, False, Job(OVER), STOP, 0, None),
    "cancelled a moment before the request": (STOP, True, Job(RUNNING, OVER), STOP, 1, None),
    "time limit": (STOP, True, Job(RUNNING, QUEUED), STOP, 1, "requeue"),
    "preempted with a grace time": (STOP, False, Job(PREEMPTED, QUEUED), STOP, 1, "requeue"),
    "too few devices": (FEW, False, Job(RUNNING, QUEUED), STOP, 1, "requeue"),
    "slurmctld away for a while": (STOP, True, Job(*[AWAY] * 60, RUNNING, QUEUED), STOP, 1, "requeue"),
    "slurmctld away after the request": (STOP, True, Job(RUNNING, AWAY, AWAY, QUEUED), STOP, 1, "requeue"),
    "slurmctld away for good": (STOP, True, Job(AWAY), STOP, 0, "not_requeued"),
    "slurmctld away at every request": (STOP, True, Job(RUNNING, requeue=AWAY), STOP, 0, "not_requeued"),
    "a job that may not be requeued": (STOP, True, Job(RUNNING, requeue=REFUSED), STOP, 0, "not_requeued"),
    "the same with too few devices": (FEW, False, Job(RUNNING, requeue=REFUSED), FEW, 0, "not_requeued"),
    "a request without any effect": (STOP, True, Job(RUNNING), STOP, 3, "not_requeued"),
    "SLURM knows no such job": (STOP, True, Job(SlurmError("no job 7")), STOP, 0, "not_requeued"),
}


@pytest.mark.parametrize("name", ENDS)
def test_what_a_job_ends_with(name: str, tmp_path: Path, journal: Journal) -> None:
    """The batch script's status is never 0, whatever SLURM makes of it. Bad nodes are kept out where it waits again."""
    status, time_is_up, job, expected, requeues, event = ENDS[name]
    asked = SupervisedJob(job, journal, config_of(tmp_path), 0)
    assert asked.settle(status, time_is_up, {"n3": "ECC"}, 12) == expected
    told = events(tmp_path, journal)
    assert job.__dict__["requeued"] == [["n3"]] * requeues
    assert job.__dict__["released"] == ([["n3"]] if event == "requeue" else [])
    assert [record["event"] for record in told] == ([event] if event else [])
    record = read_record(tmp_path)
    assert record is not None and record.kept == 12
    assert record.ended.startswith("requeued: ") == (event == "requeue")


@pytest.mark.parametrize(("left", "asked_s"), [(None, 300), (600.0, 660), (100.0, 300)])
def test_slurmctld_is_asked_for_the_whole_warning(
    left: float | None, asked_s: float, tmp_path: Path, journal: Journal, clock: Clock
) -> None:
    """And for a minute more, since slurmctld alone ends a job at its limit."""
    job = SupervisedJob(Job(AWAY, left=left), journal, config_of(tmp_path), 0)
    assert job.settle(STOP, True, {}, 12) == STOP
    assert clock.now == pytest.approx(asked_s, abs=2 * supervised.AGAIN_S)


def starts(folder: Path, journal: Journal, count: int, **ends: Any) -> list[int]:
    """Exit statuses of the starts of one job that all end alike; -1 for one that was refused."""
    found = []
    for number in range(count):
        record = read_record(folder)
        job = Job(RUNNING, QUEUED)
        job.__dict__["restart_count"] = number
        supervision = SupervisedJob(job, journal, config_of(folder), ends.get("on_disk", 0))
        assert record is None or supervision.record.fruitless <= record.fruitless + 1
        if not supervision.may_begin():
            found.append(-1)
        elif "step" in ends:
            found.append(supervision.settle(STOP, True, {}, ends["step"](number)))
        else:
            found.append(0)  # lost with its node
        events(folder, journal)
    return found


def test_starts_that_keep_no_step_are_counted(tmp_path: Path, journal: Journal) -> None:
    """A time limit that is too short for the first step: the fifth start is the last, and its job fails."""
    assert starts(tmp_path, journal, 5, step=lambda number: 0) == [STOP] * 4 + [GIVEN_UP]
    last = events(tmp_path, journal)[-1]
    assert last["event"] == "not_requeued" and last["cause"].startswith("5 starts of this job in a row")


def test_one_step_in_each_start_is_enough(tmp_path: Path, journal: Journal) -> None:
    assert starts(tmp_path, journal, 9, step=lambda number: number + 1) == [STOP] * 9


def test_the_same_steps_again_are_no_progress(tmp_path: Path, journal: Journal) -> None:
    """Each start makes 40 steps that the next one does not find."""
    assert starts(tmp_path, journal, 6, step=lambda number: 40)[-1] == GIVEN_UP


def test_a_job_that_loses_its_first_node_again_and_again(tmp_path: Path, journal: Journal) -> None:
    """Nobody of ours decides on those requeues, so the sixth start is refused."""
    assert starts(tmp_path, journal, 6) == [0] * 5 + [-1]


def test_the_record_survives_whatever_is_in_its_place(tmp_path: Path) -> None:
    record = JobRecord("12", 1, 30, 2, True, "requeued: time limit", ["optim.lr=1", "optim.lr=2"])
    record.write(tmp_path)
    assert read_record(tmp_path) == record
    again = SlurmJob("12", 2, "n1", {})
    assert record.begin(again, 30) == replace(record, start=2, fruitless=3, ended="")
    assert record.begin(again, 31) == replace(record, start=2, kept=31, fruitless=1, ended="")
    assert record.begin(SlurmJob("13", 0, "n1", {}), 30) == JobRecord("13", 0, 30, 1, True)
    for text in ("", "[]", "{}", '{"job": 3}', '{"job": "3", "kept": "x"}', "\x00"):
        (tmp_path / NAME).write_text(text)
        assert read_record(tmp_path) is None


LINE = "JobId=7 JobState=RUNNING Reason=None Restarts=0 PreemptTime=None"


@pytest.mark.parametrize(
    ("record", "fate"),
    [
        (LINE, RUNNING),
        (LINE.replace("PreemptTime=None", "PreemptTime=2026-11-29T18:00:00"), PREEMPTED),
        (LINE.replace("RUNNING", "CANCELLED"), OVER),
        (LINE.replace("RUNNING", "COMPLETING"), OVER),
        (LINE.replace("Restarts=0", "Restarts=1"), QUEUED),
        (LINE.replace("RUNNING", "COMPLETING").replace("Restarts=0", "Restarts=1"), QUEUED),
        (LINE.replace("RUNNING", "PENDING").replace("Restarts=0", "Restarts=1"), QUEUED),
        (LINE.replace("RUNNING", "CANCELLED").replace("Restarts=0", "Restarts=1"), OVER),
    ],
)
def test_what_slurm_says_of_a_job(record: str, fate: Fate, tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho '{record}'\n")
    scontrol.chmod(0o755)
    assert SlurmJob("7", 0, "n1", {"PATH": f"{tmp_path}:/bin:/usr/bin"}).fate() is fate


TERMINATED = """\
#!/bin/sh
kill -TERM $$ $PPID
case "$*" in
requeue*) touch "$(dirname "$0")/asked"; exit ;;
*) [ -e "$(dirname "$0")/asked" ] && restarts=1
echo "JobId=7 JobState=RUNNING Restarts=${restarts:-0} PreemptTime=None" ;;
esac
"""


def test_slurm_terminates_the_commands_that_ask_it_too(tmp_path: Path, journal: Journal) -> None:
    """At a requeue all processes of the job get TERM, and the launcher still learns that it was requeued."""
    (tmp_path / "scontrol").write_text(TERMINATED)
    (tmp_path / "scontrol").chmod(0o755)
    path = {"PATH": f"{tmp_path}:/bin:/usr/bin"}
    job = SupervisedJob(SlurmJob("7", 0, "n1", path), journal, config_of(tmp_path), 0)
    assert job.settle(STOP, True, {}, 12) == STOP
    assert [event["event"] for event in events(tmp_path, journal)] == ["requeue"]
    (tmp_path / "scontrol").write_text("#!/bin/sh\nkill -KILL $$\n")
    with pytest.raises(SlurmAway, match="was ended by signal 9"):
        job.job.fate()
