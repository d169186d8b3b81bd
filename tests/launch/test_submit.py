"""What ``llm-parallel submit`` writes and refuses, and which output of Slurm it understands."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_launch.agent_settings import devices_here
from llm_launch.agent_step import AgentStep
from llm_launch.batch_file import batch_file, job_name, sweep_folders
from llm_launch.slurm import SlurmError, SlurmJob, parse_record, parse_time, switches_above
from llm_launch.submit import check_request, queued_jobs, refuse_second_job, submit, write_batch_file
from llm_launch.submit_request import SubmitRequest
from llm_parallel.config.tree import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from llm_parallel.errors import UserError

CONFIG = RunConfig(
    run_dir="runs/llama",
    model=ModelConfig(vocab_size=32000),
    parallel=ParallelConfig(tp=2),
    train=TrainConfig(global_batch_size=1024),
)
RUN = Path("/runs/llama")
HERE = AgentStep()


def text_of(request: SubmitRequest, step: AgentStep = HERE, run_dir: Path = RUN) -> str:
    """The batch file of a run in ``run_dir``, after every check."""
    check_request(request, step, CONFIG.model_copy(update={"run_dir": str(run_dir)}))
    return batch_file(request, step, run_dir, run_dir / "submit.yaml")


def options_of(text: str) -> list[str]:
    """The options of sbatch in a batch file, as Slurm's manual says that they are read: a comment ends them."""
    lines = [line.removeprefix("#SBATCH") for line in text.splitlines() if line.startswith("#SBATCH")]
    return [option for line in lines for option in shlex.split(line, comments=True)]


def started(text: str, environment: dict[str, str], folder: Path) -> list[str]:
    """The arguments with which bash, reading the batch file, starts the launcher."""
    shown = text.replace(sys.executable, "printf '%s\\n'")
    done = subprocess.run(["bash", "-c", shown], env={"PATH": os.environ["PATH"], **environment}, capture_output=True,
                          text=True, timeout=30, cwd=folder)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[3:]  # after -m llm_parallel.cli launch


def test_batch_file(tmp_path: Path) -> None:
    request = SubmitRequest(
        64, spares=2, time="3-00:00:00", partition="hopper", account="team", qos="high", constraint="h100&nvlink",
        gpu_type="h100", segment=2, switches="1@12:00:00", options=("--mail-type=end",),
    )  # fmt: skip
    text = text_of(request)
    name = job_name(request, RUN)
    assert options_of(text) == [
        f"--job-name={name}", f"--comment=llm-parallel run in {RUN}", f"--chdir={Path.cwd()}", "--nodes=64-66",
        "--gpus-per-node=h100:8", "--exclusive", "--mem=0", "--partition=hopper", "--account=team", "--qos=high",
        "--constraint=h100&nvlink", "--time=3-00:00:00", "--segment=2", "--switches=1@12:00:00", "--no-kill",
        "--requeue", "--dependency=singleton", "--open-mode=append", f"--output={RUN}/logs/slurm-%j.out",
        "--signal=B:USR1@180", "--mail-type=end",
    ]  # fmt: skip
    assert name.startswith("llama-") and name != job_name(request, Path("/other/llama"))
    assert started(text, {}, tmp_path) == ["/runs/llama/submit.yaml"]


@pytest.mark.parametrize(
    ("request_", "options"),
    [
        (SubmitRequest(1, 2, shared=True, cpus=16, mem="200G"),
         ["--gpus-per-node=2", "--ntasks-per-node=1", "--cpus-per-task=16", "--mem=200G"]),
        (SubmitRequest(1, 8, gres="gpu:h100:8,nvme:1"), ["--gres=gpu:h100:8,nvme:1", "--exclusive", "--mem=0"]),
        (SubmitRequest(1, 8, gres="none", mem="900G"), ["--exclusive", "--mem=900G"]),
        (SubmitRequest(1, 0), ["--exclusive", "--mem=0"]),
    ],
)  # fmt: skip
def test_what_a_node_is_asked_for(request_: SubmitRequest, options: list[str], tmp_path: Path) -> None:
    text = text_of(request_)
    kinds = ("--gpus", "--gres", "--exclusive", "--mem", "--ntasks", "--cpus")
    assert [option for option in options_of(text) if option.startswith(kinds)] == options
    told = ["--gpus-per-node=8"] if request_.gres == "none" else []
    assert started(text, {}, tmp_path)[1:] == told


