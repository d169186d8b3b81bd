"""The end of jobs under a real Slurm: a cancelled one stays cancelled, a preempted one comes back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, until, why_not
from tests.slurm.submitted import Submitted
from tests.support.commands import Corpus

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
PREEMPTION = (
    "PreemptType=preempt/partition_prio\nPreemptMode=REQUEUE\n"
    "PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode={mode} GraceTime=30 State=UP\n"
    "PartitionName=high Nodes=ALL PriorityTier=9 PreemptMode=OFF State=UP\n"
)


@pytest.fixture
def cluster(folder: Path, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Four idle nodes; two partitions of which one takes nodes from the other."""
    mode = getattr(request, "param", "REQUEUE")
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
    with Cluster(folder / name, more=PREEMPTION.format(mode=mode)) as slurm:
        yield slurm


def wait_for_line(submitted: Submitted, text: str) -> None:
    """Until the job's log has it."""
    until(lambda: text in submitted.log(), 60, f"{text!r} in the log")


@pytest.mark.slow
@pytest.mark.parametrize("when", ["starting", "waiting", "training"])
def test_a_cancelled_job_stays_cancelled(when: str, cluster: Cluster, corpus: Corpus) -> None:
    waits = ["elastic.min_devices=5"] if when == "waiting" else []
    submitted = Submitted(cluster, corpus, *waits)
    if when == "starting":
        wait_for_line(submitted, "elastic | SLURM job")
    elif when == "waiting":
        wait_for_line(submitted, "elastic | waiting")
    else:
        submitted.reach(3)
    cluster.run(["scancel", submitted.job])
    until(lambda: cluster.job(submitted.job)["JobState"] == "CANCELLED", 60, "the end")
    until(lambda: not cluster.tasks(), 60, "the end of all its processes, which alone could requeue it")
    job = cluster.job(submitted.job)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0"), submitted.log()
    assert not submitted.events("requeue")
    if when == "training":
        assert submitted.events("stopped")


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["--full", "--batch"])
def test_a_stop_that_a_user_asked_for_is_not_completed(whom: str, cluster: Cluster, corpus: Corpus) -> None:
    """By TERM for all of the job or for its script alone. It saves; who waits for the model with afterok waits on."""
    submitted = Submitted(cluster, corpus)
    submitted.reach(3)
    cluster.run(["scancel", "--signal=TERM", whom, submitted.job])
    until(lambda: cluster.job(submitted.job)["JobState"] not in ("RUNNING", "COMPLETING"), 60, "the end")
    job = cluster.job(submitted.job)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "3:0", "0"), submitted.log()
    assert submitted.events("stopped") and not submitted.events("requeue")


@pytest.mark.slow
@pytest.mark.parametrize("cluster", ["REQUEUE", "CANCEL"], indirect=True)
def test_a_preempted_job_comes_back_and_finishes(cluster: Cluster, corpus: Corpus) -> None:
    """TERM reaches the agents' step alone; the run saves, goes back to the queue, and ends with all steps done."""
    submitted = Submitted(cluster, corpus, "--partition", "low")
    submitted.reach(5)
    urgent = cluster.run(
        ["sbatch", "--parsable", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    )
    last = submitted.end_soon()
    until(lambda: cluster.job(urgent)["JobState"] == "COMPLETED", 200, "the urgent job's end")
    job = submitted.finish()
    assert job["Restarts"] == "1" and submitted.steps() == list(range(1, last + 1)), submitted.log()
    assert [event["cause"] for event in submitted.events("requeue")] == ["preempted"]
