"""Runs under a real Slurm of four nodes on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from llm_launch.show import timeline
from llm_launch.slurm import SlurmJob
from tests.slurm.cluster import Cluster, until, why_not
from tests.slurm.submitted import Submitted
from tests.support.commands import Corpus, write_run_file

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture
def cluster(folder: Path, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Four idle nodes with two GPUs each that are none."""
    with Cluster(folder / request.node.name, gpus=2) as slurm:
        yield slurm


def test_a_crashed_node_does_not_end_the_job(cluster: Cluster, corpus: Corpus) -> None:
    """Long before Slurm misses the node the run goes on with three; every step is made, at most one twice."""
    submitted = Submitted(cluster, corpus)
    submitted.reach(8)
    cluster.crash("n3")
    submitted.goes_on_with(3)
    job = submitted.stop()
    assert job["ExitCode"] == "3:0" and job["Restarts"] == "0", submitted.log()
    submitted.assert_at_most_one_step_again()
    formed = submitted.events("form")
    assert [form["world_size"] for form in formed] == [4, 3], "\n".join(timeline(submitted.run))
    assert formed[1]["cause"] == "memory"


@pytest.mark.slow
def test_the_time_limits_warning_saves_and_requeues(cluster: Cluster, corpus: Corpus) -> None:
    """USR1 for the batch script, which Slurm sends before the time limit: the job comes back and finishes the run."""
    submitted = Submitted(cluster, corpus)
    submitted.reach(8)
    cluster.run(["scancel", "--signal=USR1", "--batch", submitted.job])
    last = submitted.end_soon()
    job = submitted.finish()
    assert job["JobState"] == "COMPLETED" and job["Restarts"] == "1", submitted.log()
    assert submitted.steps() == list(range(1, last + 1))
    assert [record["event"] for record in submitted.events("requeue")] == ["requeue"]


@pytest.mark.slow
def test_the_batch_scripts_node_may_be_lost(cluster: Cluster, corpus: Corpus) -> None:
    """Nobody leads the job then. An agent puts it back into the queue when Slurm has given the node up, and the run
    goes on from the copies in memory, on three nodes, without a checkpoint ever written."""
    submitted = Submitted(cluster, corpus, "--min-nodes", "3")
    submitted.reach(8)
    batch_host = cluster.job(submitted.job)["BatchHost"]
    cluster.crash(batch_host)
    last = submitted.end_soon()
    job = submitted.finish()
    assert job["JobState"] == "COMPLETED" and job["Restarts"] == "1", submitted.log()
    submitted.assert_at_most_one_step_again()
    assert max(submitted.steps()) == last
    restarted = submitted.events("form")[1]
    assert restarted["cause"] == "memory" and int(str(restarted["step"])) >= 7


def in_job(cluster: Cluster, script: str, *options: str) -> dict[str, object]:
    """Runs Python in a batch job and returns the JSON that it printed last."""
    path = cluster.folder / "job.sh"
    out = cluster.folder / "job.out"
    path.write_text(f"#!/bin/bash\n{sys.executable} - <<'END'\n{script}\nEND\n")
    env_command = ["sbatch", "--parsable", "--no-kill", "--requeue", "--open-mode=append", f"--output={out}", *options]
    job = cluster.run([*env_command, str(path)])
    until(lambda: cluster.job(job)["JobState"] == "COMPLETED", 60, f"end of the job: {out}")
    return json.loads(out.read_text().strip().splitlines()[-1])


PRELUDE = "import json, os\nfrom llm_launch.slurm import SlurmJob\njob = SlurmJob.from_environment(os.environ)\n"


def test_what_a_job_knows(cluster: Cluster) -> None:
    found = in_job(
        cluster,
        PRELUDE + "print(json.dumps([job.nodes(), job.gpus_per_node, job.may_lead, job.is_this_run(), "
        "job.seconds_left(), job.node_states(), job.addresses(job.nodes()[:1]), job.batch_host_is_dead()]))",
        "--nodes=3", "--time=30", "--gpus-per-node=2",
    )  # fmt: skip
    nodes, gpus, batch, current, left, states, addresses, dead = found  # type: ignore[misc]
    assert nodes == ["n1", "n2", "n3"] and gpus == 2 and batch and current and not dead
    assert 1500 < left <= 1800 and set(states) == set(nodes) and addresses == {"n1": "127.0.0.1"}


@pytest.mark.slow
def test_agents_have_all_gpus_of_their_node(cluster: Cluster) -> None:
    """However the job asked for them, and though their steps name no number."""
    script = PRELUDE + (
        "step = ['bash', '-c', 'echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES $SLURM_GPUS_ON_NODE >&2']\n"
        "steps = [job.start_agents(step, [node]) for node in job.nodes()]\n"
        "told = [step.communicate()[1].decode().splitlines() for step in steps]\n"
        "print(json.dumps([[line for line in lines if 'binding' not in line] for lines in told]))"
    )
    for asked in ("--gpus-per-node=2", "--gres=gpu:2", "--gpus=4"):
        found = in_job(cluster, script, "--nodes=2", "--exclusive", asked)
        assert found == [["n1 0,1 2"], ["n2 0,1 2"]], asked


