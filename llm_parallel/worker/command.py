"""``llm-parallel pretrain`` and ``sft``: checks, shows what will run, and starts the processes or is one of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from llm_launch.lease import Lease
from llm_launch.local import launch_local
from llm_launch.worker import WorkerEnv, worker_environment
from llm_parallel.config.load import dump_config, load_config
from llm_parallel.config.rules import num_processes
from llm_parallel.config.tree import RunConfig
from llm_parallel.errors import EXIT_STOPPED, UserError
from llm_parallel.files import atomic_write
from llm_parallel.metrics.plots import plot_run
from llm_parallel.parallel.layout import Layout
from llm_parallel.planner.memory import CONTEXT_BYTES, memory
from llm_parallel.planner.shapes import shape_of, strategy_of
from llm_parallel.train.preflight import mixture, preflight, rank_table
from llm_parallel.train.room import check_room, checkpoint_bytes, checkpoints_at_once, existing_part, free_bytes
from llm_parallel.worker.chat_table import show_conversations

CONFIG_NAME = "config.yaml"
Kind = Literal["pretrain", "sft"]


def train_command(kind: Kind, run_file: str, overrides: Sequence[str], dry_run: bool = False) -> int:
    """Exit status of a run of method ``kind``. Under torchrun or srun this process is one of the run's; else it starts
    them all here."""
    environment = worker_environment()
    world_size = environment.world_size if environment else None
    first = environment is None or environment.rank == 0
    config = load_config(run_file, overrides, notice=_notice if first else _silent)
    config = preflight(of_kind(config, kind), world_size, _notice if first else _silent)
    if dry_run:
        show_plan(config, world_size)
        return 0
    if first:
        check_room(config, _notice)
    with Lease(Path(config.run_dir)) if first else nullcontext():
        return _train(config, environment)


def of_kind(config: RunConfig, kind: Kind) -> RunConfig:
    """The configuration with ``method.kind`` as the command says. Raises UserError if the run file says otherwise."""
    if config.method.kind not in (None, kind):
        raise UserError(
            f"method.kind = {config.method.kind}, and this is `llm-parallel {kind}`; use `llm-parallel "
            f"{config.method.kind}`, or leave method.kind out"
        )
    if kind == "pretrain" and config.trains == "sft":
        raise UserError(
            "data.train is empty, and chat.train names conversations; use `llm-parallel sft`, or give data.train the "
            "prefix of a .bin/.idx pair that `llm-parallel prepare` wrote"
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
        for picture in plot_run(Path(config.run_dir)):
            print(f"plot: {picture}")
    return status


def save_config(config: RunConfig, path: Path) -> None:
    """Writes the merged configuration into the run folder. Raises UserError if that cannot be written."""
    try:
        with atomic_write(path) as handle:
            handle.write(dump_config(config))
    except OSError as error:
        raise UserError(
            f"run_dir = {config.run_dir} cannot be written ({error.strerror}); give a folder that can be"
        ) from None


def show_mixture(config: RunConfig) -> None:
    """Prints tokens and epochs of each source before anything starts."""
    if config.trains == "sft":
        show_conversations(config)
        return
    table = Table(title="Training mixture", title_justify="left")
    for name in ("source", "weight", "tokens held", "tokens used", "epochs"):
        table.add_column(name, justify="left" if name == "source" else "right")
    for row in mixture(config):
        table.add_row(
            row.path, f"{row.weight:.4f}", f"{row.tokens_available:,}", f"{row.tokens_used:,}", f"{row.epochs:.2f}"
        )
    Console().print(table)


def show_plan(config: RunConfig, world_size: int | None) -> None:
    """What a dry run prints: configuration, ranks, mixture, memory and disk."""
    layout = Layout.from_config(config, world_size or num_processes(config))
    print(dump_config(config))
    print(layout.describe())
    print("\n".join(rank_table(layout)))
    show_mixture(config)
    found = memory(shape_of(config.model), strategy_of(config, layout.world_size))
    named = ", ".join(f"{name} {_size(size)}" for name, size in found.by_kind().items())
    print(
        f"predicted memory of the fullest process: {_size(found.total)} of tensors ({named}), and about "
        f"{_size(CONTEXT_BYTES)} of context on a GPU"
    )
    print(
        f"checkpoints: {_size(checkpoint_bytes(config))} each, at most {checkpoints_at_once(config)} at a time; "
        f"{_size(free_bytes(existing_part(Path(config.run_dir))))} are free for run_dir = {config.run_dir}"
    )


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def _notice(text: str) -> None:
    print(text, file=sys.stderr)


def _silent(_: str) -> None:
    pass
