"""The layout matrix as data: what every combination must reproduce is the one-process run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One layout. ``changes`` are section.field → value over the base configuration of ``job.base_config``; rows with
    the same ``reference`` (changes that alter the mathematics, such as tied embeddings) share one reference run."""

    name: str
    processes: int
    changes: dict[str, Any] = field(default_factory=dict)
    reference: str = "plain"


REFERENCES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"model.tie_embeddings": True},
    "isolate": {"data.packing": "isolate"},
    "odd vocabulary": {"model.vocab_size": 101},
    "six layers": {"model.num_layers": 6},
}


def _p(**parallel: Any) -> dict[str, Any]:
    return {f"parallel.{name}": value for name, value in parallel.items()}


MATRIX: tuple[Row, ...] = (
    Row("micro batch 2", 1, {"train.micro_batch_size": 2}),
    Row("plain optimizer", 1, _p(distributed_optimizer=False)),
    Row("full recompute uniform", 1, _p(recompute="full")),
    Row("full recompute block", 1, _p(recompute="full", recompute_method="block", recompute_num_layers=2)),
    Row("selective recompute", 1, _p(recompute="selective", recompute_modules=["core_attn", "mlp"])),
    Row("TP2", 2, _p(tp=2, sequence_parallel=False)),
    Row("TP2 SP", 2, _p(tp=2)),
    Row("TP4 SP, 2 groups", 4, _p(tp=4)),
    Row("PP2", 2, _p(pp=2)),
    Row("PP4", 4, _p(pp=4)),
    Row("PP2 uneven 3+1", 2, _p(pp=2, stage_layers=[3, 1])),
    Row("PP2 VPP2", 2, _p(pp=2, vpp=2)),
    Row("PP2 VPP2 uneven 2+1+1+2", 2, _p(pp=2, vpp=2, stage_layers=[2, 1, 1, 2]), "six layers"),
    Row("DP2", 2, _p(dp=2)),
    Row("DP2 plain optimizer", 2, _p(dp=2, distributed_optimizer=False)),
    Row("DP2 overlap, small buckets", 2, _p(dp=2, overlap=True, bucket_size=3000)),
    Row("DP4 micro batch 2", 4, _p(dp=4) | {"train.micro_batch_size": 2}),
    Row("CP2", 2, _p(cp=2)),
    Row("CP4", 4, _p(cp=4)),
    Row("CP2 DP2", 4, _p(cp=2, dp=2)),
    Row("TP2 SP CP2", 4, _p(tp=2, cp=2)),
    Row("TP2 SP PP2", 4, _p(tp=2, pp=2)),
    Row("TP2 PP2 no SP", 4, _p(tp=2, pp=2, sequence_parallel=False)),
    Row("PP2 CP2", 4, _p(pp=2, cp=2)),
    Row("PP2 DP2 overlap", 4, _p(pp=2, dp=2, overlap=True)),
    Row("PP2 VPP2 DP2 overlap", 4, _p(pp=2, vpp=2, dp=2, overlap=True)),
    Row("TP2 SP PP2 DP2", 8, _p(tp=2, pp=2, dp=2)),
    Row("TP2 SP PP2 CP2", 8, _p(tp=2, pp=2, cp=2)),
    Row("TP2 SP CP2 DP2", 8, _p(tp=2, cp=2, dp=2)),
    Row("TP2 SP PP2 VPP2 DP2 overlap", 8, _p(tp=2, pp=2, vpp=2, dp=2, overlap=True)),
    Row("TP2 SP PP2 full recompute", 4, _p(tp=2, pp=2, recompute="full")),
    Row("tied PP2", 2, _p(pp=2), "tied"),
    Row("tied TP2 SP PP2 DP2", 8, _p(tp=2, pp=2, dp=2), "tied"),
    Row("isolate TP2 SP", 2, _p(tp=2), "isolate"),
    Row("isolate PP2", 2, _p(pp=2), "isolate"),
    Row("isolate CP2", 2, _p(cp=2), "isolate"),
    Row("isolate micro batch 2 DP2", 2, _p(dp=2) | {"train.micro_batch_size": 2}, "isolate"),
    Row("isolate TP2 SP PP2 CP2", 8, _p(tp=2, pp=2, cp=2), "isolate"),
    Row("odd vocabulary TP2 PP2", 4, _p(tp=2, pp=2), "odd vocabulary"),
    Row("odd vocabulary TP4", 4, _p(tp=4), "odd vocabulary"),
)
