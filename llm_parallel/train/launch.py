"""``llm-parallel launch``: ``pretrain`` under the elastic launcher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from llm_launch.launch import launch_elastic, local_nodes
from llm_parallel.config.load import load_config
from llm_parallel.config.rules import num_processes
from llm_parallel.parallel.platform import resolve_device
from llm_parallel.train.command import CONFIG_NAME, save_config, show_mixture
from llm_parallel.train.preflight import preflight


def launch_command(
    run_file: str, overrides: Sequence[str], processes: int | None, nodes: int, environment: Mapping[str, str]
) -> int:
    """Exit status of an elastic run on this machine. ``processes``: devices to use, more than the layout needs are
    spares; ``nodes``: agents that share them."""
    config = preflight(load_config(run_file, overrides, notice=print), None)
    saved = Path(config.run_dir) / CONFIG_NAME
    save_config(config, saved)
    show_mixture(config)
    devices = local_nodes(processes or num_processes(config), nodes)
    kind = resolve_device(config.device)
    status = launch_elastic(config, saved, devices, environment, "cuda" if kind == "cuda" else "cpu")
    if status == 0 and config.log.plots:
        from llm_parallel.metrics.plots import plot_run

        for picture in plot_run(Path(config.run_dir)):
            print(f"plot: {picture}")
    return status
