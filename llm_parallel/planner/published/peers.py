"""Compares our predictions with those of others: Calculon's step times and memory, and Megatron-LM's memory formula.

data/peer_figures.csv holds the output of Calculon (Isaev et al., SC'23; calculon-ai/calculon at caa4b11f8, with its own
descriptions of an A100 and an H100), which we ran, and the figures of Korthikanti et al. 2022 (arXiv 2205.05198) that
Calculon is validated on: figure 1 (GiB of the first stage's states and activations) and figure 7 (activations of a
layer in percent of those under tensor parallelism alone)."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from llm_parallel.planner.memory import ALLOWANCE, GIB, Memory, layer_activations, memory, memory_of_stage
from llm_parallel.planner.published.rows import DATA, Row
from llm_parallel.planner.shapes import Shape, Strategy


@dataclass(frozen=True)
class Figure:
    """One figure that Korthikanti et al. published, with Calculon's and our prediction of it."""

    table: str
    """Figure of the paper."""
    model: str
    """Name of the model."""
    mode: str
    """What of sequence parallelism and recomputation is on."""
    quantity: str
    """What it counts, with its unit at the end."""
    published: float
    """As printed in the paper."""
    calculon: float
    """As Calculon predicts it."""
    ours: float
    """As we predict it."""


def _records() -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((DATA / "peer_figures.csv").read_text(encoding="utf-8"))))


def calculon_steps() -> dict[int, float]:
    """Seconds of a step that Calculon predicts, by row of published_throughput.csv. It supports only GPTs, and tensor
    parallelism only within a node."""
    return {int(record["row"]): float(record["calculon"]) for record in _records() if record["table"] == "step"}


def figures() -> list[Figure]:
    """Korthikanti's figures 1 and 7."""
    return [
        Figure(
            record["table"], record["model"], record["mode"], record["quantity"],
            float(record["published"]), float(record["calculon"]), _ours(record),
        )
        for record in _records()
        if record["table"] != "step"
    ]  # fmt: skip


def _ours(record: Mapping[str, str]) -> float:
    hidden, heads, pp = int(record["hidden"]), int(record["heads"]), int(record["pp"])
    # The paper counts layers only, without the embedding.
    shape = Shape(int(record["layers"]), hidden, heads, heads, 4 * hidden, 0, gated=False, dropout=True, rotary=False)
    mode = record["mode"]
    strategy = Strategy(
        gpus=8 * pp, global_batch=8 * pp * int(record["micro_batch"]), micro_batch=int(record["micro_batch"]),
        seq=2048, tp=8, pp=pp, vpp=int(record["vpp"]), zero=0, precision="fp16", flash=False,
        sequence_parallel=mode.startswith("seq"),
        recompute="full" if mode == "full" else "selective" if mode.endswith("sel") else "none",
    )  # fmt: skip
    if record["quantity"] == "activations_pct":
        alone = replace(strategy, sequence_parallel=False, recompute="none")
        return 100.0 * layer_activations(shape, strategy) / layer_activations(shape, alone)
    found = memory_of_stage(shape, strategy, 0)
    if record["quantity"] == "activations_gib":
        return found.activations / GIB
    return (found.weights + found.gradients + found.optimizer) / GIB


def memory_of_row(row: Row) -> Memory:
    """Memory of the GPU whose peak the row's source prints."""
    return memory_of_stage(row.shape, row.strategy, 0) if row.memory_of_first else memory(row.shape, row.strategy)


def printed_bytes(row: Row) -> float:
    """The peak memory that the row's source would print: that of the tensors, or what the allocator reserves for
    them."""
    return memory_of_row(row).total * (ALLOWANCE if row.memory_of == "reserved" else 1.0)


