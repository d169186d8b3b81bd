"""Initial weights that do not depend on the layout.

Every 64 rows of every tensor are drawn from a generator seeded by (seed, name of the tensor, number of the block), so a
process draws just the blocks that its shard touches and any layout holds the same model. Drawn on the CPU in fp32, so
that a GPU starts from the same weights too.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn

from llm_parallel.config.tree import ModelConfig
from llm_parallel.parallel.groups import Groups

BLOCK_ROWS = 64


def canonical_parameters(chunk: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of a model chunk with names that are the same in every layout: layers have their global number, from
    0, and a tied output projection has the embedding's name."""
    for name, parameter in chunk.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(chunk.decoder.layers[int(parts[2])].layer_number - 1)
        name = ".".join(parts)
        if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
            name = "embedding.word_embeddings.weight"
        yield name, parameter


def shard_rows(name: str, global_rows: int, tp: int, tp_rank: int) -> list[range]:
    """Rows (or columns, for row-parallel matrices) of the whole tensor that one tensor-parallel rank holds, in order.

    The first MLP matrix holds gate and up, each divided, one after the other."""
    halves = 2 if "linear_fc1" in name else 1
    step = global_rows // (halves * tp)
    return [
        range(half * global_rows // halves + tp_rank * step, half * global_rows // halves + (tp_rank + 1) * step)
        for half in range(halves)
    ]


def normal_rows(seed: int, name: str, rows: range, width: int) -> Tensor:
    """Standard normal fp32 [len(rows), width]: rows of an endless tensor that (seed, name) define."""
    out = torch.empty(len(rows), width)
    first = rows.start // BLOCK_ROWS
    for block in range(first, -(-rows.stop // BLOCK_ROWS)):
        digest = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        values = torch.randn(BLOCK_ROWS, width, generator=generator)
        low, high = max(rows.start, block * BLOCK_ROWS), min(rows.stop, (block + 1) * BLOCK_ROWS)
        out[low - rows.start : high - rows.start] = values[low - block * BLOCK_ROWS : high - block * BLOCK_ROWS]
    return out


def initial_rows(name: str, rows: Sequence[range], model: ModelConfig, seed: int) -> Tensor:
    """Initial values, fp32 [sum of rows, hidden], of those rows (columns for row-parallel matrices) of matrix ``name``:
    normal numbers of deviation ``init_std``, divided by sqrt(2 num_layers) where the matrix writes to the residual
    stream (Radford et al. 2019); zeros beyond the vocabulary."""
    values = torch.cat([normal_rows(seed, name, part, model.hidden_size) for part in rows])
    values *= model.init_std / math.sqrt(2 * model.num_layers) if writes_residual(name) else model.init_std
    if name.startswith(("embedding", "output_layer")):
        assert model.vocab_size is not None
        values[max(model.vocab_size - rows[0].start, 0) :] = 0.0
    return values


def writes_residual(name: str) -> bool:
    """Whether matrix ``name`` is row-parallel: its output is added to the residual stream."""
    return "linear_proj" in name or "linear_fc2" in name


@torch.no_grad()
def initialize(chunk: nn.Module, model: ModelConfig, groups: Groups, seed: int) -> None:
    """Fills all weights of a chunk: norms with 1, matrices with ``initial_rows``."""
    tp, tp_rank = groups.layout.tp, groups.at.tp
    for name, parameter in canonical_parameters(chunk):
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        dim = 1 if writes_residual(name) else 0
        # megatron-core before 0.19 marks only shards that it initialized itself; unmarked, they drop out of the
        # gradient norm.
        if not hasattr(parameter, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(parameter, True, dim, 1)
        values = initial_rows(name, shard_rows(name, parameter.shape[dim] * tp, tp, tp_rank), model, seed)
        parameter.copy_(values.t() if dim == 1 else values)
