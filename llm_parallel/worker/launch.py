"""``llm-parallel launch`` and ``submit``: a run under the elastic launcher, here or by SLURM."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from llm_launch.agent_step import AgentStep
from llm_launch.batch_file import batch_file, job_name, sweep_folders
from llm_launch.copy_files import run_folder
from llm_launch.job_record import JobRecord, read_record
from llm_launch.launch_request import LaunchRequest
from llm_launch.lease import Lease
from llm_launch.site import site_files, with_site
from llm_launch.slurm import SlurmJob
from llm_launch.submit import check_request, queued_jobs, refuse_second_job, submit, write_batch_file
from llm_launch.submit_request import SubmitRequest
from llm_launch.submitted import RUN_FILE, changes_since, freeze, frozen_text, note_job, versions
from llm_launch.supervise import ASKED, StopRequests, launch_elastic, starter_here, starter_of_job
from llm_parallel.checkpoint.folders import latest_checkpoint, step_of
from llm_parallel.command_help import COMMANDS
from llm_parallel.config.load import load_config
from llm_parallel.config.rules import num_processes
from llm_parallel.config.tree import RunConfig
from llm_parallel.errors import EXIT_STOPPED, EXIT_USER_ERROR, UserError
from llm_parallel.evaluate.in_run_file import check_tasks
from llm_parallel.lines import Unheard, note, say
from llm_parallel.parallel.platform import resolve_device
from llm_parallel.screen import say_next
from llm_parallel.train.inherit import Held, with_own_tokenizer
from llm_parallel.train.preflight import preflight, preflight_job, with_reported_tokenizer
from llm_parallel.train.promised import is_to_come, promised_model, run_of
from llm_parallel.train.room import check_copies, check_room
from llm_parallel.worker.command import CONFIG_NAME, after_run, draw_plots, is_finished, save_config
from llm_parallel.worker.show import show_mixture

LOG_S = 10.0


def launch_command(
    run_file: str, overrides: Sequence[str], request: LaunchRequest, step: AgentStep, environment: Mapping[str, str]
) -> int:
    """Exit status of an elastic run, on this machine, or in a SLURM job on the nodes of the job, where ``step`` says
    how the agents are started."""
    requests = StopRequests(environment.get(ASKED))
    requests.catch()
    step.check()
    with Unheard():
        return _launch_and_say(run_file, overrides, requests, (request, step), environment)


def _launch_and_say(
    run_file: str,
    overrides: Sequence[str],
    requests: StopRequests,
    asked: tuple[LaunchRequest, AgentStep],
    environment: Mapping[str, str],
) -> int:
    config = load_config(run_file, overrides, notice=say)
    for text in changes_since(Path(run_file), versions()):
        say(text)
    job = None if asked[0].here else SlurmJob.from_environment(environment)
    gpus = asked[0].gpus_per_node or (job.gpus_per_node if job is not None else 0)
    if job is not None and asked[1].elsewhere:
        config = preflight_job(config, gpus, num_processes(config), say)
    else:
        config = preflight(config, None, say)
    check_tasks(config, say)
    config = with_own_tokenizer(config, say)
    again = shlex.join(["llm-parallel", "launch", run_file, *overrides])
    if is_finished(config):
        say_next(after_run(config, 0, again))
        return 0
    check_room(config, say)
    with Lease(Path(config.run_dir), environment):
        status = _launch(config, requests, asked, (job, gpus), environment)
    if SlurmJob.from_environment(environment) is not None:
        again = f"llm-parallel status {shlex.quote(config.run_dir)}"  # the job may go on by itself
    if status != EXIT_USER_ERROR:
        say_next(after_run(config, status, again))
    return status


def _launch(
    config: RunConfig,
    requests: StopRequests,
    asked: tuple[LaunchRequest, AgentStep],
    where: tuple[SlurmJob | None, int],
    environment: Mapping[str, str],
) -> int:
    (request, step), (job, gpus) = asked, where
    saved = (Path(config.run_dir) / CONFIG_NAME).resolve()
    save_config(config, saved)
    show_mixture(config)
    if job is not None and step.elsewhere:
        on_gpu = config.device != "cpu" and gpus > 0
    else:
        on_gpu = resolve_device(config.device) == "cuda"
    device: Literal["cpu", "cuda"] = "cuda" if on_gpu else "cpu"
    if job is not None:
        starter = starter_of_job(config, saved, job, gpus if on_gpu else 0, environment, step)
    else:
        starter = starter_here(
            config, saved, request.processes or num_processes(config), request.nodes or 1, environment
        )
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


def submit_command(
    run_file: str,
    overrides: Sequence[str],
    asked: tuple[SubmitRequest, AgentStep],
    dry_run: bool,
    environment: Mapping[str, str],
) -> int:
    """Exit status of ``llm-parallel submit``: checks the run as ``launch`` will, keeps a copy of what it is, and hands
    it to SLURM; ``dry_run`` prints the batch file instead, and says what would be refused."""
    request, step = asked
    refuse_commands(run_file)
    for path in reversed(site_files(request, environment)):
        request, step, names = with_site(request, step, path)
        if names:
            note(f"{path}: {', '.join(names)}")
    config = load_config(run_file, [*overrides, f"elastic.spare_nodes={request.spares}"], notice=note)
    config = for_batch_log(config)
    runs = [load_config(run_file, [*overrides, override], notice=lambda _: None) for override in request.sweep]
    for one in runs or [config]:
        check_request(request, step, one)
    run_dir = Path(config.run_dir).resolve()
    text = batch_file(request, step, run_dir, run_dir / RUN_FILE)
    try:
        _check_runs(runs or [config], request)
    except UserError as error:
        if not dry_run:
            raise
        note(f"submit would refuse this now: {error}")
    if dry_run:
        print(text, end="")
        if request.dependency:
            note(f"sbatch is given {' '.join(request.dependency)} too")
        say_next("the same without --dry-run")
        return 0
    job = _submit(
        text, config, request, {"run_file": str(Path(run_file).resolve()), "overrides": [*overrides]}, environment
    )
    say(f"job {job}; batch file and log in {config.run_dir}")
    say(f"every start of the job reads {run_dir / RUN_FILE}, a copy of the run file: change it there to change the job")
    say_next(f"llm-parallel status {shlex.quote(config.run_dir)}")
    return 0


def refuse_commands(run_file: str) -> None:
    """Raises UserError if the run file's place holds the name of a command."""
    if run_file not in COMMANDS or Path(run_file).exists():
        return
    if run_file in ("pretrain", "sft", "prefer", "launch"):
        raise UserError(f"submit trains what a run file says: `llm-parallel submit RUN.yaml`, without {run_file}")
    raise UserError(
        f"submit takes a run file, to train; {run_file} runs on one node as a job of SLURM's own: `sbatch --nodes=1 "
        f"--gpus-per-node=1 --wrap 'llm-parallel {run_file} …'`, after a run with --dependency=afterok:JOB"
    )


