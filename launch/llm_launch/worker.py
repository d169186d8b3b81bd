"""A worker's place among the processes of a run, and its report to the launcher when it fails."""

from __future__ import annotations

import json
import os
import re
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from llm_launch.variables import number_in
from llm_parallel.errors import EXIT_USER_ERROR, UserError
from llm_parallel.files import atomic_write
from llm_parallel.lines import note

EXIT_CRASH = 1


@dataclass(frozen=True)
class WorkerEnv:
    """Place of this process among those of the run, and where they meet."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    master_addr: str
    master_port: int

    def export(self) -> None:
        """Writes the values under the names that torch.distributed's ``env://`` rendezvous reads."""
        for name, value in asdict(self).items():
            os.environ[name.upper()] = str(value)


def worker_environment(environment: Mapping[str, str] = os.environ) -> WorkerEnv | None:
    """What our launcher, torchrun or ``srun`` told this process; None if none of them started it.

    Raises UserError if a variable is missing or is not a number.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return _from_torchrun(environment)
    if "SLURM_STEP_NUM_TASKS" in environment and "SLURM_STEP_NODELIST" in environment:  # set by srun, not by sbatch
        return _from_slurm(environment)
    return None


def _from_torchrun(environment: Mapping[str, str]) -> WorkerEnv:
    rank, world_size = number_in(environment, "RANK"), number_in(environment, "WORLD_SIZE")
    one_machine = "LOCAL_RANK" not in environment
    return WorkerEnv(
        rank=rank,
        local_rank=rank if one_machine else number_in(environment, "LOCAL_RANK"),
        world_size=world_size,
        local_world_size=number_in(environment, "LOCAL_WORLD_SIZE", world_size if one_machine else None),
        master_addr=environment.get("MASTER_ADDR", "127.0.0.1"),
        master_port=number_in(environment, "MASTER_PORT"),
    )


def _from_slurm(environment: Mapping[str, str]) -> WorkerEnv:
    tasks = _tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", environment["SLURM_STEP_NUM_TASKS"]))
    node = number_in(environment, "SLURM_NODEID", 0)
    job, step = number_in(environment, "SLURM_JOB_ID", 0), number_in(environment, "SLURM_STEP_ID", 0)
    # Every process computes the same port; below the range that the kernel gives to outgoing connections (32768 up).
    port = 20000 + (job * 31 + step) % 12000
    return WorkerEnv(
        rank=number_in(environment, "SLURM_PROCID"),
        local_rank=number_in(environment, "SLURM_LOCALID"),
        world_size=number_in(environment, "SLURM_STEP_NUM_TASKS"),
        local_world_size=tasks[min(node, len(tasks) - 1)],
        master_addr=environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
        master_port=number_in(environment, "MASTER_PORT", port),
    )


def first_host(node_list: str) -> str:
    """First host of Slurm's notation: ``gpu[003-007,9],login1`` gives ``gpu003``."""
    match = re.match(r"[^,\[]+", node_list)
    if match is None:
        raise UserError(f"environment variable SLURM_STEP_NODELIST = {node_list!r} names no host")
    host, rest = match.group(), node_list[match.end() :]
    while rest.startswith("["):  # several brackets: rack[1-2]node[01-16]
        inside, _, rest = rest[1:].partition("]")
        host += re.split(r"[-,]", inside)[0]
        tail = re.match(r"[^,\[]*", rest)
        assert tail is not None
        host, rest = host + tail.group(), rest[tail.end() :]
    return host


def _tasks_per_node(text: str) -> list[int]:
    """``4(x2),3`` gives [4, 4, 3]."""
    tasks = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise UserError(f"environment variable SLURM_STEP_TASKS_PER_NODE = {text!r} is not like 4(x2),3")
        tasks += [int(match.group(1))] * int(match.group(2) or 1)
    return tasks


def error_path(log_dir: Path, rank: int) -> Path:
    """File in which a worker says why it ended."""
    return log_dir / f"error_rank_{rank}.json"


def report_error(log_dir: Path, rank: int, error: BaseException) -> int:
    """Leaves ``error`` where the launcher finds it and in this process's log; returns the exit status to end with.

    The file holds rank, kind (``user`` for UserError, else ``crash``), message, traceback and time (Unix seconds).
    Never raises: on a full disk the launcher makes do with the exit status and the log.
    """
    is_user_error = isinstance(error, UserError)
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    message = str(error) if is_user_error else "".join(traceback.format_exception_only(type(error), error)).strip()
    record = {
        "rank": rank,
        "kind": "user" if is_user_error else "crash",
        "message": message,
        "traceback": trace,
        "time": time.time(),
    }
    try:
        with atomic_write(error_path(log_dir, rank)) as handle:
            json.dump(record, handle)
    except OSError:
        pass  # the log and the exit status say it too
    note(message if is_user_error else trace)
    return EXIT_USER_ERROR if is_user_error else EXIT_CRASH
