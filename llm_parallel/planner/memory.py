"""Bytes of one GPU by kind, in closed form.

Weights, gradients and optimizer state as our trainer and Megatron-LM keep them; activations after Korthikanti et al.
2022 (arXiv 2205.05198), generalized to gated MLPs, grouped queries, flash attention and context parallelism; micro
batches in flight as 1F1B and interleaved 1F1B hold them.
"""

from __future__ import annotations

from dataclasses import dataclass

from llm_parallel.planner.shapes import Shape, Strategy

GIB = 2.0**30
# CUDA context, NCCL's buffers, cuBLAS workspaces: what a process takes before the first tensor, and what the allocator
# cannot use. Beside torch's own figures only the second counts.
CONTEXT_BYTES = 3.0 * GIB
ALLOWANCE = 1.04
"""What PyTorch's caching allocator reserves over what the tensors take: whole blocks of 2 MiB (of 20 MiB for requests
of 1 to 10 MiB), and freed ones that suit no later request. Ours, not fitted; STAlloc (arXiv 2507.16274) saw more, up to
43 %, where interleaving and recomputation mix lifetimes."""


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest GPU. temporary: the largest of what lives only within one layer or at the loss."""

    stage: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    temporary: float

    @property
    def total(self) -> float:
        """Tensors, without context and fragmentation."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.temporary

    def by_kind(self) -> dict[str, float]:
        """Bytes by kind."""
        names = ("weights", "gradients", "optimizer", "activations", "logits", "temporary")
        return {name: getattr(self, name) for name in names}


def spread(layers: int, chunks: int) -> tuple[int, ...]:
    """Layers of each chunk, as even as can be; the last chunk, which has the output, and the first, which has the
    embedding, are spared first."""
    least, rest = divmod(layers, chunks)
    spared = sorted(range(chunks), key=lambda number: (number != chunks - 1, number))[: chunks - rest]
    return tuple(least + (number not in spared) for number in range(chunks))


def stage_layers(shape: Shape, strategy: Strategy) -> list[list[int]]:
    """Layers of [stage][chunk]."""
    chunks = strategy.stage_layers or spread(shape.layers, strategy.pp * strategy.vpp)
    return [[chunks[chunk * strategy.pp + stage] for chunk in range(strategy.vpp)] for stage in range(strategy.pp)]


def parameters_of_stage(shape: Shape, strategy: Strategy, stage: int) -> float:
    """Weights that one GPU of a stage holds, all tensor-parallel shards of a kind being equal; norms are whole."""
    layers = sum(stage_layers(shape, strategy)[stage])
    held = layers * (shape.layer_matrices / strategy.tp + 2 * shape.hidden)
    table = shape.vocab * shape.hidden / strategy.tp
    first, last = stage == 0, stage == strategy.pp - 1
    tables = int(first) + int(last) - int(shape.tied and first and last)
    return held + tables * table + (shape.hidden if last else 0)


def in_flight(strategy: Strategy, stage: int) -> int:
    """Chunks of micro batches whose activations a stage holds at most."""
    total = strategy.micro_batches * strategy.vpp
    ahead = strategy.pp - stage - 1
    warm = ahead if strategy.vpp == 1 else 2 * ahead + (strategy.vpp - 1) * strategy.pp
    return min(total, warm + 1)


def layer_activations(shape: Shape, strategy: Strategy, recompute: str | None = None) -> float:
    """Bytes that one layer keeps for the backward of one micro batch."""
    kept = recompute or strategy.recompute
    size = 4 if strategy.precision == "fp32" else 2
    tokens, tp = strategy.tokens, strategy.tp
    whole = tp if strategy.sequence_parallel else 1  # what sequence parallelism divides
    if kept in ("full", "qkv"):  # its input
        projected = shape.channels * (shape.heads + 2 * shape.groups) / tp if kept == "qkv" else 0.0
        return size * tokens * (shape.hidden / whole + projected)
    if kept == "ops":
        products = shape.channels * (2 * shape.heads + 2 * shape.groups) + (2 * shape.ffn if shape.gated else shape.ffn)
        rows = 2 * shape.hidden / whole + (products / 2 + shape.heads * shape.channels) / tp
        return size * tokens * rows
    # Inputs of two norms, of QKV and of the first MLP matrix.
    rows = 4 * size * shape.hidden + (2 * shape.hidden if shape.dropout else 0)
    attention = size * shape.channels * (2 * shape.heads + 2 * shape.groups)  # q, k, v, and what the projection reads
    mlp = size * shape.ffn * (2 + shape.gated + (shape.gated and strategy.keeps_gate))
    found = tokens * (rows / whole + (attention + mlp) / tp)
    if not strategy.flash and kept != "selective":
        per_score = 2 * size + (1 if shape.dropout else 0)  # softmax, its dropout, and the mask
        found += per_score * tokens * strategy.seq * shape.heads / tp
    elif strategy.flash:
        found += 4 * tokens * shape.heads / tp  # logarithms of the sums, fp32
    if strategy.cp > 1 and strategy.cp_gathers:
        found += _gathered_attention(shape, strategy)
    return found


