"""What each ``llm-parallel bench`` command is asked; each field's docstring is the help of its option."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llm_parallel.options import argument, not_an_option, option


@dataclass(frozen=True)
class KernelsRequest:
    """Operators to measure on a GPU, or with ``aot`` to compile without one."""

    operators: Sequence[str] = option((), name="--op")
    """Operator; may be given several times. All if none."""
    shapes: Sequence[str] = option((), name="--shape")
    """Part of a shape's name, for example llama3-8b."""
    dtype: str | None = None
    """bf16, fp16 or fp32; each operator's own if not given."""
    rounds: int = 20
    """Measurements of each provider."""
    out: str | None = None
    """Prefix of result files; with --aot the JSON file."""
    baseline: str | None = None
    """JSON of an earlier run to hold this one against."""
    min_ratio: float = 0.95
    """Least speed relative to the baseline."""
    aot: bool = option(False, flag=True)
    """Compile for A100 and H100, no GPU needed; show the code."""
    archs: Sequence[int] = option((), name="--arch")
    """With --aot: 80 or 90; both if not given."""
    jobs: int = 2
    """With --aot: compiling processes."""
    dump: str | None = None
    """With --aot: folder for SASS, PTX and TTGIR."""
    environment: Mapping[str, str] = not_an_option(default_factory=dict)
    """Of the process that checks the kernels where there is no GPU."""


@dataclass(frozen=True)
class ScalingRequest:
    """A sweep, and which of its runs to make."""

    sweep: str = argument()
    """YAML file with a base run file and series of overrides."""
    environment: Mapping[str, str] = not_an_option(default_factory=dict)
    """Of the runs; it says whether they are started within a SLURM job."""
    out: str | None = None
    """CSV to add to; beside the sweep if not given."""
    index: int | None = None
    """Make only this run, as $SLURM_ARRAY_TASK_ID."""
    dry_run: bool = False
    """Print what would run; run nothing."""
    cluster: str | None = None
    """Cluster or YAML file that the planner predicts with."""
    baseline: str | None = None
    """JSON of an earlier sweep to hold this one against."""
    min_ratio: float = 0.95
    """Least speed relative to the baseline or published figure."""


@dataclass(frozen=True)
class CommRequest:
    """Collectives to measure, and among how many processes."""

    operations: Sequence[str] = option((), name="--ops", commas=True)
    """With commas: all_reduce, all_gather, reduce_scatter, all_to_all …"""
    sizes: str | None = None
    """As 8K,1M or from:to:factor, 8K:1G:4."""
    processes: int | None = None
    """Processes here; one per GPU, or 2, if not given."""
    device: str = "auto"
    """auto, cpu (gloo) or cuda (NCCL)."""
    rounds: int = 11
    """Times that each operation and size is measured."""
    out: str | None = None
    """Prefix of the JSON and CSV files."""
    baseline: str | None = None
    """JSON of an earlier run to hold this one against."""
    min_ratio: float = 0.95
    """Least speed relative to the baseline."""
    command: str = not_an_option(default="llm-parallel bench comm")
    """The command line, for the result."""


@dataclass(frozen=True)
class StepRequest:
    """A model to train a few steps of, and what to measure beside ours."""

    arguments: Sequence[str] = argument(())
    """Run file, and section.field=value overrides."""
    model: str | None = None
    """Model preset, for example llama3-8b."""
    providers: Sequence[str] = option((), commas=True)
    """With commas: ours, transformers …; under data parallelism alone: ours, ddp, fsdp."""
    rounds: int = 5
    """Times that each contender is measured."""
    steps: int = 2
    """Steps of one measurement."""
    processes: int | None = None
    """Processes of a layout; as the section parallel says if not given."""
    trace: str | None = None
    """Folder for Chrome traces of one step of each."""
    out: str | None = None
    """Prefix of the JSON and CSV files."""
    baseline: str | None = None
    """JSON of an earlier run to hold this one against."""
    min_ratio: float = 0.95
    """Least speed relative to the baseline."""
    command: str = not_an_option(default="llm-parallel bench step")
    """The command line, for the result."""
