"""The end of jobs under a real Slurm. COMPLETED means that all steps are done, and nothing else does."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_launch.live_run import read_lines
from tests.slurm.accounting import Accounted
from tests.slurm.cluster import CONTROL_GROUPS, Cluster, until, why_no_groups, why_not
from tests.slurm.endings import LIMIT_S, PARTITIONS, WAYS, bring_up, end, prepare
from tests.slurm.submitted import Submitted
from tests.support.commands import Corpus

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
AT_WORK = ("starting", "running", "waiting", "forming", "training")
SAID = {
    "COMPLETED": ("finished",),
    "CANCELLED": ("cancelled",),
    "PREEMPTED": ("preempted",),
    "FAILED": ("failed", "stopped"),
    "RUNNING": AT_WORK,
    "requeued": ("requeued", *AT_WORK),  # it may have begun again by then
}
"""State of a job → first words of ``llm-parallel status``."""


@pytest.fixture
def cluster(folder: Path, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Four idle nodes, with accounting where that is installed."""
    more = getattr(request, "param", PARTITIONS)
    if more == CONTROL_GROUPS and (reason := why_no_groups()) is not None:
        pytest.skip(reason)
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)[-40:]
    with bring_up(folder / name, more) as slurm:
        prepare(slurm, more)
        yield slurm


@pytest.mark.slow
@pytest.mark.parametrize(("name", "cluster"), [(name, way.more) for name, way in WAYS.items()], indirect=["cluster"],
                         ids=list(WAYS))  # fmt: skip
def test_how_a_job_ends(name: str, cluster: Cluster, corpus: Corpus) -> None:
    """Its state, and that its next start goes on where it ended."""
    if "QOS" in name and not isinstance(cluster, Accounted):
        pytest.skip("slurm without accounting has no qualities of service (Debian: slurmdbd and mariadb-server-core)")
    way, found = WAYS[name], end(name, cluster, corpus)
    assert found.job.startswith(way.job), found
    assert found.status.split()[0].rstrip(":") in SAID[way.job.split()[0]], found
    if found.accounts:
        states = [account.split()[0] for account in found.accounts]
        assert (way.accounts or way.job.split()[0]) in states, found
    completed = [state for state in [found.job, *found.accounts] if "COMPLETED" in state]
    assert bool(completed) == (name == "all steps"), found
    assert sorted(set(found.steps)) == list(range(1, max(found.steps) + 1)), found
    assert len(found.steps) - len(set(found.steps)) <= way.lost, found


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["--full", "--batch"])
def test_a_stop_that_a_user_asked_for_is_not_completed(whom: str, cluster: Cluster, corpus: Corpus) -> None:
    """By TERM for all of the job or for its script alone. It saves; who waits for the model with afterok waits on."""
    submitted = Submitted(cluster, corpus)
    submitted.reach(3)
    cluster.run(["scancel", "--signal=TERM", whom, submitted.job])
    until(lambda: cluster.job(submitted.job)["JobState"] not in ("RUNNING", "COMPLETING"), LIMIT_S, "the end")
    job = cluster.job(submitted.job)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "3:0", "0"), submitted.log()
    assert submitted.events("stopped") and not submitted.events("requeue")
    assert submitted.status().startswith("stopped (SLURM job ")


@pytest.mark.slow
def test_the_status_of_an_array(cluster: Cluster, corpus: Corpus) -> None:
    """Its first run trains, its second waits for the same nodes, and both are cancelled together."""
    submitted = Submitted(cluster, corpus, "--array", "seed=1,2")
    first = submitted.run / "seed=1" / "metrics.jsonl"
    until(lambda: any("train/loss" in record for record in read_lines(first)), LIMIT_S, "a step of the first run")

    def rows() -> dict[str, list[str]]:
        told = cluster.run([sys.executable, "-m", "llm_parallel.cli", "status", str(submitted.run)], timeout_s=60)
        lines = [line.strip("| ").split(" | ") for line in told.splitlines() if line.startswith("| seed")]
        return {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}

    told = rows()
    assert told["seed=1"][0] == "training" and told["seed=1"][1].endswith("of 100,000"), told
    assert told["seed=2"][0] == "pending" and told["seed=2"][1] == "step 0", told
    cluster.run(["scancel", submitted.job])
    until(lambda: {row[0] for row in rows().values()} == {"cancelled"}, LIMIT_S, "the end of both")