@pytest.mark.parametrize(
    "folder", ["runs/a\n#SBATCH --uid=0", "runs/a\r#SBATCH", 'runs/a"b', "runs/a\\b", "runs/\x1b[2J", "runs/a\u2028b"]
)
def test_a_folder_whose_name_would_be_an_option_is_refused(folder: str) -> None:
    """A line break in it would end the option, and what follows would be one of its own."""
    config = CONFIG.model_copy(update={"run_dir": folder})
    with pytest.raises(UserError, match=r"run_dir = .* has a line break or another character"):
        check_request(SubmitRequest(1, 0), HERE, config)
    with pytest.raises(UserError, match="is no option of sbatch"):
        check_request(SubmitRequest(1, 0, options=("--x=a\r#SBATCH --y",)), HERE, CONFIG)


PRINTED = st.characters(blacklist_categories=("C", "Z"), blacklist_characters='"\\/')
LETTERS = st.text(st.sampled_from(" %#'$&;|*()[]{}!~ü") | PRINTED, min_size=1)


@given(LETTERS.filter(lambda name: name.strip() not in ("", ".", "..")), st.lists(LETTERS, max_size=3))
def test_names_of_all_kinds_are_quoted(name: str, more: list[str]) -> None:
    """Whatever the name of the run folder and the values of options: the file has the same number of lines and each
    option its value, as a shell's rules of quoting read it; only the pattern of the log has its %."""
    run_dir = Path("/runs") / name
    request = SubmitRequest(1, 0, options=tuple(f"--export={value}" for value in more))
    text = text_of(request, HERE, run_dir)
    found = options_of(text)
    assert f"--comment=llm-parallel run in {run_dir}" in found
    assert f"--output={str(run_dir).replace('%', '%%')}/logs/slurm-%j.out" in found
    assert [option for option in found if option.startswith("--export=")] == [f"--export={value}" for value in more]
    assert text.count("\n") == text_of(SubmitRequest(1, 0, options=("--export=x",) * len(more))).count("\n")
    assert shlex.quote(f"{run_dir}/submit.yaml") in text


def test_the_agents_step_and_set_up(tmp_path: Path) -> None:
    """Options of the agents' step come to the launcher as they are, after the lines of set-up."""
    step = AgentStep(
        ("--container-image=/images/llm parallel.sqsh", "--network=sharp"), "python3", ("source /opt/env", "x='a b'")
    )
    request = SubmitRequest(1, 0, setup=("module() { echo module $*; }", "module load cuda"))
    text = text_of(request, step)
    assert started(text, {}, tmp_path)[2:] == [  # the set-up's own line came first
        "--srun=--container-image=/images/llm parallel.sqsh", "--srun=--network=sharp", "--agent-python=python3",
        "--agent-setup=source /opt/env", "--agent-setup=x='a b'",
    ]  # fmt: skip
    assert text.index("trap ") < text.index("module load cuda") < text.index("run=(")


def test_an_agent_runs_after_its_set_up(tmp_path: Path) -> None:
    step = AgentStep(agent_setup=("export GREETING='a b'", "cd /"))
    script = "import os, sys; print(os.getcwd(), os.environ['GREETING'], sys.argv[1:])"
    done = subprocess.run(step.command([sys.executable, "-c", script, "--node", "x y"]), capture_output=True, text=True)
    assert done.stdout == "/ a b ['--node', 'x y']\n", done.stderr
    here, other = [sys.executable, "-c", "import os; print(os.getcwd())"], AgentStep(agent_python=sys.executable)
    assert AgentStep().command(here) == here
    begun = subprocess.run(other.command(here), capture_output=True, text=True, cwd="/")
    assert begun.stdout == f"{Path.cwd()}\n", begun.stderr
    assert AgentStep(agent_python="python3").command(here)[-3:] == ["python3", *here[1:]]
    for bad in (AgentStep(("container-image=x",)), AgentStep(("--a\n--b",)), AgentStep(agent_python="")):
        with pytest.raises(UserError, match=r"--srun|--agent-python"):
            bad.check()


