"""What ``llm-parallel submit`` writes and refuses, and which output of Slurm it understands."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from llm_launch.slurm import SlurmError, SlurmJob, parse_record, parse_time
from llm_launch.submit import SubmitRequest, batch_file, check_request, submit
from llm_parallel.config.tree import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from llm_parallel.errors import UserError

CONFIG = RunConfig(
    run_dir="runs/llama",
    model=ModelConfig(vocab_size=32000),
    parallel=ParallelConfig(tp=2),
    train=TrainConfig(global_batch_size=1024),
)


def options_of(text: str) -> list[str]:
    return [
        line.split("#")[1].strip().removeprefix("SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")
    ]


def test_batch_file(tmp_path: Path) -> None:
    request = SubmitRequest(64, 8, 2, None, "3-00:00:00", "hopper", "team", "high", options=("--constraint=h100",))
    check_request(request, CONFIG)
    text = batch_file(request, CONFIG, Path("/data/my run.yaml"), ["optim.lr=1e-4"])
    run_dir = Path("runs/llama").resolve()
    assert options_of(text) == [
        "--job-name=llama", "--nodes=64-66", "--gpus-per-node=8", "--exclusive", "--partition=hopper", "--account=team",
        "--qos=high", "--time=3-00:00:00", "--no-kill", "--requeue", "--open-mode=append",
        f"--output={run_dir}/logs/slurm-%j.out", "--signal=B:USR1@180", "--constraint=h100",
    ]  # fmt: skip
    assert "launch '/data/my run.yaml' optim.lr=1e-4 elastic.spare_nodes=2 &" in text
    path = tmp_path / "x.sbatch"
    path.write_text(text)
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0


@pytest.mark.parametrize(
    "folder", ["runs/a\n#SBATCH --uid=0", "runs/a\r#SBATCH", 'runs/a"b', "runs/a\\b", "runs/\x1b[2J"]
)
def test_a_folder_whose_name_would_be_an_option_is_refused(folder: str) -> None:
    """A line break in it would end the option, and what follows would be one of its own."""
    config = CONFIG.model_copy(update={"run_dir": folder})
    with pytest.raises(UserError, match=r"run_dir = .* has a line break or another character"):
        check_request(SubmitRequest(1, 0), config)
    with pytest.raises(UserError, match="is no option of sbatch"):
        check_request(SubmitRequest(1, 0, options=("--x=a\r#SBATCH --y",)), CONFIG)


def test_a_folder_with_spaces_is_one_option() -> None:
    config = CONFIG.model_copy(update={"run_dir": "/runs/my run 100% # 2"})
    request = SubmitRequest(1, 0)
    check_request(request, config)
    lines = batch_file(request, config, Path("run.yaml"), []).splitlines()
    assert "#SBATCH --job-name=my-run-100----2" in lines
    assert '#SBATCH --output="/runs/my run 100%% # 2/logs/slurm-%j.out"' in lines


def test_signals_reach_the_launcher_and_its_status_comes_back(tmp_path: Path) -> None:
    """The real script around a stand-in for the launcher: USR1 is passed on and the status is that of the launcher; one
    that was killed is started again."""
    text = batch_file(SubmitRequest(1, 0), CONFIG, Path("run.yaml"), [])
    stand_in = tmp_path / "launcher.sh"
    stand_in.write_text(
        f"trap 'echo usr1; exit 7' USR1\necho start >> {tmp_path}/starts\n"
        f"[ $(wc -l < {tmp_path}/starts) = 1 ] && kill -9 $$\nkill -USR1 $PPID\nwhile :; do sleep 0.05; done\n"
    )
    lines = [f"    bash {stand_in} &" if "llm_parallel.cli launch" in line else line for line in text.splitlines()]
    done = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 7 and done.stdout == "usr1\n", (done.returncode, done.stdout, done.stderr)
    assert (tmp_path / "starts").read_text().count("start") == 2


def test_template(tmp_path: Path) -> None:
    path = tmp_path / "mine.sbatch"
    path.write_text("#!/bin/bash\n{options}\nmodule load x\n{command}\n")
    request = SubmitRequest(2, template=str(path))
    text = batch_file(request, CONFIG, Path("run.yaml"), [])
    assert "module load x\n" in text and "#SBATCH --nodes=2 " in text and "llm_parallel.cli launch run.yaml" in text
    path.write_text("{options}")
    with pytest.raises(UserError, match=r"has no \{command\}"):
        batch_file(request, CONFIG, Path("run.yaml"), [])


def test_array(tmp_path: Path) -> None:
    """Each task of the array, as bash reads the file, launches with its value and in a folder of its own."""
    request = SubmitRequest(2, 0, array="optim.lr=1e-4,3e-4,a b")
    text = batch_file(request, CONFIG, Path("run.yaml"), ["optim.lr=1e-3"])
    assert "--array=0-2" in options_of(text)
    run_dir = Path("runs/llama").resolve()
    assert f"--output={run_dir}/logs/slurm-%A_%a.out" in options_of(text)
    told = text.replace(sys.executable, "printf '%s\\n'")
    done = subprocess.run(["bash", "-c", told], env={"SLURM_ARRAY_TASK_ID": "2", "PATH": os.environ["PATH"]},
                          capture_output=True, text=True, timeout=30)  # fmt: skip
    assert done.stdout.splitlines()[-2:] == ["optim.lr=a b", f"run_dir={run_dir}/2"]
    mine = tmp_path / "mine.sbatch"
    mine.write_text("{options}\n{command}")
    with pytest.raises(UserError, match=r"has no \{values\}"):
        batch_file(replace(request, template=str(mine)), CONFIG, Path("run.yaml"), [])
    for array in ("optim.lr", "optim.lr=", "optim.lr=1,,2", "=1", "run_dir=a,b"):
        with pytest.raises(UserError, match="--array"):
            batch_file(replace(request, array=array), CONFIG, Path("run.yaml"), [])


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (SubmitRequest(0), "--nodes 0 must be at least 1"),
        (SubmitRequest(2, spares=-1), "--spares -1 must be at least 0"),
        (SubmitRequest(2, min_nodes=3), "--min-nodes 3 must be at least 1 and at most --nodes 2"),
        (SubmitRequest(2, time="soon"), "--time soon is no time limit"),
        (SubmitRequest(2, time="2"), "leaves no time before the warning 180 s earlier"),
        (SubmitRequest(2, partition="a b"), "--partition 'a b' has characters"),
        (SubmitRequest(2, options=("constraint=h100",)), "is no option of sbatch"),
        (SubmitRequest(3, gpus_per_node=3), "parallel.tp"),
    ],
)
def test_bad_requests(request_: SubmitRequest, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_request(request_, CONFIG)


def test_without_slurm_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sbatch is not installed here"):
        submit("#!/bin/bash\n", tmp_path / "run")
    assert (tmp_path / "run" / "submit.sbatch").read_text() == "#!/bin/bash\n"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("UNLIMITED", None), ("", None), ("x", None), ("30", 1800.0), ("5:07", 307.0), ("1:00:00", 3600.0),
        ("2-3", 183600.0), ("1-02:03:04", 93784.0), ("2-00:30", 174600.0),
    ],
)  # fmt: skip
def test_times(text: str, seconds: float | None) -> None:
    assert parse_time(text) == seconds


def test_records() -> None:
    """As scontrol 22.05 prints them: spaces in values, equal signs in values, empty values."""
    line = (
        "NodeName=n2 Arch=x86_64 OS=Linux 6.1 #1 SMP Reason=gpu 3 bad [root@2026-11-23T15:00:00] Comment= "
        "TRES=cpu=4,mem=1G"
    )
    assert parse_record(line) == {
        "NodeName": "n2", "Arch": "x86_64", "OS": "Linux 6.1 #1 SMP", "Reason": "gpu 3 bad [root@2026-11-23T15:00:00]",
        "Comment": "", "TRES": "cpu=4,mem=1G",
    }  # fmt: skip


def fake(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


def test_the_environment_tells_where_we_are() -> None:
    assert SlurmJob.from_environment({}) is None
    batch = {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1", "SLURM_PROCID": "0", "SLURM_RESTART_COUNT": "2"}
    job = SlurmJob.from_environment(batch)
    assert job is not None and job.is_batch_shell and job.restart_count == 2 and job.node == "n1"
    task = SlurmJob.from_environment({**batch, "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"})
    assert task is not None and task.job_id == "7_3"
    step = SlurmJob.from_environment({**batch, "SLURM_STEP_ID": "0"})
    assert step is not None and not step.is_batch_shell


def test_failures_of_slurm_are_slurm_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = SlurmJob("7", 0, "n1", {"PATH": f"{tmp_path}:/usr/bin:/bin"})
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    fake(tmp_path, "scontrol", "echo 'slurm_update error: Invalid user id' >&2; exit 1")
    with pytest.raises(SlurmError, match="Invalid user id"):
        job.nodes()
    assert job.drain("n1", "bad") is False
    fake(tmp_path, "scontrol", "sleep 60")
    monkeypatch.setattr("llm_launch.slurm.CALL_S", 0.2)
    with pytest.raises(SlurmError, match="did not answer"):
        job.is_this_run()
