"""Finds the fastest layouts of a model on a cluster among all legal ones."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llm_parallel.planner import adapters
from llm_parallel.planner.hardware import Cluster
from llm_parallel.planner.memory import ALLOWANCE, CONTEXT_BYTES, Memory, memory, spread
from llm_parallel.planner.shapes import RECOMPUTES, Recompute, Shape, Strategy
from llm_parallel.planner.step_parts import StepTime
from llm_parallel.planner.steptime import Model

MICRO_BATCHES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Candidate:
    """A layout, and the time and memory that it takes."""

    strategy: Strategy
    """The layout."""
    time: StepTime
    """Seconds of a step by cause."""
    memory: Memory
    """Memory of the fullest GPU."""

    @property
    def bubble(self) -> float:
        """Share of the step in which the pipeline waits."""
        return self.time.bubble / self.time.total

    def tokens_per_s(self) -> float:
        """Tokens per second and GPU."""
        strategy = self.strategy
        return strategy.global_batch * strategy.seq / self.time.total / strategy.gpus

    def mfu(self, shape: Shape, cluster: Cluster, causal: bool) -> float:
        """Model FLOPs over the 16-bit peak (8-bit if the layers run in 8 bits); ``causal`` counts half of attention."""
        flops = shape.flops_per_token(self.strategy.seq, causal)
        if self.strategy.adapter is not None:
            flops = adapters.flops_per_token(shape, flops, self.strategy.adapter)
        flops *= self.tokens_per_s()
        fp8 = self.strategy.precision == "fp8"
        return flops / (cluster.chip.peak_fp8_flops if fp8 else cluster.chip.peak_flops)


def fits(found: Memory, cluster: Cluster) -> bool:
    """Whether it fits into the chip's memory together with CUDA context and fragmentation."""
    return found.total * ALLOWANCE + CONTEXT_BYTES <= cluster.chip.memory_bytes


def _powers(most: int) -> Iterator[int]:
    size = 1
    while size <= most:
        yield size
        size *= 2


def _divisors(number: int, most: int) -> list[int]:
    return [size for size in range(1, min(number, most) + 1) if number % size == 0]


def layouts(
    shape: Shape, base: Strategy, cluster: Cluster, recomputes: Sequence[Recompute] = RECOMPUTES["ours"]
) -> Iterator[Strategy]:
    """Every legal layout of ``base``'s GPUs, batch and sequence, with each of ``recomputes``.

    TP divides the heads, divides the groups or is a multiple of them, and stays within a node. PP need not divide the
    layers; with VPP the chunks are even, or lack one or two layers in all, as Llama 3 405B's 126 layers do. CP is a
    power of two and divides the sequence into 2 CP pieces. The batch divides into whole micro batches.
    """
    gpus = base.gpus
    for tp in _divisors(shape.heads, cluster.gpus_per_node):
        if gpus % tp or (shape.groups % tp and tp % shape.groups):
            continue
        for cp in _powers(16):
            if gpus % (tp * cp) or base.seq % (2 * cp * tp):
                continue
            for pp in _divisors(gpus // (tp * cp), min(shape.layers, 64)):
                dp = gpus // (tp * cp * pp)
                if base.global_batch % dp or (pp > 1 and base.zero == 2):  # DeepSpeed's pipelines have no stage 2
                    continue
                for micro in MICRO_BATCHES:
                    if base.global_batch // dp % micro:
                        continue
                    for ep in _expert_sizes(shape, dp * cp):
                        yield from _variants(shape, replace(
                            base, tp=tp, cp=cp, pp=pp, ep=ep, micro_batch=micro, sequence_parallel=tp > 1
                        ), recomputes)  # fmt: skip


def _expert_sizes(shape: Shape, replicas: int) -> list[int]:
    """Legal expert-parallel sizes: they divide the experts, and the ranks that hold different samples."""
    if shape.experts is None:
        return [1]
    return [size for size in _divisors(shape.experts.count, replicas) if replicas % size == 0]


def _variants(shape: Shape, strategy: Strategy, recomputes: Sequence[Recompute]) -> Iterator[Strategy]:
    """The layout with each legal number of model chunks and each recomputation."""
    pp = strategy.pp
    chunks = [1]
    if pp > 1 and strategy.micro_batches % pp == 0:
        chunks += [v for v in range(2, min(shape.layers // pp, 16) + 1) if is_even_enough(shape.layers, pp * v)]
    for vpp in chunks:
        for recompute in recomputes:
            # Megatron-Core overlaps pipeline sends with compute only in the interleaved schedule.
            yield replace(strategy, vpp=vpp, recompute=recompute, overlap_pp=vpp > 1)


def is_even_enough(layers: int, chunks: int) -> bool:
    """Whether that many chunks are even, or lack at most two layers in all."""
    return layers % chunks == 0 or chunks - layers % chunks <= 2


def evaluate(shape: Shape, strategy: Strategy, cluster: Cluster) -> Candidate:
    """Time and memory of one layout."""
    return Candidate(strategy, Model(shape, strategy, cluster).step(), memory(shape, strategy))


def best_layouts(
    shape: Shape, base: Strategy, cluster: Cluster, top: int, recomputes: Sequence[Recompute] = RECOMPUTES["ours"]
) -> tuple[list[Candidate], int, int]:
    """The ``top`` fastest layouts that fit, the number of legal layouts, and the number that fit."""
    looked = fitting = 0
    found: list[tuple[float, int, Candidate]] = []
    for strategy in layouts(shape, base, cluster, recomputes):
        looked += 1
        needed = memory(shape, strategy)
        if not fits(needed, cluster):
            continue
        fitting += 1
        # Where the layout fits without recomputation it is faster, so this one need not be timed.
        if strategy.recompute != "none" and fits(memory(shape, replace(strategy, recompute="none")), cluster):
            continue
        time = Model(shape, strategy, cluster).step()
        item = (-time.total, looked, Candidate(strategy, time, needed))
        if len(found) < top:
            heapq.heappush(found, item)
        else:
            heapq.heappushpop(found, item)
    return [item[2] for item in sorted(found, key=lambda item: -item[0])], looked, fitting


def as_run_fields(shape: Shape, s: Strategy) -> dict[str, dict[str, Any]]:
    """Sections ``parallel`` and ``train`` of a run file with this layout, and ``adapter`` if it trains adapters."""
    parallel: dict[str, Any] = {"dp": s.dp, "tp": s.tp, "pp": s.pp, "cp": s.cp, "vpp": s.vpp, "recompute": s.recompute}
    layers = spread(shape.layers, s.pp * s.vpp)
    if len(set(layers)) > 1 and min(layers):
        parallel["stage_layers"] = list(layers)
    train = {"global_batch_size": s.global_batch, "micro_batch_size": s.micro_batch,
             "precision": s.precision if s.precision in ("fp32", "fp16") else "bf16"}  # fmt: skip
    adapter = (
        {}
        if s.adapter is None
        else {"adapter": s.adapter.model_dump(mode="json", exclude_defaults=True) or {"rank": s.adapter.rank}}
    )
    return {"parallel": parallel, "train": train, **adapter}