def megatron_memory(shape: Shape, strategy: Strategy) -> float:
    """Bytes of the fullest GPU by the formula of Megatron-LM's theoretical_memory_usage.py.

    States take 18 bytes for a parameter of the first stage, or 6 + 12 / DP with the distributed optimizer. Activations
    of a layer take s b h (18 + 4 ffn / h) / TP under sequence parallelism and selective recomputation; an interleaved
    schedule multiplies them by 1 + (p - 1) / (p v), a plain one holds those of min(p, micro batches). Inputs count too,
    and logits without a pipeline. The formula covers neither FSDP, context parallelism, SwiGLU's activations nor full
    recomputation."""
    first = shape.layers / strategy.pp * shape.layer_parameters + shape.vocab * shape.hidden
    if strategy.pp == 1 and not shape.tied:
        first += shape.vocab * shape.hidden
    each = 6.0 + 12.0 / strategy.dp if strategy.zero else 18.0
    base = strategy.seq * strategy.micro_batch * shape.hidden
    held = base * (18.0 + 4.0 * shape.ffn / shape.hidden) * shape.layers
    held += (
        8.0 * strategy.seq * strategy.micro_batch + base
    ) * strategy.pp  # token ids, and the dropout after the embedding
    interleaved = 1.0 + (strategy.pp - 1) / (strategy.pp * strategy.vpp)
    held *= interleaved if strategy.vpp > 1 else min(strategy.pp, strategy.micro_batches) / strategy.pp
    if strategy.pp == 1:
        held += 4.0 * base * (1.0 + shape.vocab / shape.hidden)
    return each * first / strategy.tp + held / strategy.tp


def say_peers(rows: Sequence[tuple[Row, float, bool]], say: Callable[[str], None]) -> None:
    """Prints the comparison for rows of (row, predicted seconds, whether constants were fitted to it): step times with
    Calculon on rows that no constant was fitted to, memory with Megatron-LM's formula and Calculon."""
    theirs = calculon_steps()
    say("\n| step time, rows held out | rows | ours: mean error, bias | Calculon: mean error, bias |\n|" + " --- |" * 4)
    by_source: dict[str, list[tuple[float, float]]] = {}
    for row, predicted_s, fitted in rows:
        if row.number in theirs and not fitted:
            errors = predicted_s / row.step_s - 1.0, theirs[row.number] / row.step_s - 1.0
            by_source.setdefault(f"{row.source} {row.chip}", []).append(errors)
    for source, pairs in by_source.items():
        cells = [f"{_mean([pair[of] for pair in pairs])}" for of in (0, 1)]
        say(f"| {source} | {len(pairs)} | {cells[0]} | {cells[1]} |")
    head = "Korthikanti et al. 2022 (computed there, not measured)"
    say(f"\n| {head} | figures | ours: mean error, bias | Calculon: mean error, bias |\n|" + " --- |" * 4)
    for quantity in ("states_gib", "activations_gib", "activations_pct"):
        some = [figure for figure in figures() if figure.quantity == quantity]
        ours = _mean([figure.ours / figure.published - 1.0 for figure in some])
        calculon = _mean([figure.calculon / figure.published - 1.0 for figure in some])
        say(f"| {some[0].table}, {quantity} | {len(some)} | {ours} | {calculon} |")
    # The formula does not cover FSDP.
    printed = [row for row, _, _ in rows if row.memory_gib and row.strategy.zero != 3]
    if printed:
        say("\n| printed peak memory | rows | ours: mean error, bias | Megatron-LM's formula |\n|" + " --- |" * 4)
        ours = _mean([printed_bytes(row) / GIB / (row.memory_gib or 1.0) - 1.0 for row in printed])
        formula = [megatron_memory(row.shape, row.strategy) / GIB / (row.memory_gib or 1.0) - 1.0 for row in printed]
        say(f"| {printed[0].source} | {len(printed)} | {ours} | {_mean(formula)} |")


def _mean(errors: Sequence[float]) -> str:
    return f"{statistics.fmean(abs(error) for error in errors):.1%}, {statistics.fmean(errors):+.1%}"
