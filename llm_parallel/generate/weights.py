"""Weights in few bits for generation on a CPU.

``int8``: each row of a matrix has a scale. ``int4``: each 32 numbers of a row have a scale and an offset; the output
projection, in which an error meets the logits directly, is int8. Embeddings, norms and biases stay in bf16, as does the
cache. A row of a matrix has the same codes and scales whatever the layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from llm_parallel.errors import UserError
from llm_parallel.generate.layers import PlainChunk
from llm_parallel.generate.packed import GROUP, PackedMatrix, fits
from llm_parallel.generate.paged import LayerCache, Rotation, make_pass
from llm_parallel.generate.requests import Request
from llm_parallel.generate.scheduler import Draft, Part
from llm_parallel.parallel.engine import Network

PAGE_TOKENS = 16
SAMPLE = (
    "The capital of France is Paris, and the capital of Italy is Rome. Water boils at one hundred degrees. def add(a, "
    "b): return a + b. She looked out of the window, saw that it was raining, and took an umbrella with her."
)
"""Text on which logits are compared."""


@dataclass(frozen=True)
class Packing:
    """What was packed on this process: matrices, their bytes, those of what stays in bf16, and matrices among these
    whose shape torch's packed products do not take."""

    bits: int
    matrices: int
    packed_bytes: int
    other_bytes: int
    refused: int

    def __str__(self) -> str:
        how = "int8 weights, a scale by row" if self.bits == 8 else f"int4 weights in groups of {GROUP}, output int8"
        text = f"{how}, embedding bf16: {(self.packed_bytes + self.other_bytes) / 1e6:.1f} MB on this process"
        if self.refused:
            text += (
                f"; {self.refused} of {self.matrices + self.refused} matrices stay bf16, since their rows are no "
                f"multiple of 32 numbers{'' if self.bits == 8 else ', or there is no multiple of 16 of them'}"
            )
        return text


def check_packable(device: torch.device) -> None:
    """Raises UserError where weights cannot be held in few bits."""
    if device.type != "cpu":
        raise UserError("weights in int8 and int4 are for a CPU, and the device is cuda; take bf16")
    for name in ("_weight_int8pack_mm", "_weight_int4pack_mm_for_cpu", "_convert_weight_to_int4pack_for_cpu"):
        if not hasattr(torch.ops.aten, name):
            raise UserError(f"torch {torch.__version__} has no {name}, which int8 and int4 need; take weights bf16")


@torch.no_grad()
def pack_network(network: Network, bits: Literal[4, 8]) -> Packing:
    """Packs the matrices of a network in bf16 on a CPU, and frees what they replace. From then on it can be generated
    with and nothing else. All processes of a tensor-parallel group call this."""
    matrices = refused = packed_bytes = 0
    for weight, width, group, stays in _matrices(network, bits):
        if getattr(weight, "stored", None) is not None or not fits(weight, width):
            refused += 1
            continue
        weight.packed = PackedMatrix(weight.float(), width, group)
        matrices, packed_bytes = matrices + 1, packed_bytes + weight.packed.bytes
        if not stays:
            weight.data = weight.new_empty(0)
    other = sum(p.numel() * p.element_size() for chunk in network.models for p in chunk.parameters())
    return Packing(bits, matrices, packed_bytes, other, refused)


def _matrices(network: Network, bits: Literal[4, 8]) -> Iterator[tuple[Any, Literal[4, 8], Any, bool]]:
    """Each weight, its bits, the processes with its other columns, and whether it is the embedding too."""
    for chunk in network.models:
        group = chunk.groups.collection.tp
        for layer in chunk.decoder.layers:
            attention, mlp = layer.self_attention, layer.mlp
            for module in (attention.linear_qkv, mlp.linear_fc1):
                yield module.weight, bits, None, False
            for module in (attention.linear_proj, mlp.linear_fc2):
                yield module.weight, bits, group, False
        if chunk.post_process:
            tied = chunk.share_embeddings_and_output_weights
            weight = chunk.shared_embedding_or_output_weight() if tied else chunk.output_layer.weight
            yield weight, 8, None, tied


def text_logits(network: Network, tokens: Sequence[int]) -> Tensor | None:
    """Logits after each token of a text, fp32 [tokens, v], on the last pipeline stage, by the forward of generation;
    None elsewhere. All processes of a replica call this."""
    device, at, pp = network.groups.platform.device, network.groups.at.pp, network.groups.mesh.pp
    pages = -(-len(tokens) // PAGE_TOKENS)
    draft = Draft(Request(0, tuple(tokens)), 0, 0, list(tokens), pages=list(range(pages)))
    logits = None
    with torch.inference_mode(), torch._C.DisableTorchFunction():
        caches = [LayerCache.of_chunk(model, pages, PAGE_TOKENS) for model in network.models]
        chunks = [PlainChunk(model, cache) for model, cache in zip(network.models, caches)]
        config = network.models[0].model_config
        part = Part(draft, 0, len(tokens), True)
        info = make_pass([part], PAGE_TOKENS, Rotation(config, device), device, chunks[0].paging)
        for chunk in chunks:
            hidden = None
            if not chunk.is_first:
                hidden = torch.empty(len(tokens), config.hidden_size, dtype=chunk.model.numerics.dtype, device=device)
                dist.recv(hidden, group=network.groups.collection.pp, group_src=(at - 1) % pp)
            out = chunk(hidden, info)
            if chunk.is_last:
                logits = chunk.logits(out).clone()
            else:
                dist.send(out, group=network.groups.collection.pp, group_dst=(at + 1) % pp)
    return logits


def sample_tokens(tokenizer: Any, vocabulary: int) -> list[int]:
    """A short text on which logits are compared: English if there is a tokenizer, else tokens at random."""
    if tokenizer is not None:
        found = [int(token) for token in tokenizer.encode(SAMPLE)][:128]
        if len(found) > 1 and max(found) < vocabulary:
            return found
    return torch.randint(vocabulary, (64,), generator=torch.Generator().manual_seed(0)).tolist()


def difference(logits_TV: Tensor, exact_TV: Tensor) -> str:
    """How far logits are from exact ones, in words."""
    error = (logits_TV - exact_TV).square().mean().sqrt().item()
    spread = exact_TV.std().item()
    p, q = exact_TV.log_softmax(-1), logits_TV.log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1).mean().item()
    same = int((logits_TV.argmax(-1) == exact_TV.argmax(-1)).sum())
    return (
        f"logits on {len(exact_TV)} tokens differ from those in fp32 by {error:.2g} (root mean square; their spread is "
        f"{spread:.2g}), KL divergence {divergence:.1e}, the likeliest token is the same after {same}"
    )
