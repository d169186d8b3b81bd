"""Nodes that fall silent, under a real Slurm. Killing a process does not show this, since its kernel closes the
connections."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from llm_launch.show import timeline
from tests.slurm.cluster import until
from tests.slurm.namespaces import Namespaces, why_not
from tests.slurm.submitted import Submitted
from tests.support.commands import Corpus

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture
def cluster(folder: Path, request: pytest.FixtureRequest) -> Iterator[Namespaces]:
    """Four idle nodes."""
    with Namespaces(folder / request.node.name) as slurm:
        yield slurm


def reaches(cluster: Namespaces, node: str) -> bool:
    """Whether the machine of slurmctld gets an answer from the node's slurmd."""
    return bool(cluster.run(["bash", "-c", f"timeout 3 bash -c '</dev/tcp/{node}/{cluster.port + 1}' && echo yes"],
                            check=False))  # fmt: skip


def workers(cluster: Namespaces, node: str) -> list[psutil.Process]:
    """Processes on the node that train or wait to: those that the zygote forked."""
    zygotes = [p for p in cluster.processes(node) if "llm_launch.zygote" in p.cmdline()]
    return [p for p in zygotes if p.parent() in zygotes]


def test_nodes_have_names_addresses_and_memory_of_their_own(cluster: Namespaces) -> None:
    told = cluster.run(["srun", "-N4", "-l", "bash", "-c", "touch /dev/shm/$(hostname); echo $(hostname) /dev/shm/*"])
    assert sorted(told.splitlines()) == [f"{rank}: n{rank + 1} /dev/shm/n{rank + 1}" for rank in range(4)]
    assert not any(Path("/dev/shm", name).exists() for name in cluster.nodes)


def test_a_cut_node_lives_and_a_switched_off_one_does_not(cluster: Namespaces) -> None:
    assert reaches(cluster, "n2") and reaches(cluster, "n3")
    cluster.partition("n2")
    cluster.power_off("n3")
    assert not reaches(cluster, "n2") and not reaches(cluster, "n3") and reaches(cluster, "n4")
    assert [p.name() for p in cluster.processes("n2")].count("slurmd") == 1
    cluster.heal("n2")
    cluster.boot("n3")
    until(lambda: reaches(cluster, "n2") and reaches(cluster, "n3"), 30, "an answer of both nodes")
    cluster.wait_for_nodes(4, ("idle",), 30)
    assert len(cluster.run(["srun", "-N4", "hostname"]).split()) == 4


def test_down_leaves_nothing(folder: Path) -> None:
    with Namespaces(folder / "brief", nodes=2) as slurm:
        every = [process for name in ("", "n1", "n2") for process in slurm.processes(name)]
        assert sorted(p.name() for p in every if "slurm" in p.name()) == [
            "slurmctld",
            "slurmd",
            "slurmd",
            "slurmscriptd",
        ]
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in every)


@pytest.mark.slow
def test_a_node_cut_off_and_back_does_not_split_the_run(cluster: Namespaces, corpus: Corpus) -> None:
    """The other three go on. On the lone node what trained ends, also without a word from anybody; once back, it is
    taken in again or waits, but trains at nothing of its own."""
    submitted = Submitted(cluster, corpus)
    submitted.reach(8)
    batch_host = cluster.job(submitted.job)["BatchHost"]
    cut = next(node for node in reversed(cluster.nodes) if node != batch_host)
    trained = workers(cluster, cut)
    assert trained
    cluster.partition(cut)
    until(lambda: len(submitted.events("form")) == 2, 60, "a new world")
    until(lambda: not any(p.is_running() for p in trained), 30, f"the end of what trained on {cut}")
    cluster.heal(cut)
    submitted.goes_on_with(3)
    job = submitted.stop()
    assert job["ExitCode"] == "3:0" and job["Restarts"] == "0", submitted.log()
    submitted.assert_at_most_one_step_again()
    assert submitted.events("form")[1]["world_size"] == 3, "\n".join(timeline(submitted.run))
    assert submitted.events("form")[1]["cause"] == "memory"


@pytest.mark.slow
def test_a_node_switched_off_does_not_end_the_run(cluster: Namespaces, corpus: Corpus) -> None:
    submitted = Submitted(cluster, corpus)
    submitted.reach(8)
    batch_host = cluster.job(submitted.job)["BatchHost"]
    cluster.power_off(next(node for node in reversed(cluster.nodes) if node != batch_host))
    submitted.goes_on_with(3)
    job = submitted.stop()
    assert job["ExitCode"] == "3:0" and job["Restarts"] == "0", submitted.log()
    submitted.assert_at_most_one_step_again()
    assert [form["world_size"] for form in submitted.events("form")][:2] == [4, 3], "\n".join(timeline(submitted.run))
