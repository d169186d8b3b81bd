"""What ``llm-parallel pretrain``, ``sft`` and ``prefer`` do: check, show what will run, and start its processes."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from shlex import quote
from typing import Literal

from llm_launch.job_record import forget
from llm_launch.lease import Lease
from llm_launch.local import launch_local
from llm_launch.worker import WorkerEnv, worker_environment
from llm_parallel.checkpoint.folders import latest_checkpoint, step_of
from llm_parallel.config.load import dump_config, load_with_origins
from llm_parallel.config.rules import num_processes
from llm_parallel.config.schema import SCHEMA_LINE, write_schema
from llm_parallel.config.tree import RunConfig
from llm_parallel.config.tree_online import ONLINE
from llm_parallel.config.tree_tune import PREFERENCES
from llm_parallel.errors import EXIT_STOPPED, EXIT_USER_ERROR, UserError
from llm_parallel.evaluate.in_run_file import check_tasks
from llm_parallel.files import atomic_write
from llm_parallel.lines import Unheard, note, say
from llm_parallel.metrics.history import scored_steps
from llm_parallel.screen import say_next
from llm_parallel.train.inherit import with_own_tokenizer
from llm_parallel.train.preflight import preflight
from llm_parallel.train.room import check_room
from llm_parallel.worker.show import show_mixture, show_plan

CONFIG_NAME = "config.yaml"
Kind = Literal["pretrain", "sft", "prefer"]


def train_command(
    kind: Kind,
    run_file: str,
    overrides: Sequence[str],
    dry_run: bool = False,
    everything: bool = False,
    suggest: Callable[[str], None] = say_next,
) -> int:
    """Exit status of a run of method ``kind``. Under torchrun or srun this process is one of the run's; else it starts
    them all here. ``everything``: a dry run shows the whole
    configuration. ``suggest`` is called at the end with the command to try next."""
    environment = worker_environment()
    world_size = environment.world_size if environment else None
    first = environment is None or environment.rank == 0
    config, origins = load_with_origins(run_file, overrides, _notice if first else _silent)
    config = preflight(of_kind(config, kind), world_size, _notice if first else _silent)
    if first:
        check_tasks(config, _notice)
    config = config if dry_run else with_own_tokenizer(config, _notice if first else _silent)
    again = shlex.join(["llm-parallel", kind, run_file, *overrides])
    if dry_run:
        if first:
            show_plan(config, world_size, origins, everything)
            suggest(again)
        return 0
    if environment is None and is_finished(config):
        suggest(after_run(config, 0, again))
        return 0
    if first:
        check_room(config, _notice)
    with Unheard():
        with Lease(Path(config.run_dir)) if first else nullcontext():
            if first:
                forget(Path(config.run_dir))
            status = _train(config, environment)
        if first and status != EXIT_USER_ERROR:
            suggest(after_run(config, status, again))
    return status


def is_finished(config: RunConfig) -> bool:
    """Whether the run has made all its steps; if so, says it."""
    newest = latest_checkpoint(Path(config.run_dir) / "checkpoints")
    step = step_of(newest) if newest is not None else None
    if step is None or step < config.train.steps or lacks_scores(config, step):
        return False
    say(
        f"{config.run_dir} is finished: {newest} holds step {step}, and train.steps is {config.train.steps}; set a "
        "larger train.steps to go on, or another run_dir to begin anew"
    )
    return True


def lacks_scores(config: RunConfig, step: int) -> bool:
    """Whether the scores of ``evaluate.tasks`` after the last step are still to be made."""
    return bool(config.evaluate.tasks) and step not in scored_steps(config.run_dir)


def after_run(config: RunConfig, status: int, again: str) -> str:
    """The command to try after a run that ended with ``status``; ``again`` is the one that started it."""
    run_dir = quote(config.run_dir)
    if status == 0:
        return f'llm-parallel generate {run_dir} {"--chat " if config.reads_chat else ""}--prompt "…"'
    return again if status == EXIT_STOPPED else f"llm-parallel status {run_dir}"


def of_kind(config: RunConfig, kind: Kind) -> RunConfig:
    """The configuration with ``method.kind`` as the command says. Raises UserError if the run file says otherwise."""
    if kind == "prefer":
        if config.method.kind not in (*PREFERENCES, *ONLINE):
            given = "is not given" if config.method.kind is None else f"= {config.method.kind}"
            kinds = ", ".join((*PREFERENCES, *ONLINE))
            raise UserError(f"method.kind {given}, and `llm-parallel prefer` trains by {kinds}; give one of these")
        return config
    if config.method.kind not in (None, kind):
        command = "prefer" if config.method.kind in (*PREFERENCES, *ONLINE) else config.method.kind
        raise UserError(
            f"method.kind = {config.method.kind}, and this is `llm-parallel {kind}`; use `llm-parallel {command}`, or "
            "leave method.kind out"
        )
    if kind == "pretrain" and config.trains == "sft":
        raise UserError(
            "data.train is empty, and chat.train names conversations; use `llm-parallel sft`, or give data.train the "
            "prefix of a .bin/.idx pair that `llm-parallel prepare` wrote: texts become one by `llm-parallel prepare "
            "FILE --out PREFIX --tokenizer FOLDER`"
        )
    return config.model_copy(update={"method": config.method.model_copy(update={"kind": kind})})


def _train(config: RunConfig, environment: WorkerEnv | None) -> int:
    first = environment is None or environment.rank == 0
    saved = Path(config.run_dir) / CONFIG_NAME
    if first:
        save_config(config, saved)
        show_mixture(config)
    if environment is not None:
        from llm_parallel.worker.__main__ import run_worker

        status = run_worker(config)
    else:
        arguments = ["-m", "llm_parallel.worker", str(saved)]
        status = launch_local(num_processes(config), arguments, Path(config.run_dir) / "logs")
    if first and status in (0, EXIT_STOPPED) and config.log.plots:
        draw_plots(Path(config.run_dir))
    return status


def draw_plots(run_dir: Path) -> None:
    """Draws a run's pictures and says where they are. The run has saved: what hinders the pictures is only said."""
    from llm_parallel.metrics.plots import plot_run

    try:
        for picture in plot_run(run_dir):
            say(f"plot: {picture}")
    except (OSError, UserError) as error:
        note(f"the run's pictures could not be drawn: {error}")


def save_config(config: RunConfig, path: Path) -> None:
    """Writes the merged configuration and its JSON schema into the run folder. Raises UserError if that cannot be
    written."""
    try:
        write_schema(path.parent)
        with atomic_write(path) as handle:
            handle.write(SCHEMA_LINE + dump_config(config))
    except OSError as error:
        raise UserError(
            f"run_dir = {config.run_dir} cannot be written ({error.strerror}); give a folder that can be"
        ) from None


def _notice(text: str) -> None:
    note(text)


def _silent(_: str) -> None:
    pass