def test_signals_reach_the_launcher_and_its_status_comes_back(tmp_path: Path) -> None:
    """The real script around a stand-in for the launcher: USR1 is passed on and the status is that of the launcher; one
    that was killed is started again."""
    stand_in = tmp_path / "launcher.sh"
    stand_in.write_text(
        f"trap 'echo usr1; exit 7' USR1\necho start >> {tmp_path}/starts\n"
        f"[ $(wc -l < {tmp_path}/starts) = 1 ] && kill -9 $$\nkill -USR1 $PPID\nwhile :; do sleep 0.05; done\n"
    )
    text = text_of(SubmitRequest(1, 0)).replace(sys.executable, f"bash {stand_in}")
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, timeout=30)
    assert done.returncode == 7 and done.stdout == "usr1\n", (done.returncode, done.stdout, done.stderr)
    assert (tmp_path / "starts").read_text().count("start") == 2


def test_a_signal_during_set_up_is_kept(tmp_path: Path) -> None:
    """One that comes before there is a launcher: the launcher is told."""
    stand_in = tmp_path / "launcher.sh"
    stand_in.write_text('echo "asked: $LLM_PARALLEL_ASKED"\n')
    request = SubmitRequest(1, 0, setup=("kill -USR1 $$", "sleep 0"))
    text = text_of(request).replace(sys.executable, f"bash {stand_in}")
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, "asked: USR1\n"), done.stderr


def test_what_an_outer_job_left_is_not_this_jobs(tmp_path: Path) -> None:
    """A batch file that is submitted by hand from a task of an array or of a step."""
    left = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_JOB_ID": "1",
            "SLURM_MEM_PER_CPU": "1", "SLURM_JOB_ID": "9", "SLURM_PROCID": "0"}  # fmt: skip
    stand_in = tmp_path / "launcher.sh"
    stand_in.write_text("env | grep SLURM | sort\n")
    text = text_of(SubmitRequest(1, 0)).replace(sys.executable, f"bash {stand_in}")
    done = subprocess.run(
        ["bash", "-c", text], env={"PATH": os.environ["PATH"], **left}, capture_output=True, text=True
    )
    assert done.stdout == "SLURM_JOB_ID=9\nSLURM_PROCID=0\n"


def test_template(tmp_path: Path) -> None:
    path = tmp_path / "mine.sbatch"
    path.write_text("#!/bin/bash\n{options}\nmodule load x\n{command}\n")
    request = SubmitRequest(2, template=str(path))
    text = text_of(request)
    assert "module load x\n" in text and "#SBATCH --nodes=2 " in text
    assert "llm_parallel.cli launch /runs/llama/submit.yaml" in text
    with pytest.raises(UserError, match=r"has no \{setup\}"):
        text_of(replace(request, setup=("module load y",)))
    path.write_text("{options}")
    with pytest.raises(UserError, match=r"has no \{command\}"):
        text_of(request)


