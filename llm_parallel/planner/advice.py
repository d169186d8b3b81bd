"""What would fit where nothing does: the nearest change of a plan under which a layout fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from llm_parallel.config.tree_tune import AdapterConfig
from llm_parallel.planner.hardware import Cluster
from llm_parallel.planner.memory import ALLOWANCE, CONTEXT_BYTES, GIB, memory
from llm_parallel.planner.search import fits, layouts
from llm_parallel.planner.shapes import Shape, Strategy

MOST_GPUS = 1 << 17
TIGHT = 0.88
"""Share of the memory from which on published runs are slower than predicted: 13 of the 19 such rows of the table were,
since the allocator has to give memory back and take it again."""


def is_tight(found_bytes: float, cluster: Cluster) -> bool:
    """Whether a layout takes so much of the memory that it may run slower than predicted."""
    return found_bytes * ALLOWANCE + CONTEXT_BYTES >= TIGHT * cluster.chip.memory_bytes


def would_fit(shape: Shape, base: Strategy, cluster: Cluster) -> list[str]:
    """Sentences that name changes under which a layout fits, each tried by itself: more GPUs, shorter samples, adapters
    in place of all weights. The first says how far the nearest layout is from fitting."""
    nearest = min(
        (memory(shape, layout).total * ALLOWANCE + CONTEXT_BYTES for layout in layouts(shape, base, cluster)),
        default=None,
    )
    found = []
    if nearest is not None:
        found.append(
            f"The layout that takes least needs {nearest / GIB:.0f} GiB of {cluster.chip.memory_bytes / GIB:.0f} GiB a "
            "GPU, with CUDA context and 4 % for the allocator."
        )
    gpus = next((number for number in _more_gpus(base, cluster) if _fits(shape, _with(base, number), cluster)), None)
    if gpus is not None:
        batch = _with(base, gpus).global_batch
        found.append(
            f"It fits on {gpus} GPUs" + (f" with --global-batch {batch}." if batch != base.global_batch else ".")
        )
    seq = base.seq // 2
    while seq >= 128 and not _fits(shape, replace(base, seq=seq), cluster):
        seq //= 2
    if seq >= 128:
        found.append(f"It fits with --seq {seq}.")
    for kind in ("full", "nf4"):
        adapter = AdapterConfig(rank=16, base=kind)
        if base.adapter is None and _fits(shape, replace(base, adapter=adapter), cluster):
            found.append(f"Adapters in place of all weights fit: --adapter rank=16,base={kind}.")
            break
    return found


def _fits(shape: Shape, base: Strategy, cluster: Cluster) -> bool:
    return any(fits(memory(shape, layout), cluster) for layout in layouts(shape, base, cluster))


def _more_gpus(base: Strategy, cluster: Cluster) -> Iterator[int]:
    """Numbers of GPUs over ``base``'s: whole nodes, doubled."""
    node = cluster.gpus_per_node
    number = base.gpus * 2 if base.gpus < node else max(node, base.gpus // node * node * 2)
    while number <= MOST_GPUS:
        yield number
        number *= 2


def _with(base: Strategy, gpus: int) -> Strategy:
    """The plan on more GPUs, with a batch that has a sample for each if the old one has fewer."""
    return replace(base, gpus=gpus, global_batch=max(base.global_batch, gpus))