def promised_to(config: RunConfig, request: SubmitRequest) -> Held | None:
    """The model that a job of ``--after`` will have left in ``checkpoint.load``; None if it is there, or none is named.
    Raises UserError if another job, or none, is to make it."""
    load = config.checkpoint.load
    if load is None or not is_to_come(load, RUN_FILE):
        return None
    record = read_record(run_of(load))
    job = record.job if record is not None else "unknown"
    if request.after is None or job not in request.after.split(","):
        raise UserError(
            f"checkpoint.load = {load} holds no checkpoint yet, and job {job} is to train it; give --after {job} for a"
            " job that starts when that has made all its steps"
        )
    note(f"checkpoint.load = {load} has no checkpoint before job {job} has made one; its run file says of which model")
    return promised_model(load, RUN_FILE, lambda found: with_reported_tokenizer(found, lambda _: None))


def _check_runs(runs: Sequence[RunConfig], request: SubmitRequest) -> None:
    gpus = request.gpus
    for config in runs:
        processes = request.nodes * gpus or num_processes(config)
        checked = preflight_job(config, gpus, processes, note, promised_to(config, request))
        check_tasks(checked, note)
        check_room(checked, note, len(runs))


def _submit(
    text: str, config: RunConfig, request: SubmitRequest, asked: Mapping[str, Any], environment: Mapping[str, str]
) -> str:
    """The number of the job. Raises UserError."""
    run_dir, frozen = Path(config.run_dir).resolve(), frozen_text(config)
    name = job_name(request, run_dir)
    if refuse_second_job(queued_jobs(environment), run_dir, name, request.behind, environment):
        there = run_dir / RUN_FILE
        if there.is_file() and there.read_text(encoding="utf-8") != frozen:
            raise UserError(
                f"--behind: the job before it reads {there}, and this run file with its overrides differs from that;"
                f" submit {there} itself, or wait for that job's end"
            )
    path = write_batch_file(text, run_dir)
    try:
        freeze(run_dir, frozen, asked)
    except OSError as error:
        raise UserError(f"run_dir = {run_dir} cannot be written ({error.strerror}); give a shared folder") from None
    job = submit(path, environment, request.dependency)
    note_job(run_dir, job)
    with contextlib.suppress(OSError):  # the job is in the queue, whether or not `status` can find it
        JobRecord(job, folders=sweep_folders(request)).write(run_dir)
    return job


def for_batch_log(config: RunConfig) -> RunConfig:
    """The configuration with a line of a step in a job's log every ``LOG_S`` seconds, if the run file says nothing."""
    if "line_interval_s" in config.log.model_fields_set:
        return config
    return config.model_copy(update={"log": config.log.model_copy(update={"line_interval_s": LOG_S})})
