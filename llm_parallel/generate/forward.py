"""Forward passes outside training, through the stages of a pipeline and over tensor-parallel shards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from llm_parallel.errors import UserError
from llm_parallel.model.gpt import LlamaModel


def pipeline_logits(models: Sequence[LlamaModel], tokens: Tensor) -> Tensor | None:
    """Logits of the whole vocabulary, fp32 [b, s, v] without padding, on every rank of the last pipeline stage.

    tokens: int64 [b, s], the same on every rank. Other stages get None. Call without gradients. Raises UserError for
    interleaved stages and context parallelism, which are for training.
    """
    model = models[0]
    groups, mesh = model.groups, model.groups.mesh
    if model.stages.vpp > 1 or mesh.cp > 1:
        raise UserError(
            f"parallel.vpp is {model.stages.vpp} and parallel.cp is {mesh.cp}, which only training can use; set both "
            "to 1"
        )
    pipeline = groups.collection.pp
    rows, length = tokens.shape
    local_length = length
    if mesh.sequence_parallel:
        if length % mesh.tp:
            raise UserError(
                f"{length} tokens cannot be divided over parallel.tp {mesh.tp}; set parallel.sequence_parallel=false"
            )
        local_length = length // mesh.tp
    if groups.at.pp > 0:
        hidden = torch.empty(
            local_length,
            rows,
            model.config.hidden_size,
            dtype=model.numerics.dtype,
            device=groups.platform.device,
        )
        dist.recv(hidden, group=pipeline, group_src=groups.at.pp - 1)
        model.set_input_tensor([hidden])
    output = model(tokens)
    if groups.at.pp < mesh.pp - 1:
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
    return logits[..., : model.model_config.vocab_size]
