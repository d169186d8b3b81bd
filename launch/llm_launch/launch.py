"""``llm-parallel launch``: a run that survives failures, on this machine or on the nodes of a SLURM job."""

from __future__ import annotations

import asyncio
import math
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from llm_launch import wire
from llm_launch.agents import Agents, LocalAgents, SlurmAgents, local_nodes, paced
from llm_launch.controller import Controller
from llm_launch.slurm import SlurmError, SlurmJob
from llm_launch.states import EXIT_TOO_FEW
from llm_launch.vault import make_run_folder
from llm_parallel.config.rules import num_processes
from llm_parallel.config.tree import RunConfig
from llm_parallel.errors import UserError

SECRET = "LLM_PARALLEL_SECRET"


def launch_elastic(
    agents: Agents, device: Literal["cpu", "cuda"], disk_step: int, slurm: SlurmJob | None = None
) -> int:
    """Runs the training that ``agents`` know; the exit status. ``disk_step``: step of the newest checkpoint, 0 if none.

    0: finished, or saved on SIGTERM or at the time limit; 2: a mistake of the user; 75: too few devices were left for
    too long; 1: any other end. In a SLURM job (``slurm``) USR1, which announces the time limit, and too few devices put
    the job back into the queue, without the nodes that were condemned.
    """
    if not agents.expected or not all(agents.expected.values()):
        raise UserError("there is no device to train on; give --processes 1 or more")
    if agents.config.elastic.replicate_every_steps:
        make_run_folder(Path(agents.config.elastic.replica_dir), Path(agents.config.run_dir))
    controller = Controller(agents.config, Path(agents.config.run_dir), agents, device, disk_step)
    signals: list[int] = []
    try:
        status = asyncio.run(_control(controller, agents, signals))
        if slurm is not None and (status == EXIT_TOO_FEW or (status == 0 and signal.SIGUSR1 in signals)):
            _requeue(slurm, controller)
    finally:
        controller.close()
    return status


def _requeue(job: SlurmJob, controller: Controller) -> None:
    bad = controller.used_up()
    controller.journal.event("requeue", cause=f"without {', '.join(bad)}" if bad else None)
    try:
        job.requeue(list(bad))
    except SlurmError as error:
        controller.journal.say(f"the job could not be requeued: {error}")


async def _control(controller: Controller, agents: Agents, signals: list[int]) -> int:
    loop = asyncio.get_running_loop()

    def stop(number: int) -> None:
        signals.append(number)
        controller.stop()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) != signal.SIG_IGN:
            loop.add_signal_handler(number, stop, number)
    port = await controller.listen(agents.host)
    try:
        agents.begin(port)
        return await controller.run()
    finally:
        await asyncio.to_thread(agents.end)


def agents_here(
    config: RunConfig, run_file: Path, processes: int, nodes: int, environment: Mapping[str, str]
) -> Agents:
    """Agents on this machine."""
    secret = environment.get(SECRET) or wire.new_secret()
    return LocalAgents(paced(config, nodes), run_file, local_nodes(processes, nodes), secret, environment)


def agents_of_job(
    config: RunConfig, run_file: Path, job: SlurmJob, device: Literal["cpu", "cuda"], environment: Mapping[str, str]
) -> Agents:
    """Agents on the nodes of a SLURM job. Raises UserError if SLURM does not answer, or this is no place to start."""
    if not job.is_batch_shell:
        raise UserError("llm-parallel launch is in a step of a SLURM job; start it in the batch script, without srun")
    try:
        names = job.nodes()
        address = job.addresses([job.node])[job.node]
    except (SlurmError, KeyError, OSError) as error:
        raise UserError(f"SLURM does not say which nodes job {job.job_id} has: {error}") from None
    per_node = job.gpus_per_node if device == "cuda" else 0
    if not per_node:
        active = max(1, len(names) - config.elastic.spare_nodes)
        per_node = math.ceil(num_processes(config) / active)
    secret = environment.get(SECRET) or wire.new_secret()
    print(
        f"elastic | SLURM job {job.job_id}, start {job.restart_count + 1}: {len(names)} nodes with {per_node} devices",
        file=sys.stderr,
    )
    return SlurmAgents(paced(config, len(names)), run_file, job, names, list(range(per_node)), secret, address)
