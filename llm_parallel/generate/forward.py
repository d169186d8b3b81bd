"""Forward passes outside training, through the stages of a pipeline and over tensor-parallel shards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from llm_parallel.errors import UserError
from llm_parallel.model.gpt import LlamaModel
from llm_parallel.model.mcore_config import compute_dtype
from llm_parallel.model.sequence import KVCache


def pipeline_logits(models: Sequence[LlamaModel], tokens: Tensor, cache: KVCache | None = None) -> Tensor | None:
    """Logits of the whole vocabulary, fp32 [b, s, v] without padding, on every rank of the last pipeline stage.

    tokens: int64 [b, s], the same on every rank. Other stages get None. Call without gradients. Raises UserError for
    interleaved stages and context parallelism, which are for training.
    """
    model = models[0]
    groups, layout = model.groups, model.groups.layout
    if layout.vpp > 1 or layout.cp > 1:
        raise UserError(
            f"parallel.vpp is {layout.vpp} and parallel.cp is {layout.cp}, which only training can use; set both to 1"
        )
    pipeline = groups.collection.pp
    rows, length = tokens.shape
    local_length = length
    if layout.sequence_parallel:
        if length % layout.tp:
            raise UserError(
                f"{length} tokens cannot be divided over parallel.tp {layout.tp}; set parallel.sequence_parallel=false"
            )
        local_length = length // layout.tp
    if groups.at.pp > 0:
        hidden = torch.empty(
            local_length,
            rows,
            model.config.hidden_size,
            dtype=compute_dtype(model.run_config),
            device=groups.platform.device,
        )
        dist.recv(hidden, group=pipeline, group_src=groups.at.pp - 1)
        model.set_input_tensor([hidden])
    output = model(tokens, cache=cache)
    if cache is not None:
        cache.advance(length)
    if groups.at.pp < layout.pp - 1:
        dist.send(output.contiguous(), group=pipeline, group_dst=groups.at.pp + 1)
        return None
    return gather_vocabulary(model, output.float())


def gather_vocabulary(model: LlamaModel, logits: Tensor) -> Tensor:
    """All columns of vocabulary-parallel logits [b, s, v/tp], without padding."""
    group = model.groups.collection.tp
    if group.size() > 1:
        parts = [torch.empty_like(logits) for _ in range(group.size())]
        dist.all_gather(parts, logits.contiguous(), group=group)
        logits = torch.cat(parts, dim=-1)
    return logits[..., : model.run_config.model.vocab_size]