def test_a_drained_node_and_a_requeue_without_it(cluster: Cluster) -> None:
    script = PRELUDE + (
        "import signal, time\n"
        "if job.restart_count == 0:\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    assert job.drain('n2', 'a test')\n"
        "    job.requeue(['n2'])\n"
        "    assert job.fate().value == 'queued'\n"
        "    job.release(['n2'])\n"
        "    time.sleep(60)\n"
        "print(json.dumps([job.nodes(), job.restart_count]))"
    )
    nodes, restarts = in_job(cluster, script, "--nodes=2")  # type: ignore[misc]
    assert len(nodes) == 2 and "n2" not in nodes and restarts == 1
    assert cluster.states()["n2"] == "drained"


def test_nobody_requeues_a_job_that_was_cancelled(cluster: Cluster) -> None:
    """Though it is asked for a moment later, when the job's processes still end."""
    options = ["--parsable", "--requeue", "--nodes=2", "--output=/dev/null", "--wrap", "trap '' TERM; sleep 60"]
    job = SlurmJob(cluster.run(["sbatch", *options]), 0, "n1", cluster.env)
    until(lambda: job.is_this_run(), 60, "the job's start")
    cluster.run(["scancel", job.job_id])
    job.requeue()
    job.requeue(["n3"])
    until(lambda: cluster.job(job.job_id)["JobState"] == "CANCELLED", 60, "the job's end")
    job.requeue()
    found = cluster.job(job.job_id)
    assert (found["JobState"], found["Restarts"], job.fate().value) == ("CANCELLED", "0", "over")


@pytest.mark.slow
def test_a_task_of_an_array_speaks_for_itself_alone(cluster: Cluster) -> None:
    """The last task, whose number is the array's too, goes back to the queue; the others do not."""
    path, out = cluster.folder / "job.sh", cluster.folder / "job-%a.out"
    script = PRELUDE + (
        "import time\n"
        "last = os.environ['SLURM_ARRAY_TASK_ID'] == '2'\n"
        "if last and job.restart_count == 0:\n"
        "    job.requeue()\n"
        "    time.sleep(60)\n"
        "time.sleep(0 if last else 20)\n"
        "print(json.dumps([job.nodes(), job.restart_count, job.seconds_left() > 1000, job.is_this_run()]))"
    )
    path.write_text(f"#!/bin/bash\n{sys.executable} - <<'END'\n{script}\nEND\n")
    options = ["--array=0-2", "--time=30", "--nodes=1", "--exclusive", "--requeue", "--open-mode=append"]
    cluster.run(["sbatch", *options, f"--output={out}", str(path)])
    files = [cluster.folder / f"job-{task}.out" for task in range(3)]
    until(lambda: all(file.exists() and file.read_text().endswith("]\n") for file in files), 90, "the array's end")
    told = [json.loads(file.read_text().splitlines()[-1]) for file in files]
    assert [task[1:] for task in told] == [[0, True, True], [0, True, True], [1, True, True]]
    assert all(len(task[0]) == 1 for task in told) and told[0][0] != told[1][0]


def test_the_batch_file_is_one(cluster: Cluster, corpus: Corpus) -> None:
    """With GPUs, spares and a time limit, as sbatch itself reads it."""
    folder = cluster.folder
    train, data = {"global_batch_size": 8}, {"eval_fraction": 0.0}
    run_file = write_run_file(corpus, folder / "job", parallel={"dp": 4}, train=train, data=data)
    tree = yaml.safe_load(run_file.read_text())
    run_file.write_text(yaml.safe_dump({**tree, "device": "auto"}))
    command = [
        sys.executable,
        "-m",
        "llm_parallel.cli",
        "submit",
        str(run_file),
        "--nodes",
        "2",
        "--gpus-per-node",
        "2",
    ]
    command += ["--spares", "1", "--time", "1:00:00", "--partition", "main", "--sbatch=--comment=x", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    path = folder / "run.sbatch"
    path.write_text(done.stdout)
    tested = subprocess.run(["sbatch", "--test-only", str(path)], env=cluster.env, capture_output=True, text=True)
    assert tested.returncode == 0 and "to start at" in tested.stderr, tested.stderr
    assert "on nodes n[1-3]" in tested.stderr


def test_down_leaves_nothing(folder: Path) -> None:
    """Though a job runs: no daemon, no task, and none of slurmstepd's, which live on without slurmd."""
    with Cluster(folder / "brief", nodes=2) as slurm:
        assert SlurmJob.from_environment(os.environ) is None
        slurm.run(["sbatch", "--nodes=2", "--output=/dev/null", "--wrap", "srun sleep 600"])
        until(lambda: {"slurmctld", "slurmd", "slurmstepd", "sleep"} <= names_of_all(slurm), 20, "the step's start")
    assert names_of_all(slurm) == set()


def names_of_all(cluster: Cluster) -> set[str]:
    """Names of the living processes with anything of the cluster about them."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            about = [process.cwd(), *process.cmdline(), process.environ().get("SLURM_CONF", "")]
            if any(str(cluster.folder) in text for text in about):
                found.add(process.name())
    return found
