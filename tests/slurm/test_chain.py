"""Jobs one after the other under a real Slurm: pretraining, fine-tuning, preferences and an evaluation by one chain,
runs of an array a few at a time, and a second job that was handed to sbatch for the same folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from llm_launch.live_run import read_lines
from tests.slurm.cluster import Cluster, until, why_not
from tests.slurm.test_starting import COMMAND, run_file_of, said_by, steps_of, wait_for_end
from tests.support.commands import Corpus

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]
LIMIT_S = 600.0
HERE = ("--nodes", "1", "--gpus-per-node", "0")


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    """Two nodes."""
    with Cluster(folder / "cluster", nodes=2) as slurm:
        yield slurm


def submitted(cluster: Cluster, run_file: Path, *more: str) -> str:
    """Number of the job of a run file."""
    status, said = said_by(cluster, [*COMMAND, "submit", str(run_file), *HERE, *more])
    assert status == 0, said
    return said.split("job ", 1)[1].split(";")[0]


def log_of(run: Path, job: str) -> str:
    path = run / "logs" / f"slurm-{job}.out"
    return path.read_text() if path.exists() else ""


def test_a_chain_from_pretraining_to_an_evaluation(cluster: Cluster, corpus: Corpus) -> None:
    """Handed in at once, before any model is there. The first job goes back to the queue on the way, which its
    successors do not take for its end."""
    folder = cluster.folder / "a chain"
    first = run_file_of(corpus, folder, processes=1)
    records = {
        "sft": {"messages": [{"role": "user", "content": "what is 1?"}, {"role": "assistant", "content": "one"}]},
        "dpo": {"prompt": "what is 1?", "chosen": "one", "rejected": "two"},
    }
    files, before = {}, "run"
    for name, record in records.items():
        data = folder / f"{name}.jsonl"
        data.write_text(40 * (json.dumps(record) + "\n"))
        tree = {
            "run_dir": str(folder / name), "device": "cpu", "checkpoint": {"load": str(folder / before)},
            "chat": {"train": [str(data)]}, "data": {"seq_length_tokens": 64}, "parallel": {"dp": 1},
            "train": {"global_batch_size": 2, "epochs": 1, "threads_per_process": 1}, "method": {"kind": name},
            "log": {"plots": False, "tensorboard": False},
        }  # fmt: skip
        files[name] = folder / f"{name}.yaml"
        files[name].write_text(yaml.safe_dump(tree, allow_unicode=True))
        before = name
    jobs = {"run": submitted(cluster, first, "--sbatch=--hold")}
    jobs["sft"] = submitted(cluster, files["sft"], "--after", jobs["run"])
    jobs["dpo"] = submitted(cluster, files["dpo"], "--after", jobs["sft"])
    generate = f"{' '.join(COMMAND)} generate '{folder / 'dpo'}' --prompt one --max-new-tokens 4"
    options = ["--parsable", f"--dependency=afterok:{jobs['dpo']}", f"--output={folder / 'said.out'}"]
    last = cluster.run(["sbatch", *options, "--wrap", generate])
    cluster.run(["scontrol", "release", jobs["run"]])
    until(lambda: bool(steps_of(folder / "run")) if (folder / "run" / "metrics.jsonl").exists() else False, LIMIT_S,
          "a step")  # fmt: skip
    cluster.run(["scontrol", "requeue", jobs["run"]], check=False)
    for name, job in jobs.items():
        assert wait_for_end(cluster, job) == "COMPLETED", (name, log_of(folder / name, job))
        assert steps_of(folder / name)[-1] > 1
    assert wait_for_end(cluster, last) == "COMPLETED", (folder / "said.out").read_text()


def test_the_successor_of_a_failed_job_is_cancelled(cluster: Cluster, corpus: Corpus) -> None:
    """Nothing waits for ever; its status says why, and its batch file works when the model is there after all."""
    folder = cluster.folder / "broken"
    run_file = run_file_of(corpus, folder, processes=1)
    job = submitted(cluster, run_file, "--sbatch=--hold")
    second = folder / "second.yaml"
    tree = yaml.safe_load(run_file.read_text())
    tree |= {"run_dir": str(folder / "second"), "checkpoint": {"load": str(folder / "run"), "load_optimizer": False}}
    second.write_text(yaml.safe_dump(tree))
    behind = submitted(cluster, second, "--after", job)
    cluster.run(["scancel", job])
    assert wait_for_end(cluster, behind) == "CANCELLED"
    _, said = said_by(cluster, [*COMMAND, "status", str(folder / "second")])
    assert f"cancelled (SLURM job {behind}): a job that it was to start after has not made all its steps" in said, said
    again = cluster.run(["sbatch", "--parsable", str(folder / "run" / "submit.sbatch")])
    cluster.run(["scontrol", "release", again])
    assert wait_for_end(cluster, again) == "COMPLETED", log_of(folder / "run", again)
    again = cluster.run(["sbatch", "--parsable", str(folder / "second" / "submit.sbatch")])
    assert wait_for_end(cluster, again) == "COMPLETED", log_of(folder / "second", again)
    assert steps_of(folder / "second") == list(range(1, 13))


def test_runs_of_an_array_a_few_at_a_time(cluster: Cluster, corpus: Corpus) -> None:
    """Three on two nodes, one at a time, each in the folder of its value."""
    folder = cluster.folder / "array"
    run_file = run_file_of(corpus, folder, processes=1)
    job = submitted(cluster, run_file, "--array", "seed=1,2,3", "--throttle", "1")
    most = 0
    runs = [folder / "run" / f"seed={seed}" for seed in (1, 2, 3)]

    def over() -> bool:
        nonlocal most
        states = cluster.run(["squeue", "--noheader", "--array", "--format=%T", "--job", job], check=False).split()
        most = max(most, states.count("RUNNING"))
        return not states

    until(over, LIMIT_S, "the array's end")
    assert most == 1
    for run in runs:
        assert steps_of(run) == list(range(1, 13)), run
        assert [event["event"] for event in read_lines(run / "events.jsonl")][-1] == "end"


def test_two_jobs_of_one_folder_do_not_train_at_once(cluster: Cluster, corpus: Corpus) -> None:
    """Though the second was handed to sbatch by hand, under another name, so that Slurm starts it beside the first: it
    ends with one sentence, and the first goes on."""
    folder = cluster.folder / "twice"
    run = folder / "run"
    first = submitted(cluster, run_file_of(corpus, folder, processes=1), "train.steps=100000")
    until(lambda: bool(read_lines(run / "metrics.jsonl")) and len(steps_of(run)) > 3, LIMIT_S, "steps of the first")
    options = ["--parsable", "--job-name=other", "--no-requeue"]
    second = cluster.run(["sbatch", *options, str(run / "submit.sbatch")])
    assert wait_for_end(cluster, second) == "FAILED"
    assert cluster.job(second)["ExitCode"] == "2:0"
    said = log_of(run, second)
    assert f"run_dir = {run} is in use by" in said and "Traceback" not in said, said
    made = steps_of(run)[-1]
    until(lambda: steps_of(run)[-1] > made, LIMIT_S, "further steps of the first")
    cluster.run(["scancel", "--signal=TERM", "--batch", first])
    assert wait_for_end(cluster, first) == "FAILED"  # COMPLETED is for all steps
    assert steps_of(run) == list(range(1, len(steps_of(run)) + 1))
