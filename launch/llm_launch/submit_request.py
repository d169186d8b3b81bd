"""What ``llm-parallel submit`` is asked; each field's docstring is the help of its option."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llm_parallel.errors import UserError
from llm_parallel.options import option


@dataclass(frozen=True)
class SubmitRequest:
    """What SLURM is asked for."""

    nodes: int
    """Nodes that work."""
    gpus_per_node: int = 8
    """GPUs of a node; 0 where there are none."""
    spares: int = 0
    """Nodes on top of --nodes that wait to replace a failed one."""
    min_nodes: int | None = None
    """Fewest nodes to start with; --nodes if not given."""
    time: str | None = None
    """Time limit, as 3-00:00:00."""
    partition: str | None = None
    """SLURM partition."""
    account: str | None = None
    """SLURM account."""
    qos: str | None = None
    """SLURM quality of service."""
    name: str | None = None
    """Name of the job; that of the run folder if not given."""
    warning_s: int = 180
    """Seconds before the time limit at which the run saves."""
    options: Sequence[str] = option((), name="--sbatch")
    """Further option of sbatch; may be given often."""
    template: str | None = None
    """Batch file of your own with {options} and {command}."""
    array: str | None = None
    """One run for each value of a field, as optim.lr=1e-4,3e-4."""

    @property
    def sweep(self) -> list[str]:
        """The override of each run of ``array``; empty if there is one run.

        Raises UserError for what is no field with values."""
        if self.array is None:
            return []
        field, equals, values = self.array.partition("=")
        if not (equals and field and all(values.split(","))):
            raise UserError(f"--array {self.array!r} is no field with values; write it as optim.lr=1e-4,3e-4")
        if field == "run_dir":
            raise UserError("--array run_dir gives nothing to compare; every run of an array has its own folder anyway")
        return [f"{field}={value}" for value in values.split(",")]
