"""What ``llm-parallel plan`` is asked; each field's docstring is the help of its option."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_parallel.errors import UserError
from llm_parallel.options import argument, not_an_option, option

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
DEFAULT_GPUS, DEFAULT_BATCH, DEFAULT_SEQ, DEFAULT_PRECISION = 8, 1024, 4096, "bf16"


@dataclass(frozen=True)
class PlanRequest:
    """What to plan: a model on a cluster; or what to do instead (validate, refit, calibrate)."""

    model: str | None = None
    """Model preset, as llama2-70b, a folder or config.json of Hugging Face, or a run file."""
    cluster: str | None = None
    """dgx-a100, dgx-h100 (the default), dgx-b200, l40s …, or a YAML file like theirs."""
    gpus: int | None = None
    """GPUs to use; the run file's number of processes, or 8."""
    global_batch: int | None = None
    """Samples of a step; the run file's, or 1024."""
    seq: int | None = option(None, read=read_length)
    """Tokens of a sample, as 8192 or 8k; the run file's, or 4096."""
    top: int = 5
    """Layouts to show."""
    precision: str | None = None
    """bf16, or fp8 for a what-if; the run file's, or bf16."""
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
    """Train adapters of this kind on frozen weights, as rank=16,base=nf4; the run file's."""
    document_tokens: int | None = option(None, read=read_length)
    """Mean tokens of a conversation or document, where they do not see each other in a sample, or each has one."""
    software: str = "ours"
    """ours, nvidia (Megatron-Core with Transformer Engine), fsdp (PyTorch's FSDP2) or zero-2 (DeepSpeed)."""
    network: str | None = None
    """Network between nodes instead of the cluster's: ib-400, efa-400, roce-100 …"""
    run: str | None = argument(None)
    """Run file of pretrain or sft: its model, batch, lengths, precision and adapters are planned, and its layout."""
    config: Any = not_an_option(default=None)  # noqa: RUF009
    """The run file's configuration, which is read from ``run``."""

    @property
    def cluster_name(self) -> str:
        """The cluster to plan for."""
        return self.cluster or DEFAULT_CLUSTER


@dataclass(frozen=True)
class Question(PlanRequest):
    """A request whose sizes are all known."""

    gpus: int = DEFAULT_GPUS
    """GPUs to use."""
    global_batch: int = DEFAULT_BATCH
    """Samples of a step."""
    seq: int = DEFAULT_SEQ
    """Tokens of a sample."""
    precision: str = DEFAULT_PRECISION
    """Number format."""