def _gathered_attention(shape: Shape, strategy: Strategy) -> float:
    """What our context parallelism keeps more than a ring: keys and values of the whole sample, and the outputs of the
    rank's two pieces beside the two as one."""
    size = 4 if strategy.precision == "fp32" else 2
    others = strategy.tokens * (strategy.cp - 1)
    keys_values = 2 * max(shape.groups / strategy.tp, 1) * shape.channels * others
    return size * (keys_values + strategy.tokens * shape.heads * shape.channels / strategy.tp)


def recomputed_activations(shape: Shape, strategy: Strategy) -> float:
    """Bytes that the backward of one recomputed layer holds beside what it kept."""
    if strategy.recompute not in ("full", "qkv", "ops"):
        return 0.0
    again = layer_activations(shape, strategy, "none")
    return again if strategy.recompute == "ops" else again - layer_activations(shape, strategy)


def memory_of_stage(shape: Shape, strategy: Strategy, stage: int) -> Memory:
    """Bytes of one GPU of a stage."""
    weights, gradients, optimizer = _states(shape, strategy, stage)
    layers = stage_layers(shape, strategy)[stage]
    chunk_layers = sum(layers) / strategy.vpp
    activations = in_flight(strategy, stage) * chunk_layers * layer_activations(shape, strategy)
    return Memory(
        stage=stage,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        logits=_logits(shape, strategy) if stage == strategy.pp - 1 else 0.0,
        temporary=_temporary(shape, strategy) + _received(shape, strategy, stage),
    )


def _states(shape: Shape, strategy: Strategy, stage: int) -> tuple[float, float, float]:
    """Weights, gradients and optimizer state.

    Fully sharded data parallelism (FSDP2) keeps fp32 weights, gradients and two moments, 16 bytes, in shards. Under a
    pipeline (torch.distributed.pipelining) a stage's weights stay gathered, and its gradients are summed whole, in
    fp32, until the last micro batch's backward; of several chunks one at a time."""
    parameters = parameters_of_stage(shape, strategy, stage)
    size = 4 if strategy.precision == "fp32" else 2
    replicas = strategy.dp * strategy.cp
    if strategy.zero == 3:
        shard = 4.0 * parameters / replicas
        gathered = parameters if strategy.pp > 1 else 0.0
        return shard + size * gathered, shard + 4 * gathered / strategy.vpp, 2 * shard
    states = 8 if strategy.precision == "fp32" else 12
    held = strategy.grad_bytes + strategy.copied_grad_bytes
    return size * parameters, held * parameters, states * parameters / (replicas if strategy.zero == 1 else 1)


def _logits(shape: Shape, strategy: Strategy) -> float:
    """Input of the last norm and of the output projection, and the logits with what the loss makes of them; ours writes
    their gradient over them. torch.distributed.pipelining returns every micro batch's logits."""
    size = 4 if strategy.precision == "fp32" else 2
    rows = 2 * size * shape.hidden / (strategy.tp if strategy.sequence_parallel else 1)
    if strategy.zero == 3:  # only layers are compiled there: the last norm keeps its input and result in fp32
        rows *= 3
    width = max(size, strategy.logit_bytes)
    if strategy.zero == 3 and strategy.pp > 1:
        width += size * strategy.micro_batches
    return strategy.tokens * (rows + width * shape.vocab / strategy.tp)


def _temporary(shape: Shape, strategy: Strategy) -> float:
    """What lives within one layer's backward: all that a recomputed layer would have kept (its input is kept already),
    the gradient of one MLP, tensor parallelism's gathered input, and FSDP's whole weights and gradients."""
    size = 4 if strategy.precision == "fp32" else 2
    found = recomputed_activations(shape, strategy)
    found += size * strategy.tokens * shape.ffn * (2 if shape.gated else 1) / strategy.tp
    if not strategy.fused:  # norms' inputs and results in fp32, and the activated gate
        found += strategy.tokens * (16 * shape.hidden + size * shape.ffn * shape.gated / strategy.tp)
    if strategy.sequence_parallel and strategy.tp > 1:
        # DTensor keeps both gathered inputs of a layer and that of the output; asynchronous ones are in NVLink's
        # symmetric memory, which the allocator does not count.
        both = 1 if strategy.zero != 3 else 1 + 2 * (not strategy.overlap_tp)
        found += both * size * strategy.tokens * shape.hidden
    if strategy.zero == 3:
        # Two layers' weights (one runs, one is gathered ahead), one's gradient, and its fp32 copy on its way.
        found += (2 * size + size + 4) * shape.layer_parameters / strategy.tp
        if strategy.pp == 1:  # the ends stay gathered from forward to backward
            found += size * shape.vocab * shape.hidden * (1 if shape.tied else 2) / strategy.tp
    return found


def _received(shape: Shape, strategy: Strategy, stage: int) -> float:
    """torch.distributed.pipelining's buffers: of every micro batch's input, and of its output's gradient."""
    if strategy.zero != 3 or strategy.pp == 1:
        return 0.0
    sides = (stage > 0) + (stage < strategy.pp - 1)
    return sides * strategy.micro_batches * strategy.vpp * layer_activations(shape, strategy, "full")


def memory(shape: Shape, strategy: Strategy) -> Memory:
    """Bytes of the fullest GPU."""
    stages = {0, strategy.pp - 1, min(1, strategy.pp - 1)}
    return max((memory_of_stage(shape, strategy, stage) for stage in sorted(stages)), key=lambda found: found.total)
