"""Where people start runs from under a real Slurm: a login node, an allocation, a step, another job."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.slurm.cluster import Cluster, until, why_not
from tests.support.commands import Corpus, read_records, write_run_file

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]
COMMAND = ["env", "OMP_NUM_THREADS=1", "PYTHONUNBUFFERED=1", sys.executable, "-m", "llm_parallel.cli"]
END_S = 600.0


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    """Three nodes, of which n1 and n3 are under one switch."""
    (folder / "cluster").mkdir()
    (folder / "cluster" / "topology.conf").write_text(
        "SwitchName=left Nodes=n1,n3\nSwitchName=right Nodes=n2\nSwitchName=root Switches=left,right\n"
    )
    with Cluster(folder / "cluster", nodes=3, more="TopologyPlugin=topology/tree\n") as slurm:
        yield slurm


def run_file_of(corpus: Corpus, folder: Path, processes: int = 2) -> Path:
    """A run of 12 steps that goes from launch to its end."""
    train, data = {"steps": 12, "global_batch_size": 6}, {"eval_fraction": 0.0}
    return write_run_file(corpus, folder, parallel={"dp": processes}, train=train, data=data)


def steps_of(run: Path) -> list[int]:
    return [record["step"] for record in read_records(run / "metrics.jsonl") if "train/loss" in record]


def wait_for_end(cluster: Cluster, job: str) -> str:
    """The job's state when it has ended."""
    over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    until(lambda: cluster.job(job)["JobState"] in over, END_S, f"the end of job {job}")
    return cluster.job(job)["JobState"]


def said_by(cluster: Cluster, argv: list[str]) -> tuple[int, str]:
    done = subprocess.run(argv, env=cluster.env, capture_output=True, text=True, timeout=END_S, cwd=cluster.folder)
    return done.returncode, done.stdout + done.stderr


def nodes_by_rank(run: Path) -> list[str]:
    return [device[0] for device in json.loads((run / "elastic.json").read_text())["ranks"]]


@pytest.mark.parametrize("inside", ["login", "interactive", "step"])
def test_a_run_starts_from_the_shell_of_an_allocation(
    inside: str, cluster: Cluster, corpus: Corpus, tmp_path: Path
) -> None:
    """The shell of salloc is on the login node, or in a step on a node; the run is on all nodes of the allocation, its
    ranks by switch."""
    folder = cluster.folder / inside
    run_file = run_file_of(corpus, folder, processes=3)
    within = {"login": [], "interactive": ["srun", "--interactive", "--preserve-env"], "step": ["srun"]}[inside]
    one = ["--nodes=1", "--ntasks=1", "--overlap"] if within else []
    allocation = ["salloc", "--nodes=3", "--exclusive", "--quiet"]
    status, said = said_by(cluster, [*allocation, *within, *one, *COMMAND, "launch", str(run_file)])
    assert status == 0, said
    assert steps_of(folder / "run") == list(range(1, 13)), said
    assert nodes_by_rank(folder / "run") == ["n1", "n3", "n2"], said


def test_tasks_of_a_step_do_not_all_start_the_run(cluster: Cluster, corpus: Corpus) -> None:
    folder = cluster.folder / "tasks"
    launch = [*COMMAND, "launch", str(run_file_of(corpus, folder))]
    status, said = said_by(cluster, ["srun", "--nodes=2", "--ntasks-per-node=1", "--exclusive", *launch])
    assert status == 2 and "srun started llm-parallel launch 2 times" in said and "start it once" in said, said
    assert "Traceback" not in said and not (folder / "run" / "metrics.jsonl").exists()


def test_a_run_is_submitted_from_a_job_of_another_kind(cluster: Cluster, corpus: Corpus) -> None:
    """From a step of a task of an array with memory by CPU, which all leave variables that contradict the new job's."""
    folder = cluster.folder / "nested"
    run_file = run_file_of(corpus, folder)
    submit = [*COMMAND, "submit", str(run_file), "--nodes", "2", "--gpus-per-node", "0"]
    outer = ["sbatch", "--parsable", "--array=5", "--ntasks=2", "--cpus-per-task=2", "--mem-per-cpu=10M"]
    out = folder / "outer.out"
    array = cluster.run([*outer, f"--output={out}", "--wrap", " ".join(["srun", "--ntasks=1", *submit])])
    assert wait_for_end(cluster, f"{array}_5") == "COMPLETED", out.read_text()
    facts = json.loads((folder / "run" / "submit.json").read_text())
    log = folder / "run" / "logs" / f"slurm-{facts['job']}.out"
    assert wait_for_end(cluster, facts["job"]) == "COMPLETED", log.read_text()
    assert steps_of(folder / "run") == list(range(1, 13)) and len({*nodes_by_rank(folder / "run")}) == 2
    assert f"SLURM job {facts['job']}, start 1: 2 nodes with 1 devices" in log.read_text()


def test_a_job_trains_what_was_submitted(cluster: Cluster, corpus: Corpus) -> None:
    """In a folder with every kind of letter, with set-up lines and options of the agents' step, from a shell that
    exports that output goes to a terminal. While the job waits its run file is ruined, a second job is refused, one
    behind it waits for it, and the copy of the run file is changed on purpose."""
    folder = cluster.folder / "my run 100% # 2 ü'x"
    run_file, run = run_file_of(corpus, folder), folder / "run"
    submit = ["env", "FORCE_COLOR=1", *COMMAND, "submit", str(run_file), "--nodes", "2", "--gpus-per-node", "0"]
    submit += ["--sbatch=--hold", "--setup", "export SITE='a  b'", "--srun=--cpu-bind=none"]
    submit += ["--agent-setup", 'echo "set up on $SLURMD_NODENAME: $SITE"', f"--agent-python={sys.executable}"]
    status, said = said_by(cluster, submit)
    assert status == 0, said
    job = json.loads((run / "submit.json").read_text())["job"]
    shown = cluster.run(["squeue", "--noheader", "--format=%j %k", "--job", job])
    assert shown.startswith("run-") and shown.endswith(f" llm-parallel run in {run}")
    status, said = said_by(cluster, submit)
    assert status == 2 and f"has job {job} already (pending)" in said, said
    assert "Traceback" not in said
    status, said = said_by(cluster, [*submit, "--behind"])
    assert status == 0, said
    behind = json.loads((run / "submit.json").read_text())["job"]
    run_file.write_text("steps: [")
    copy = run / "submit.yaml"
    tree = yaml.safe_load(copy.read_text())
    tree["train"]["steps"] = 6
    copy.write_text(yaml.safe_dump(tree, allow_unicode=True))
    cluster.run(["scontrol", "release", job, behind])
    assert cluster.job(behind)["JobState"] == "PENDING"
    log = run / "logs" / f"slurm-{job}.out"
    assert wait_for_end(cluster, job) == "COMPLETED", log.read_text()
    assert steps_of(run) == list(range(1, 7))
    said = log.read_text()
    assert "was changed since the job was submitted" in said
    assert "set up on n" in said and said.count(": a  b\n") == 2
    assert not {"\x1b", "\r"} & set(said) and "Traceback" not in said, said
    lines = [line for line in said.splitlines() if line.startswith("step ")]
    assert 1 <= len(lines) <= 6, said
    assert wait_for_end(cluster, behind) == "COMPLETED"
    assert "is finished" in (run / "logs" / f"slurm-{behind}.out").read_text()
