"""What ``llm-parallel plan`` is asked; each field's docstring is the help of its option."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llm_parallel.options import option

DEFAULT_CLUSTER = "dgx-h100"
DEFAULT_GPUS = 8


@dataclass(frozen=True)
class PlanRequest:
    """What to plan: a model on a cluster; or what to do instead (validate, refit, calibrate)."""

    model: str | None = None
    """Model preset, as llama2-70b."""
    cluster: str | None = None
    """dgx-a100, dgx-h100 (the default), dgx-h200 …, or a YAML file like theirs."""
    gpus: int = DEFAULT_GPUS
    """GPUs to use."""
    global_batch: int = 1024
    """Samples of a step."""
    seq: int = 4096
    """Tokens of a sample."""
    top: int = 5
    """Layouts to show."""
    precision: str = "bf16"
    """bf16, or fp8 for a what-if."""
    tokens: float | None = None
    """Tokens of the whole run, for days, GPU-hours and cost."""
    price_per_gpu_hour: float | None = None
    """Price of a GPU for an hour."""
    explain: str | None = None
    """One layout in detail, as tp=8,pp=4,mbs=1."""
    write: str | None = None
    """Run file to make of the best layout."""
    json: str | None = None
    """Write the layouts, or the validation, as JSON."""
    validate: bool = option(False, flag=True)
    """Score predictions against published rows."""
    all: bool = option(False, flag=True)
    """With --validate: every source, ranking and row, not the summary alone."""
    rows: str | None = None
    """With --validate: CSV of your own rows."""
    refit: str | None = None
    """Fit the constants anew and write them to this JSON file."""
    calibrate: Sequence[str] = ()
    """JSON of bench comm, kernels or step on your cluster; several times."""
    cluster_out: str = "my-cluster.yaml"
    """With --calibrate: description to write."""
    what_if: Sequence[str] = ()
    """A case to compare with: gpus=512, cluster=dgx-h200, seq=131072 …; several times."""
    adapter: str | None = None
    """Train adapters of this kind on frozen weights, as rank=16,base=nf4; it changes memory only."""
    software: str = "ours"
    """ours, or nvidia: Megatron-Core, Transformer Engine."""

    @property
    def cluster_name(self) -> str:
        """The cluster to plan for."""
        return self.cluster or DEFAULT_CLUSTER
