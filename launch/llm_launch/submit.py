"""``llm-parallel submit``: a run as a SLURM job, by a batch file that its user can read, change and submit again."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_launch.agent_step import AgentStep
from llm_launch.lease import refuse_if_held
from llm_launch.slurm import parse_time
from llm_launch.submit_request import SubmitRequest
from llm_parallel.config.tree import RunConfig
from llm_parallel.errors import UserError
from llm_parallel.files import atomic_write, refuse_strangers
from llm_parallel.lines import note

FILE_NAME = "submit.sbatch"
CALL_S = 60
_NAME = re.compile(r"[A-Za-z0-9._,@+-]+")
_AMOUNT = re.compile(r"\d+[KMGT]?")
_JOBS = re.compile(r"\d+(_\d+)?(,\d+(_\d+)?)*")
_COUNTED_GPUS = re.compile(r"(?:^|,)(?:gres[/:])?gpu(?::[^,:]+)?:(\d+)(?:\([^)]*\))?(?=,|$)")
OUTER = ("SLURM_", "SRUN_", "SALLOC_", "PMI_", "PMIX_", "TORCHELASTIC_", "LLM_PARALLEL_ASKED", "LLM_PARALLEL_SECRET")
"""How variables begin that belong to a job, a step or a launcher that ``submit`` is called in."""
KEPT = ("SLURM_CONF", "SLURM_CLUSTERS")
OF_TERMINAL = ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES")
"""What would have programs write a batch log as if it were the terminal that ``submit`` is called from."""
DEVICES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
OVER = ("COMPLETING", "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE",
        "BOOT_FAIL", "REVOKED")  # fmt: skip


def check_request(request: SubmitRequest, step: AgentStep, config: RunConfig) -> None:
    """Raises UserError for what SLURM, or a shell that reads the batch file, would refuse or misunderstand."""
    for name, value, least in (
        ("nodes", request.nodes, 1), ("gpus-per-node", request.gpus, 0), ("spares", request.spares, 0),
        ("warning-s", request.warning, 10), ("throttle", request.throttle, 1), ("segment", request.segment, 1),
        ("cpus", request.cpus, 1),
    ):  # fmt: skip
        if value is not None and value < least:
            raise UserError(f"--{name} {value} must be at least {least}")
    if request.min_nodes is not None and not 1 <= request.min_nodes <= request.nodes:
        raise UserError(f"--min-nodes {request.min_nodes} must be at least 1 and at most --nodes {request.nodes}")
    _check_time(request)
    _check_resources(request)
    for name in ("partition", "account", "qos", "name", "reservation", "gpu_type"):
        text = getattr(request, name)
        if text is not None and not _NAME.fullmatch(text):
            raise UserError(
                f"--{name.replace('_', '-')} {text!r} has characters that SLURM does not take; use letters, digits,"
                " . _ -"
            )
    if request.throttle is not None and not request.sweep:
        raise UserError(f"--throttle {request.throttle} is for the runs of an --array; give both")
    if request.after is not None and not _JOBS.fullmatch(request.after):
        raise UserError(f"--after {request.after} must be numbers of jobs, as 12 or 12,14 (of an array's task 12_3)")
    _check_texts(request, config)
    step.check()


def _check_time(request: SubmitRequest) -> None:
    if request.time is not None:
        seconds = parse_time(request.time)
        if seconds is None or seconds <= 0:
            raise UserError(f"--time {request.time} is no time limit; write days-hours:minutes:seconds, as 3-00:00:00")
        if seconds <= request.warning:
            raise UserError(
                f"--time {request.time} leaves no time before the warning {request.warning} s earlier; give more "
                "time or a smaller --warning-s"
            )
    if request.switches is not None:
        count, at, wait = request.switches.partition("@")
        if not count.isdigit() or int(count) < 1 or (at and parse_time(wait) is None):
            raise UserError(f"--switches {request.switches} must be a number, or a number and a time, as 1@12:00:00")


def _check_resources(request: SubmitRequest) -> None:
    if request.mem is not None and not _AMOUNT.fullmatch(request.mem):
        raise UserError(f"--mem {request.mem} must be a number with K, M, G or T, as 200G, or 0 for all of a node")
    if request.shared and (request.cpus is None or request.mem in (None, "0")):
        raise UserError("--shared takes parts of nodes; give --cpus and --mem of each node, as --cpus 16 --mem 200G")
    if request.cpus is not None and not request.shared:
        raise UserError(f"--cpus {request.cpus} is for parts of nodes; give --shared too, or leave it out")
    if request.gres is not None and request.gpu_type is not None:
        raise UserError(f"--gres {request.gres} and --gpu-type {request.gpu_type} both say which GPUs; keep one")
    if request.gres not in (None, "none"):
        counted = _COUNTED_GPUS.search(request.gres or "")
        if counted is None or int(counted[1]) != request.gpus:
            raise UserError(
                f"--gres {request.gres} must count the {request.gpus} GPUs of --gpus-per-node, as "
                f"gpu:h100:{request.gpus}, or be none"
            )
    for count in {request.nodes + request.spares, (request.min_nodes or request.nodes)}:
        if request.segment is not None and count % request.segment:
            raise UserError(f"--segment {request.segment} does not divide {count} nodes; give numbers that it divides")


def _check_texts(request: SubmitRequest, config: RunConfig) -> None:
    for what, folder in (("run_dir", Path(config.run_dir).resolve()), ("the current folder", Path.cwd())):
        text = str(folder)
        if not text.isprintable() or '"' in text or "\\" in text:
            raise UserError(
                f"{what} = {text!r} has a line break or another character that a batch file's options cannot hold; give"
                " a folder without it"
            )
    for name in ("constraint", "gres"):
        text = getattr(request, name)
        if text is not None and not (text and text.isprintable() and not {'"', "\\"} & set(text)):
            raise UserError(f"--{name} {text!r} has characters that a batch file's options cannot hold")
    for option in request.options:
        if not option.startswith("-") or not option.isprintable():
            raise UserError(f"--sbatch {option!r} is no option of sbatch; write it as --sbatch=--mail-type=end")
        if option.startswith(("--dependency", "-d")) and "singleton" not in option:
            raise UserError(
                f"--sbatch {option} would let two jobs of this run folder run at once; give --after for jobs that must"
                " have made all their steps, or add singleton, as --sbatch=--dependency=afterany:12,singleton"
            )
    for line in request.setup:
        if "\0" in line:
            raise UserError(f"--setup {line!r} has a zero byte; give a line of bash")


@dataclass(frozen=True)
class QueuedJob:
    """A job that waits or runs, as squeue names it."""

    job_id: str
    state: str
    user: str
    name: str
    script: str


def queued_jobs(environment: Mapping[str, str]) -> list[QueuedJob]:
    """Jobs of all users that wait or run. Empty, with a note, if SLURM does not say."""
    separator = "\x1f"
    command = ["squeue", "--noheader", "--all", "--format", separator.join(("%i", "%T", "%u", "%j", "%o"))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CALL_S, env=_outside(environment))
    except FileNotFoundError:
        return []  # sbatch is missing too, and says so
    except subprocess.TimeoutExpired:
        note(f"squeue did not answer within {CALL_S} s; whether a job of this run folder waits or runs is not known")
        return []
    if done.returncode:
        note(f"whether a job of this run folder waits or runs is not known: {_one_line(done.stderr)}")
    jobs = [QueuedJob(*line.split(separator, 4)) for line in done.stdout.splitlines() if line.count(separator) >= 4]
    return [job for job in jobs if job.state not in OVER]


def refuse_second_job(
    jobs: list[QueuedJob], run_dir: Path, name: str, behind: bool, environment: Mapping[str, str]
) -> bool:
    """Whether another job of the run folder waits or runs. Raises UserError if so, unless this one is to start
    ``behind`` it; if a job of this user for another folder has this name; or if a process here holds the folder."""
    refuse_if_held(run_dir)
    script, user = str(run_dir / FILE_NAME), environment.get("USER") or environment.get("LOGNAME")
    for job in jobs:
        same = job.script == script
        if not same and job.name == name and user in (None, job.user):
            raise UserError(
                f"the job's name {name} is that of job {job.job_id} ({job.script}), behind which this one would wait;"
                " give another --name"
            )
        if same and not behind:
            raise UserError(
                f"run_dir = {run_dir} has job {job.job_id} already ({job.state.lower()}), which goes back to the queue"
                f" by itself; to change what it trains change submit.yaml there, or end it by `scancel {job.job_id}`"
                " and submit again, or give --behind for a job that starts when it has ended"
            )
    return any(job.script == script for job in jobs)


def write_batch_file(text: str, run_dir: Path) -> Path:
    """Writes the batch file into the run folder, which it makes. Raises UserError if that cannot be written."""
    path = run_dir / FILE_NAME
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        refuse_strangers(run_dir, run_dir.stat())
        with atomic_write(path) as handle:
            handle.write(text)
    except OSError as error:
        raise UserError(f"run_dir = {run_dir} cannot be written ({error.strerror}); give a shared folder") from None
    return path


def submit(path: Path, environment: Mapping[str, str] = os.environ, more: Sequence[str] = ()) -> str:
    """Hands the batch file ``path`` to sbatch with ``more`` options, without what a job or a terminal around this
    process has put into the environment; the job's id. Raises UserError if there is no sbatch, or it refuses."""
    command = ["sbatch", "--parsable", *more, str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CALL_S, env=_outside(environment))
    except FileNotFoundError:
        raise UserError(f"sbatch is not installed here; submit {path} where it is, or see --dry-run") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"sbatch did not answer within {CALL_S} s; is slurmctld up? The batch file is {path}") from None
    if done.returncode:
        raise UserError(f"sbatch refused {path}: {_one_line(done.stderr)}")
    return done.stdout.strip().split(";")[0]


def _outside(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment as it is outside of every job and terminal."""
    inside = DEVICES if "SLURM_JOB_ID" in environment else ()
    return {
        name: value
        for name, value in environment.items()
        if name in KEPT or not (name.startswith(OUTER) or name in OF_TERMINAL or name in inside)
    }


def _one_line(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())
