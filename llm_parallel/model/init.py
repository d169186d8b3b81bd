"""Initial weights that do not depend on the layout.

Every 64 rows of every tensor are drawn from a generator seeded by (seed, name of the tensor, number of the block), so a
process draws just the blocks that its shard touches and any layout holds the same model. Drawn on the CPU in fp32, so
that a GPU starts from the same weights too.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn

from llm_parallel.config.tree import ModelConfig
from llm_parallel.model.tensors import Role, kind_of, weights_of
from llm_parallel.parallel.groups import Groups

BLOCK_ROWS = 64


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
    """Initial values, fp32 [sum of rows, hidden], of those rows (columns where ranks divide columns) of a matrix:
    normal numbers of deviation ``init_std``, divided by sqrt(2 num_layers) where the matrix writes to the residual
    stream (Radford et al. 2019); zeros beyond the vocabulary."""
    role = kind_of(name).role
    values = torch.cat([normal_rows(seed, name, part, model.hidden_size) for part in rows])
    values *= model.init_std / math.sqrt(2 * model.num_layers) if role is Role.RESIDUAL else model.init_std
    if role is Role.VOCABULARY:
        assert model.vocab_size is not None
        values[max(model.vocab_size - rows[0].start, 0) :] = 0.0
    return values


@torch.no_grad()
def initialize(chunk: nn.Module, model: ModelConfig, groups: Groups, seed: int) -> None:
    """Fills all weights of a chunk: norms with 1, biases with 0, matrices with ``initial_rows``."""
    tp, tp_rank = groups.mesh.tp, groups.at.tp
    for name, parameter in weights_of(chunk):
        kind = kind_of(name)
        dim = kind.piece_dim
        # megatron-core before 0.19 marks only shards that it initialized itself; unmarked, they drop out of the
        # gradient norm.
        unmarked = isinstance(parameter, nn.Parameter) and not hasattr(parameter, "tensor_model_parallel")
        if kind.sharded_dim is not None and unmarked:
            set_tensor_model_parallel_attributes(parameter, True, dim, 1)
        if kind.role in (Role.NORM, Role.BIAS):
            parameter.copy_(torch.tensor(1.0 if kind.role is Role.NORM else 0.0))
            continue
        size = parameter.shape[dim] * (1 if kind.sharded_dim is None else tp)
        values = initial_rows(name, kind.shard(size, tp, tp_rank), model, seed)
        parameter.copy_(values.t() if dim == 1 else values)
