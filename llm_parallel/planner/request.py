"""What ``llm-parallel plan`` is asked; each field's docstring is the help of its option."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llm_parallel.errors import UserError
from llm_parallel.options import option

THOUSANDS = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
"""Letters behind a number of tokens of a run."""
BINARY = {"k": 1 << 10, "m": 1 << 20}
"""Letters behind a sequence length, which are powers of two: 8k is 8,192 tokens."""


def read_amount(text: str) -> float:
    """A number of tokens, as 2e12, 100B or 1.4T. Raises UserError."""
    number, factor = _split(text, THOUSANDS)
    if number is None:
        raise UserError(f"{text!r} is no number of tokens; give as 2e12, 100B or 1.4T")
    return number * factor


def read_length(text: str) -> int:
    """A sequence length, as 8192 or 8k. Raises UserError."""
    number, factor = _split(text, BINARY)
    if number is None or number * factor != int(number * factor):
        raise UserError(f"{text!r} is no sequence length; give a whole number, as 8192 or 8k (which is 8,192)")
    return int(number * factor)


def _split(text: str, letters: Mapping[str, float]) -> tuple[float | None, float]:
    plain = text.strip().replace(",", "").replace("_", "").lower()
    factor = letters.get(plain[-1:], 1)
    try:
        number = float(plain[:-1] if plain[-1:] in letters else plain)
    except ValueError:
        return None, factor
    return (number if math.isfinite(number) else None), factor


DEFAULT_CLUSTER = "dgx-h100"
DEFAULT_GPUS = 8


@dataclass(frozen=True)
class PlanRequest:
    """What to plan: a model on a cluster; or what to do instead (validate, refit, calibrate)."""

    model: str | None = None
    """Model preset, as llama2-70b, a folder or config.json of Hugging Face, or a run file."""
    cluster: str | None = None
    """dgx-a100, dgx-h100 (the default), dgx-b200, l40s …, or a YAML file like theirs."""
    gpus: int = DEFAULT_GPUS
    """GPUs to use."""
    global_batch: int = 1024
    """Samples of a step."""
    seq: int = option(4096, read=read_length)
    """Tokens of a sample, as 8192 or 8k."""
    top: int = 5
    """Layouts to show."""
    precision: str = "bf16"
    """bf16, or fp8 for a what-if."""
    tokens: float | None = option(None, read=read_amount)
    """Tokens of the whole run, as 2e12 or 100B, for days, GPU-hours and cost."""
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
    network: str | None = None
    """Network between nodes instead of the cluster's: ib-400, efa-400, roce-100 …"""

    @property
    def cluster_name(self) -> str:
        """The cluster to plan for."""
        return self.cluster or DEFAULT_CLUSTER
