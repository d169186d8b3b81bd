"""What ``llm-parallel submit`` is asked; each field's docstring is the help of its option."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llm_parallel.errors import UserError
from llm_parallel.options import option


@dataclass(frozen=True)
class SubmitRequest:
    """What SLURM is asked for. A field that is None was not given, and may stand in a file of site defaults."""

    nodes: int
    """Nodes that work."""
    gpus_per_node: int | None = None
    """GPUs of a node, 8 if not given; 0 where there are none."""
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
    constraint: str | None = None
    """Features that the nodes must have, as h100&nvlink."""
    reservation: str | None = None
    """SLURM reservation."""
    name: str | None = None
    """Name of the job, which no other run may have; that of the run folder and a code for its path if not given."""
    gpu_type: str | None = None
    """Type of the GPUs, as h100, where a partition has several."""
    gres: str | None = None
    """How GPUs are asked for instead of --gpus-per-node, as gpu:h100:8; none where whole nodes are given anyway."""
    shared: bool | None = None
    """Take parts of nodes, which other jobs may use too: give --gpus-per-node, --cpus and --mem."""
    cpus: int | None = None
    """CPUs of each node, with --shared."""
    mem: str | None = None
    """Memory of each node, as 200G; all of it if not given."""
    segment: int | None = None
    """Nodes that lie in one block of the network, for SLURM's topology/block."""
    switches: str | None = None
    """Most network switches that the nodes may lie under, with the longest wait for them, as 1@12:00:00."""
    setup: Sequence[str] = option(())
    """Line of bash in the batch file before the run, as --setup="module load cuda"; may be given often."""
    warning_s: int | None = None
    """Seconds before the time limit at which the run saves; 180 if not given."""
    options: Sequence[str] = option((), name="--sbatch")
    """Further option of sbatch; may be given often."""
    template: str | None = None
    """Batch file of your own with {options} and {command}."""
    array: str | None = None
    """One run for each value of a field, as optim.lr=1e-4,3e-4."""
    throttle: int | None = None
    """Most runs of an array at a time."""
    behind: bool = option(False, flag=True)
    """Submit though a job of this run folder waits or runs; this one starts when that has ended."""
    after: str | None = None
    """Start when these jobs are COMPLETED, as 12 or 12,14; one of them may make the model to begin with."""
    site: str | None = None
    """File of site defaults instead of ~/.config/llm-parallel/slurm.yaml and ./slurm.yaml; /dev/null has none."""

    @property
    def gpus(self) -> int:
        """GPUs of a node."""
        return 8 if self.gpus_per_node is None else self.gpus_per_node

    @property
    def warning(self) -> int:
        """Seconds before the time limit at which the run saves."""
        return 180 if self.warning_s is None else self.warning_s

    @property
    def dependency(self) -> list[str]:
        """Options of sbatch for ``after``. They stand in no batch file, which may be submitted again when SLURM has
        forgotten those jobs."""
        if self.after is None:
            return []
        waits = f"--dependency=afterok:{self.after.replace(',', ':')},singleton"
        return [waits, "--kill-on-invalid-dep=yes"]

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
