"""``llm-parallel launch``: a run that survives failures, on this machine or on the nodes of a SLURM job."""

from __future__ import annotations

import asyncio
import math
import signal
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Literal

from llm_launch import wire
from llm_launch.agent_step import AgentStep
from llm_launch.controller import Controller
from llm_launch.copy_files import make_run_folder
from llm_launch.door import raise_file_limit
from llm_launch.job_end import GIVEN_UP
from llm_launch.job_record import forget
from llm_launch.network import address_for
from llm_launch.slurm import SlurmError, SlurmJob
from llm_launch.snapshot import used_up
from llm_launch.starters import AgentStarter, LocalStarter, local_nodes, paced
from llm_launch.steps import SlurmStarter
from llm_launch.supervised_job import SupervisedJob
from llm_parallel.config.rules import num_processes
from llm_parallel.config.tree import RunConfig
from llm_parallel.errors import UserError
from llm_parallel.lines import note, reader_is_gone

SECRET = "LLM_PARALLEL_SECRET"
ASKED = "LLM_PARALLEL_ASKED"
"""Variable in which the batch script passes on a signal that it got before the launcher listened."""
READER_S = 0.5
STANDARD_OUTPUT = 1


class StopRequests:
    """Signals that ask the run to end, from the command's beginning on. ``already``: the name of one that the batch
    script got before."""

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self, already: str | None = None) -> None:
        self.received: list[int] = [signal.Signals[f"SIG{already}"]] if already else []
        self.wanted = [number for number in self.NUMBERS if signal.getsignal(number) != signal.SIG_IGN]

    def catch(self) -> None:
        """Collects these signals. A second Ctrl-C before training begins ends the command."""
        for number in self.wanted:
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in self.received:
            raise SystemExit(128 + number)
        self.received.append(number)

    @property
    def time_is_up(self) -> bool:
        """Whether SLURM has announced the job's time limit."""
        return signal.SIGUSR1 in self.received


def launch_elastic(
    starter: AgentStarter,
    device: Literal["cpu", "cuda"],
    requests: StopRequests,
    newest_step: Callable[[], int] = lambda: 0,
    slurm: SlurmJob | None = None,
) -> int:
    """Runs the training that ``starter`` knows; the exit status, as launch/README.md has it. ``newest_step``: finds the
    step of the newest complete checkpoint. In a SLURM job (``slurm``) some ends put the job back into the queue."""
    raise_file_limit()
    if not starter.expected or not all(starter.expected.values()):
        raise UserError("there is no device to train on; give --processes 1 or more")
    if starter.config.elastic.replicate_every_steps:
        make_run_folder(Path(starter.config.elastic.replica_dir), Path(starter.config.run_dir))
    controller = Controller(starter.config, Path(starter.config.run_dir), starter, device, newest_step)
    try:
        if slurm is None:
            forget(Path(starter.config.run_dir))
        job = SupervisedJob(slurm, controller.journal, starter.config, newest_step()) if slurm is not None else None
        if job is not None and not job.may_begin():
            return GIVEN_UP
        status = asyncio.run(_control(controller, starter, requests))
        requests.catch()  # asyncio has removed its handlers, and a signal must not interrupt what follows
        if job is not None:
            bad = used_up(controller.fleet, controller.ledger)
            asked = bool(requests.received) or controller.stop_asked
            status = job.settle(status, requests.time_is_up, bad, controller.fleet.step, asked)
    finally:
        controller.close()
    return status


async def _control(controller: Controller, starter: AgentStarter, requests: StopRequests) -> int:
    loop = asyncio.get_running_loop()

    def stop(number: int) -> None:
        requests.received.append(number)
        controller.stop()

    for number in requests.wanted:
        loop.add_signal_handler(number, stop, number)
    if requests.received:
        controller.stop()
    port = await controller.listen(starter.host)
    watching = loop.create_task(_stop_when_unheard(controller, partial(stop, signal.SIGPIPE)))
    try:
        if not requests.received:
            starter.begin(port)
        return await controller.run()
    finally:
        watching.cancel()
        await asyncio.to_thread(starter.end)


async def _stop_when_unheard(controller: Controller, stop: Callable[[], None]) -> None:
    """Ends the run when the reader of its output has ended (``launch … | head``, a broken connection of ssh), as any
    other command ends then; but a run saves first."""
    while not reader_is_gone(STANDARD_OUTPUT):
        await asyncio.sleep(READER_S)
    controller.journal.event("unheard", cause="nobody reads the output any more; the run saves and ends")
    stop()


def starter_here(
    config: RunConfig, run_file: Path, processes: int, nodes: int, environment: Mapping[str, str]
) -> AgentStarter:
    """The starter of agents on this machine."""
    secret = environment.get(SECRET) or wire.new_secret()
    return LocalStarter(paced(config, nodes), run_file, local_nodes(processes, nodes), secret, environment)


def starter_of_job(
    config: RunConfig,
    run_file: Path,
    job: SlurmJob,
    gpus: int,
    environment: Mapping[str, str],
    step: AgentStep,
) -> AgentStarter:
    """The starter of agents on the nodes of a SLURM job, each of which trains on ``gpus`` GPUs, or with as many
    processes as the layout needs. Raises UserError if SLURM does not answer, or if this process
    is one of several that a step of the job started."""
    if not job.may_lead:
        raise UserError(
            f"srun started llm-parallel launch {job.environment.get('SLURM_STEP_NUM_TASKS', 'several')} times, and it"
            " starts its processes on all nodes itself; start it once, in the batch script or the shell of salloc"
            " without srun (if no srun started it, `unset SLURM_STEP_ID` before)"
        )
    try:
        names, first = job.nodes(), job.first_nodes()
        lost = job.taken([name for name in first if name not in names])
        # The shell of salloc may be on a machine that is no node of the job.
        known = {**dict(zip(names, names)), **job.addresses(names)}
        own = known.pop(job.node, job.node)
        address = address_for(list(known.values()), own)
    except SlurmError as error:
        raise UserError(f"SLURM does not say which nodes job {job.job_id} has: {error}") from None
    except OSError as error:
        raise UserError(f"the nodes of job {job.job_id} cannot find this one: {error}; see /etc/hosts") from None
    names = [name for name in first if name in {*names, *lost}] if lost else names
    per_node = gpus
    if not per_node:
        active = max(1, len(names) - config.elastic.spare_nodes)
        per_node = math.ceil(num_processes(config) / active)
    secret = environment.get(SECRET) or wire.new_secret()
    note(f"elastic | SLURM job {job.job_id}, start {job.restart_count + 1}: {len(names)} nodes with {per_node} devices")
    return SlurmStarter(
        paced(config, len(names)), run_file, job, names, list(range(per_node)), secret, address, step=step, lost=lost
    )
