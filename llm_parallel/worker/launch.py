"""``llm-parallel launch`` and ``submit``: a run under the elastic launcher, here or by SLURM."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from llm_launch.copy_files import run_folder
from llm_launch.lease import Lease
from llm_launch.slurm import SlurmJob
from llm_launch.submit import SubmitRequest, batch_file, check_request, submit
from llm_launch.supervise import ASKED, StopRequests, launch_elastic, starter_here, starter_of_job
from llm_parallel.checkpoint.folders import latest_checkpoint, step_of
from llm_parallel.config.load import load_config
from llm_parallel.config.rules import num_processes
from llm_parallel.config.tree import RunConfig
from llm_parallel.errors import EXIT_STOPPED, EXIT_USER_ERROR
from llm_parallel.evaluate.in_run_file import check_tasks
from llm_parallel.lines import Unheard, say
from llm_parallel.parallel.platform import resolve_device
from llm_parallel.screen import say_next
from llm_parallel.train.inherit import with_own_tokenizer
from llm_parallel.train.preflight import preflight, preflight_job
from llm_parallel.train.room import check_copies, check_room
from llm_parallel.worker.command import CONFIG_NAME, after_run, draw_plots, is_finished, save_config
from llm_parallel.worker.show import show_mixture


def launch_command(
    run_file: str, overrides: Sequence[str], processes: int | None, nodes: int | None, environment: Mapping[str, str]
) -> int:
    """Exit status of an elastic run, on this machine, or in a SLURM job's batch script on the nodes of the job.

    ``processes``: devices to use here, more than the layout needs are spares; ``nodes``: agents that share them. Either
    keeps the run on this machine, in a SLURM job too.
    """
    requests = StopRequests(environment.get(ASKED))
    requests.catch()
    with Unheard():
        return _launch_and_say(run_file, overrides, requests, (processes, nodes), environment)


def _launch_and_say(
    run_file: str,
    overrides: Sequence[str],
    requests: StopRequests,
    size: tuple[int | None, int | None],
    environment: Mapping[str, str],
) -> int:
    config = preflight(load_config(run_file, overrides, notice=say), None, say)
    check_tasks(config, say)
    config = with_own_tokenizer(config, say)
    again = " ".join(["llm-parallel launch", run_file, *map(shlex.quote, overrides)])
    if is_finished(config):
        say_next(after_run(config, 0, again))
        return 0
    check_room(config, say)
    with Lease(Path(config.run_dir), environment):
        status = _launch(config, requests, size, environment)
    if status != EXIT_USER_ERROR:
        say_next(after_run(config, status, again))
    return status


def _launch(
    config: RunConfig,
    requests: StopRequests,
    size: tuple[int | None, int | None],
    environment: Mapping[str, str],
) -> int:
    processes, nodes = size
    saved = (Path(config.run_dir) / CONFIG_NAME).resolve()
    save_config(config, saved)
    show_mixture(config)
    device: Literal["cpu", "cuda"] = "cuda" if resolve_device(config.device) == "cuda" else "cpu"
    job = SlurmJob.from_environment(environment) if processes is None and nodes is None else None
    if job is not None:
        starter = starter_of_job(config, saved, job, device, environment)
    else:
        starter = starter_here(config, saved, processes or num_processes(config), nodes or 1, environment)
    working = max(1, len(starter.expected) - (config.elastic.spare_nodes if job is not None else 0))
    copies = run_folder(Path(config.elastic.replica_dir), Path(config.run_dir))
    check_copies(config, working, 1 if job is not None else working, copies, say)
    status = launch_elastic(starter, device, requests, partial(newest_step, config), job)
    if status in (0, EXIT_STOPPED) and config.log.plots:
        draw_plots(Path(config.run_dir))
    return status


def newest_step(config: RunConfig) -> int:
    """Step of the run's newest complete checkpoint, 0 if there is none."""
    newest = latest_checkpoint(Path(config.run_dir) / "checkpoints")
    return (step_of(newest) or 0) if newest is not None else 0


def submit_command(run_file: str, overrides: Sequence[str], request: SubmitRequest, dry_run: bool) -> int:
    """Exit status of ``llm-parallel submit``: checks the run as ``launch`` will, then hands it to SLURM; ``dry_run``
    prints the batch file instead."""
    config = load_config(run_file, overrides, notice=say)
    for differs in [[override] for override in request.sweep] or [[]]:
        one = load_config(run_file, [*overrides, *differs])
        check_request(request, one)
        if not dry_run:
            gpus = request.gpus_per_node
            one = preflight_job(one, gpus, request.nodes * gpus or num_processes(one), say)
            check_tasks(one, say)
            check_room(one, say, max(1, len(request.sweep)))
    text = batch_file(request, config, Path(run_file).resolve(), overrides)
    if dry_run:
        print(text, end="")
        say_next("the same without --dry-run")
        return 0
    job = submit(text, Path(config.run_dir).resolve())
    say(f"job {job}; batch file and log in {config.run_dir}")
    say_next(f"llm-parallel status {config.run_dir}")
    return 0
