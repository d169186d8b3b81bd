"""What ``llm-parallel launch`` is asked; each field's docstring is the help of its option."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LaunchRequest:
    """Where the processes of a run are."""

    processes: int | None = None
    """Devices to use; more than the layout needs are spares. Default: the layout's."""
    nodes: int | None = None
    """Agents among which this machine's devices are dealt. Default: one."""
    gpus_per_node: int | None = None
    """GPUs of each node of a SLURM job, where SLURM gives whole nodes and does not count GPUs."""

    @property
    def here(self) -> bool:
        """Whether the run stays on this machine, in a SLURM job too."""
        return self.processes is not None or self.nodes is not None