def test_array(tmp_path: Path) -> None:
    """Each task of the array, as bash reads the file, launches with its value and in a folder that is named by it."""
    request = SubmitRequest(2, 0, array="optim.lr=1e-4,3e-4,a b", throttle=2)
    run_dir = Path("/runs/a # b")
    text = text_of(request, HERE, run_dir)
    assert "--array=0-2%2" in options_of(text)
    assert f"--output={run_dir}/logs/slurm-%A_%a.out" in options_of(text)
    task = {"SLURM_ARRAY_TASK_ID": "2"}
    assert started(text, task, tmp_path) == [
        f"{run_dir}/submit.yaml", "optim.lr=a b", f'run_dir="{run_dir}/optim.lr=a_b"'
    ]  # fmt: skip
    assert sweep_folders(request) == ["optim.lr=1e-4", "optim.lr=3e-4", "optim.lr=a_b"]
    mine = tmp_path / "mine.sbatch"
    mine.write_text("{options}\n{command}")
    with pytest.raises(UserError, match=r"has no \{values\}"):
        text_of(replace(request, template=str(mine)))
    for array in ("optim.lr", "optim.lr=", "optim.lr=1,,2", "=1", "run_dir=a,b", "optim.lr=1,1", "data.path=a/b,a b"):
        with pytest.raises(UserError, match="--array"):
            text_of(replace(request, array=array))


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (SubmitRequest(0), "--nodes 0 must be at least 1"),
        (SubmitRequest(2, spares=-1), "--spares -1 must be at least 0"),
        (SubmitRequest(2, min_nodes=3), "--min-nodes 3 must be at least 1 and at most --nodes 2"),
        (SubmitRequest(2, time="soon"), "--time soon is no time limit"),
        (SubmitRequest(2, time="2"), "leaves no time before the warning 180 s earlier"),
        (SubmitRequest(2, partition="a b"), "--partition 'a b' has characters"),
        (SubmitRequest(2, name="a\nb"), "--name 'a.*b' has characters"),
        (SubmitRequest(2, gpu_type="h100:8"), "--gpu-type 'h100:8' has characters"),
        (SubmitRequest(2, options=("constraint=h100",)), "is no option of sbatch"),
        (SubmitRequest(2, constraint='a"b'), "--constraint 'a\"b' has characters"),
        (SubmitRequest(2, shared=True), "--shared takes parts of nodes; give --cpus and --mem"),
        (SubmitRequest(2, shared=True, cpus=1, mem="0"), "--shared takes parts of nodes; give --cpus and --mem"),
        (SubmitRequest(2, cpus=4), "--cpus 4 is for parts of nodes"),
        (SubmitRequest(2, mem="lots"), "--mem lots must be a number with K, M, G or T"),
        (SubmitRequest(2, gres="gpu:h100:4"), "--gres gpu:h100:4 must count the 8 GPUs of --gpus-per-node"),
        (SubmitRequest(2, gres="nvme:8"), "--gres nvme:8 must count the 8 GPUs"),
        (SubmitRequest(2, gres="gpu:8", gpu_type="h100"), "keep one"),
        (SubmitRequest(4, spares=1, segment=2), "--segment 2 does not divide 5 nodes"),
        (SubmitRequest(4, switches="few"), "--switches few must be a number"),
        (SubmitRequest(4, throttle=2), "--throttle 2 is for the runs of an --array"),
        (SubmitRequest(2, after="job 12"), "--after job 12 must be numbers of jobs"),
        (SubmitRequest(2, after="12:14"), "--after 12:14 must be numbers of jobs"),
        (SubmitRequest(2, options=("--dependency=afterok:3",)), "give --after for jobs that must have made all"),
    ],
)
def test_bad_requests(request_: SubmitRequest, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_request(request_, HERE, CONFIG)


def test_without_slurm_it_says_so(tmp_path: Path) -> None:
    path = write_batch_file("#!/bin/bash\n", tmp_path / "run")
    assert queued_jobs({"PATH": str(tmp_path)}) == []
    with pytest.raises(UserError, match="sbatch is not installed here"):
        submit(path, {"PATH": str(tmp_path)})
    assert (tmp_path / "run" / "submit.sbatch").read_text() == "#!/bin/bash\n"


def test_sbatch_and_squeue_do_not_see_the_job_around_them(tmp_path: Path) -> None:
    """Neither its variables and devices, nor what says that output goes to a terminal; but where SLURM is."""
    fake(tmp_path, "sbatch", f"env > {tmp_path}/seen; echo 7")
    outer = {"SLURM_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "3", "SLURM_CPUS_PER_TASK": "2", "SRUN_CPUS_PER_TASK": "2",
             "CUDA_VISIBLE_DEVICES": "0", "FORCE_COLOR": "1", "LLM_PARALLEL_SECRET": "x",
             "PMIX_RANK": "0"}  # fmt: skip
    kept = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_CONF": "/etc/slurm.conf", "LLM_PARALLEL_API_KEYS": "k"}
    assert submit(Path("x.sbatch"), {**outer, **kept}) == "7"
    seen = (tmp_path / "seen").read_text().splitlines()
    assert not [line for line in seen if line.split("=")[0] in outer]
    assert {f"{name}={value}" for name, value in kept.items()} <= {*seen}
    submit(Path("x.sbatch"), {"CUDA_VISIBLE_DEVICES": "0", **kept})  # outside of a job it is the user's
    assert "CUDA_VISIBLE_DEVICES=0" in (tmp_path / "seen").read_text().splitlines()


def test_a_second_job_of_a_folder_is_refused(tmp_path: Path) -> None:
    """As squeue names jobs: by the script, with any letters in it. A job that ends hinders nobody."""
    run, there = Path("/runs/a | b"), {"PATH": f"{tmp_path}:/usr/bin:/bin", "USER": "me"}

    def waits(state: str, user: str, name: str, script: str) -> None:
        fake(tmp_path, "squeue", f"printf '%s\\x1f%s\\x1f%s\\x1f%s\\x1f%s\\n' 17 {state} {user} {name} '{script}'")

    waits("PENDING", "you", "other", f"{run}/submit.sbatch")
    with pytest.raises(UserError, match=r"has job 17 already \(pending\).*scancel 17"):
        refuse_second_job(queued_jobs(there), run, "mine", False, there)
    assert refuse_second_job(queued_jobs(there), run, "mine", True, there)
    waits("RUNNING", "me", "mine", "/elsewhere/submit.sbatch")
    with pytest.raises(UserError, match=r"name mine is that of job 17 \(/elsewhere/submit.sbatch\)"):
        refuse_second_job(queued_jobs(there), run, "mine", True, there)
    waits("RUNNING", "you", "mine", "/elsewhere/submit.sbatch")
    assert not refuse_second_job(queued_jobs(there), run, "mine", False, there)
    waits("COMPLETING", "me", "mine", f"{run}/submit.sbatch")
    assert not refuse_second_job(queued_jobs(there), run, "mine", False, there)
    fake(tmp_path, "squeue", "echo 'slurm_load_jobs error: Unable to contact' >&2; exit 1")
    assert queued_jobs(there) == []


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
    assert job is not None and job.may_lead and job.restart_count == 2 and job.node == "n1"
    task = SlurmJob.from_environment({**batch, "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"})
    assert task is not None and task.job_id == "7_3"
    step = SlurmJob.from_environment({**batch, "SLURM_STEP_ID": "0"})
    assert step is not None and not step.may_lead


@pytest.mark.parametrize("value", ["abc", "1.5", "²", "-1"])
def test_a_job_with_a_variable_that_is_no_number_is_refused_by_its_name(value: str) -> None:
    with pytest.raises(UserError, match=r"SLURM_RESTART_COUNT = .* must be a whole number"):
        SlurmJob.from_environment({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": value})
    with pytest.raises(UserError, match=r"SLURM_GPUS_ON_NODE = .* must be a whole number"):
        devices_here([0], {"SLURM_STEP_ID": "0", "SLURM_GPUS_ON_NODE": value})


def test_a_job_without_its_optional_variables_is_a_first_start() -> None:
    job = SlurmJob.from_environment({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "", "SLURM_ARRAY_TASK_ID": "3"})
    assert job is not None and job.job_id == "7" and job.restart_count == 0


@pytest.mark.parametrize(
    ("step", "may_lead"),
    [
        ({}, True),  # the batch script, and the shell of salloc on the login node
        ({"SLURM_STEP_ID": "4294967291", "SLURM_PROCID": "0"}, True),  # the batch script of newer versions
        ({"SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0"}, True),  # salloc's shell on a node
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, True),  # srun --pty bash
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"}, False),
    ],
)
def test_who_may_start_a_run(step: dict[str, str], may_lead: bool) -> None:
    job = SlurmJob.from_environment({"SLURM_JOB_ID": "7", **step})
    assert job is not None and job.may_lead is may_lead


def test_switches_above_a_node() -> None:
    """As Slurm gives them with a tree of switches, and without one."""
    tree = {"SLURM_TOPOLOGY_ADDR": "spine.leaf2.n7", "SLURM_TOPOLOGY_ADDR_PATTERN": "switch.switch.node"}
    assert switches_above(tree) == "spine.leaf2"
    assert switches_above({"SLURM_TOPOLOGY_ADDR": "n7", "SLURM_TOPOLOGY_ADDR_PATTERN": "node"}) == ""
    assert switches_above({}) == ""


def test_the_agents_step_has_no_terminal(tmp_path: Path) -> None:
    """With --unbuffered, srun would give each task one, and a log its bars. The user's options come after ours."""
    fake(tmp_path, "srun", f"printf '%s\\n' \"$@\" > {tmp_path}/seen; printenv PYTHONUNBUFFERED >> {tmp_path}/seen")
    job = SlurmJob("7", 0, "n1", {"PATH": f"{tmp_path}:/usr/bin:/bin"})
    assert job.start_agents(["agent"], ["n1", "n2"], ["--cpu-bind=cores"]).wait(60) == 0
    seen = (tmp_path / "seen").read_text().splitlines()
    assert not {"--unbuffered", "-u", "--pty"} & {*seen}
    assert seen[-3:] == ["--cpu-bind=cores", "agent", "1"] and seen.index("--cpu-bind=none") < len(seen) - 3


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
