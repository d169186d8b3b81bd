"""Memory of adapters, and of frozen matrices in few bits, on one GPU."""

from __future__ import annotations

from dataclasses import dataclass

from llm_parallel.config.tree_tune import AdapterConfig
from llm_parallel.planner.shapes import Shape, Strategy

BLOCK = 64
"""Numbers that share a scale in NF4."""


@dataclass(frozen=True)
class Linear:
    """One matrix of a layer on one GPU. ``kinds``: projections in it that have adapters; ``divided_rows``: whether
    tensor parallelism divides its rows, else its columns."""

    rows: float
    columns: float
    kinds: int
    divided_rows: bool

    @property
    def numbers(self) -> float:
        """Its size."""
        return self.rows * self.columns


def linears(shape: Shape, tp: int, adapter: AdapterConfig) -> tuple[Linear, ...]:
    """The matrices of a layer on one GPU."""
    targets, width = set(adapter.targets), shape.heads * shape.channels

    def count(*names: str) -> int:
        return len(targets & set(names))

    return (
        Linear((width + 2 * shape.groups * shape.channels) / tp, shape.hidden, count("q", "k", "v"), True),
        Linear(shape.hidden, width / tp, count("o"), False),
        Linear(2 * shape.ffn / tp, shape.hidden, count("gate", "up"), True),
        Linear(shape.hidden, shape.ffn / tp, count("down"), False),
    )


def layer_parameters(shape: Shape, strategy: Strategy, adapter: AdapterConfig) -> float:
    """Numbers of the adapters of one layer: A for each projection, and B for all rows of the matrix."""
    found = [one for one in linears(shape, strategy.tp, adapter) if one.kinds]
    return sum(adapter.rank * (one.kinds * one.columns + one.rows) + adapter.dora * one.rows for one in found)


def factors(shape: Shape, adapter: AdapterConfig) -> list[int]:
    """Numbers of each tensor of the adapters of one layer, whole: A and B of every linear that has one."""
    found = [one for one in linears(shape, 1, adapter) if one.kinds]
    counts = [adapter.rank * int(count) for one in found for count in (one.kinds * one.columns, one.rows)]
    return counts + [int(one.rows) for one in found if adapter.dora]


def vocabulary_parameters(shape: Shape, strategy: Strategy, adapter: AdapterConfig, stage: int) -> float:
    """Numbers of the adapters on the embedding and the output projection that one GPU of a stage holds."""
    here = (stage == 0) * ("embed_tokens" in adapter.targets)
    here += (stage == strategy.pp - 1) * ("lm_head" in adapter.targets)
    return here * adapter.rank * (shape.vocab / strategy.tp + shape.hidden)


def whole_tables(shape: Shape, strategy: Strategy, adapter: AdapterConfig, stage: int) -> int:
    """How many matrices of the vocabulary are trained whole on a stage, beside adapters."""
    here = {"embed_tokens": stage == 0, "lm_head": stage == strategy.pp - 1}
    found = sum(here[name] for name in set(adapter.modules_to_save))
    return min(found, 1) if shape.tied else found


def trained_parameters(shape: Shape, strategy: Strategy, adapter: AdapterConfig, stage: int, layers: int) -> float:
    """Numbers that one GPU of a stage of ``layers`` layers trains: adapters, and matrices that are trained whole."""
    whole = whole_tables(shape, strategy, adapter, stage) * shape.vocab * shape.hidden / strategy.tp
    found = layers * layer_parameters(shape, strategy, adapter) + whole
    return found + vocabulary_parameters(shape, strategy, adapter, stage)


def projections(adapter: AdapterConfig) -> int:
    """Projections of a layer that have adapters."""
    return len(set(adapter.targets) - {"embed_tokens", "lm_head"})


def reads_output_input(adapter: AdapterConfig | None) -> bool:
    """Whether backward reads the input of the output projection."""
    return adapter is None or "lm_head" in (*adapter.targets, *adapter.modules_to_save)


def changes_embedding(adapter: AdapterConfig) -> bool:
    """Whether embeddings have a gradient."""
    return "embed_tokens" in (*adapter.targets, *adapter.modules_to_save)


def mask_bytes(shape: Shape, strategy: Strategy, adapter: AdapterConfig) -> float:
    """Bytes of one layer's masks, which say what part of the first factor a row of a matrix meets."""
    return sum(one.kinds * one.rows for one in linears(shape, strategy.tp, adapter) if one.divided_rows)


