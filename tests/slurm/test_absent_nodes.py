"""Nodes that do not join, under a real Slurm: nodes of other sizes, names that lead nowhere, no environment, a broken
network, a missing mount, missing data. Whatever can train does, and every other node is named with the reason."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from llm_launch.show import timeline
from tests.slurm.cluster import Cluster, until
from tests.slurm.namespaces import Namespaces, why_not
from tests.slurm.submitted import Submitted
from tests.support.commands import Corpus

pytestmark = [pytest.mark.skipif(why_not() is not None, reason=str(why_not())), pytest.mark.slow]
Make = Callable[..., Namespaces]


@pytest.fixture
def make(folder: Path) -> Iterator[Make]:
    """Makes a cluster, which ends with the test. Its folder's name is short: the paths of slurmstepd's sockets may have
    108 bytes."""
    made: list[Namespaces] = []

    def begin(**options: object) -> Namespaces:
        cluster = Namespaces(Path(tempfile.mkdtemp(dir=folder)), **options)  # type: ignore[arg-type]
        made.append(cluster)
        return cluster.__enter__()

    yield begin
    for cluster in made:
        cluster.down()


def status(submitted: Submitted) -> str:
    """What ``llm-parallel status`` says, as one line."""
    command = [sys.executable, "-m", "llm_parallel.cli", "status", str(submitted.run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return " ".join(done.stdout.split())


@contextmanager
def explained(submitted: Submitted) -> Iterator[None]:
    """With the events where something did not happen."""
    try:
        yield
    except (AssertionError, TimeoutError) as error:
        events = "\n".join(timeline(submitted.run)) if (submitted.run / "events.jsonl").exists() else "none"
        job = submitted.cluster.job(submitted.job)
        raise AssertionError(f"{error}\njob: {job}\nevents:\n{events}\nlog:\n{submitted.log()}") from error


def world(submitted: Submitted, size: int) -> None:
    """Waits until so many ranks train."""
    submitted.wait(lambda: any(event["world_size"] == size for event in submitted.events("resume")), f"{size} ranks")


def reasons(submitted: Submitted) -> dict[object, str]:
    """The last reason of each node that has not joined."""
    return {event["node"]: str(event["cause"]) for event in submitted.events("not_joined")}


def test_nodes_of_other_sizes_and_a_job_without_environment(make: Make, corpus: Corpus) -> None:
    """The batch script's node has more CPUs than the other; the job was submitted with --export=NONE."""
    cluster = make(nodes=2, cpus=(8, 3))
    submitted = Submitted(cluster, corpus, "--sbatch=--export=NONE")
    with explained(submitted):
        submitted.reach(3)
        assert [event["world_size"] for event in submitted.events("form")] == [2] and not reasons(submitted)
        assert submitted.stop()["Restarts"] == "0"


def test_a_node_whose_name_leads_to_itself(make: Make, corpus: Corpus) -> None:
    """127.0.1.1 in each node's /etc/hosts, and no addresses in slurm.conf: both nodes train."""
    cluster = make(nodes=2, own_name="127.0.1.1")
    submitted = Submitted(cluster, corpus)
    with explained(submitted):
        submitted.reach(3)
        assert [event["world_size"] for event in submitted.events("form")] == [2] and not reasons(submitted)
        submitted.stop()


def test_an_unreachable_node_comes_when_it_is_back(make: Make, corpus: Corpus) -> None:
    """The other two train without it; Slurm takes it out of the job, and a job of its own brings it back, which ends
    with the run."""
    cluster = make(nodes=3)
    cluster.partition("n3")
    submitted = Submitted(cluster, corpus)
    with explained(submitted):
        world(submitted, 2)
        assert [event["node"] for event in submitted.events("not_joined")][:1] == ["n3"]
        assert "| n3 | not joined |" in status(submitted)
        until(lambda: "brings it back" in reasons(submitted)["n3"], 200, "a job for the node")
        cluster.heal("n3")
        until(lambda: cluster.states()["n3"] != "unknown", 60, "an answer of sinfo")
        cluster.run(["scontrol", "update", "nodename=n3", "state=resume"], check=False)
        world(submitted, 3)
        submitted.reach(max(submitted.steps()) + 2)
        assert submitted.stop()["Restarts"] == "0"
        until(lambda: not cluster.run(["squeue", "-h"]), 60, "the end of the node's job")
        submitted.assert_at_most_one_step_again()


@pytest.mark.parametrize("what", ["job", "data"])
def test_a_node_without_a_mount_is_left_out_until_it_is_there(what: str, make: Make, corpus: Corpus) -> None:
    """The folder of the run or that of its data is empty on one node. It makes nothing there, and ends no run."""
    cluster = make(nodes=2)
    data = cluster.folder / "data"
    data.mkdir()
    for ending in (".bin", ".idx"):
        shutil.copy(f"{corpus.prefix}{ending}", data / f"docs{ending}")
    cluster.hide("n2", cluster.folder / what)
    submitted = Submitted(cluster, replace(corpus, prefix=data / "docs"))
    with explained(submitted):
        world(submitted, 1)
        there = "no run's folder there" if what == "job" else "cannot be read there"
        assert there in reasons(submitted)["n2"] and there in status(submitted)
        assert Cluster.run(cluster, cluster.inside("n2", ["ls", "-A", str(cluster.folder / what)])) == ""
        cluster.show("n2", cluster.folder / what)
        world(submitted, 2)
        assert submitted.stop()["Restarts"] == "0" and not submitted.events("fail")


def test_agents_that_all_end_alike_end_the_job_at_once(make: Make, corpus: Corpus) -> None:
    """srun refuses every step. The run would wait an hour, and the job go back to the queue; instead it fails."""
    cluster = make(nodes=2)
    submitted = Submitted(cluster, corpus, "--sbatch=--export=ALL,SLURM_GRES=gpu:9", "elastic.wait_s=3600")
    with explained(submitted):
        until(lambda: cluster.job(submitted.job)["JobState"] == "FAILED", 200, "the end")
        job = cluster.job(submitted.job)
        assert (job["ExitCode"], job["Restarts"]) == ("1:0", "0")
        (fail,) = submitted.events("fail")
        assert "the agents of all 2 nodes ended alike" in str(fail["cause"]) and "GRES" in str(fail["cause"])
        assert "have GRES" in status(submitted)