def frozen_layer_bytes(shape: Shape, strategy: Strategy, adapter: AdapterConfig) -> float:
    """Bytes of the matrices of one layer, with the scales of their blocks."""
    found = linears(shape, strategy.tp, adapter)
    if adapter.base == "full":
        return (4 if strategy.precision == "fp32" else 2) * sum(one.numbers for one in found)
    if adapter.base == "int8":
        return sum(one.numbers + 4 * one.rows for one in found)
    return sum(one.numbers / 2 + 4 * one.rows * -(-one.columns // BLOCK) for one in found)


def kept_columns(strategy: Strategy, adapter: AdapterConfig) -> float:
    """Columns of the activations of the rank's width that one layer's adapters keep for backward: of all tokens beside
    matrices whose rows are divided, else of those that sequence parallelism leaves."""
    whole = strategy.tp if strategy.sequence_parallel else 1
    targets = set(adapter.targets)
    return adapter.rank * (len(targets & {"q", "k", "v", "gate", "up"}) + len(targets & {"o", "down"}) / whole)


def magnitude_bytes(shape: Shape, strategy: Strategy, adapter: AdapterConfig) -> float:
    """Bytes that DoRA keeps for the backward of one layer: the outputs of adapted matrices before they are multiplied;
    of each row its factor, the norm in fp32, and whether it has an adapter."""
    if not adapter.dora:
        return 0.0
    size = 4 if strategy.precision == "fp32" else 2
    whole = strategy.tp if strategy.sequence_parallel else 1
    found = [one for one in linears(shape, strategy.tp, adapter) if one.kinds]
    outputs = sum(one.rows / (1 if one.divided_rows else whole) for one in found)
    return size * strategy.tokens * outputs + (size + 5) * sum(one.rows for one in found)


def wide_factor_bytes(shape: Shape, strategy: Strategy, adapter: AdapterConfig) -> float:
    """Bytes that one layer keeps for backward whatever the number of tokens: the second factors of several projections
    as one matrix, as wide as all their ranks."""
    size = 4 if strategy.precision == "fp32" else 2
    found = [one for one in linears(shape, strategy.tp, adapter) if one.divided_rows]
    return size * adapter.rank * sum(one.kinds * one.rows for one in found)


def unread_inputs(shape: Shape, strategy: Strategy, adapter: AdapterConfig) -> float:
    """Columns of the inputs of matrices without adapters, which backward of a frozen matrix does not read. Attention
    itself keeps what its projection reads; torch's operators keep that a second time."""
    targets, whole = set(adapter.targets), strategy.tp if strategy.sequence_parallel else 1
    found = shape.hidden / whole * (not targets & {"q", "k", "v"})
    found += shape.hidden / whole * (not targets & {"gate", "up"})
    found += shape.ffn / strategy.tp * ("down" not in targets)
    return found + shape.heads * shape.channels / strategy.tp * (strategy.plain and "o" not in targets)


def dequantized_bytes(shape: Shape, strategy: Strategy, adapter: AdapterConfig) -> float:
    """Bytes that live while the largest matrix is made from its codes: the numbers without and with their scales in
    fp32, and codes as indices."""
    if adapter.base == "full":
        return 0.0
    largest = max(one.numbers for one in linears(shape, strategy.tp, adapter))
    return largest * (8 if adapter.base == "int8" else 10)


DEQUANTIZED_BYTES = {"full": 0.0, "int8": 19.0, "nf4": 22.5}
"""Bytes that are moved for each number of a matrix that is made from its codes, by torch's operators as
``model/quant.py`` calls them: of int8, the code is read and written in fp32 (5), multiplied by its scale (8) and
rounded (6); of NF4, half a byte of codes becomes an index (4.5) that finds the numbers in fp32 (4), which are scaled
(8) and rounded (6). bitsandbytes, where it is installed, moves 2.5 of NF4."""


def products(shape: Shape, strategy: Strategy, adapter: AdapterConfig) -> list[tuple[float, float]]:
    """(inputs, outputs) of one layer's products with factors on one GPU: A of all projections of a matrix at a time,
    then B, as wide as all their ranks."""
    found = [one for one in linears(shape, strategy.tp, adapter) if one.kinds]
    ranks = [adapter.rank * one.kinds for one in found]
    return [
        *((one.columns, rank) for one, rank in zip(found, ranks)),
        *((rank, one.rows) for one, rank in zip(found, ranks)),
    ]


def added_bytes(shape: Shape, strategy: Strategy, adapter: AdapterConfig, backward: bool) -> float:
    """Bytes that are moved in one layer to add the adapters' outputs to those of the matrices, or, backward, the
    gradients of their inputs; and to make frozen matrices from their codes."""
    size = 4 if strategy.precision == "fp32" else 2
    whole = linears(shape, strategy.tp, adapter)
    width = sum(one.columns if backward else one.rows for one in whole if one.kinds)
    return 3 * size * strategy.tokens * width + DEQUANTIZED_BYTES[adapter.base] * sum(one.numbers for one in whole)


def frozen_parameters(shape: Shape, adapter: AdapterConfig) -> int:
    """Numbers of the matrices of the whole model that are multiplied and need no gradient of their own."""
    output = shape.vocab * shape.hidden * ("lm_head" not in adapter.modules_to_save)
    return shape.layers * shape.layer_matrices + output


def flops_per_token(shape: Shape, whole: float, adapter: AdapterConfig) -> float:
    """Training FLOPs of one token of which ``whole`` are those of training all weights: without the gradients of frozen
    weights, and with the adapters (``model/flops.py``)."""
    width, keys = shape.heads * shape.channels, shape.groups * shape.channels
    rows = {"q": width, "k": keys, "v": keys, "o": shape.hidden, "gate": shape.ffn, "up": shape.ffn,
            "down": shape.hidden}  # fmt: skip
    inputs = {"o": width, "down": shape.ffn}
    here = set(adapter.targets) & set(rows)
    layer = sum(
        adapter.rank * (inputs.get(name, shape.hidden) + rows[name]) + adapter.dora * rows[name] for name in here
    )
    on_vocabulary = len(set(adapter.targets)) - len(here)
    trained = shape.layers * layer + on_vocabulary * adapter.rank * (shape.vocab + shape.hidden)
    return whole - 2 * frozen_parameters(shape, adapter) + 6 * trained
