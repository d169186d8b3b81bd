"""Memory of one GPU by kind, in closed form.

Weights, gradients and optimizer state as our trainer and Megatron-LM keep them; activations after Korthikanti et al.
2022 (arXiv 2205.05198), generalized to gated MLPs, grouped queries, flash attention and context parallelism; micro
batches in flight as 1F1B and interleaved 1F1B hold them.
"""

from __future__ import annotations

from dataclasses import dataclass

from llm_parallel.planner import adapters
from llm_parallel.planner.shapes import Experts, Shape, Strategy

GIB = 2.0**30
# CUDA context, NCCL's buffers and cuBLAS workspaces, which a process takes beside its tensors. torch's own figures of
# memory do not count them.
CONTEXT_BYTES = 3.0 * GIB
ALLOWANCE = 1.04
"""Memory that PyTorch's caching allocator reserves, over what the tensors take: it reserves whole blocks of 2 MiB (20
MiB for requests of 1 to 10 MiB), and some freed blocks suit no later request. An estimate, not fitted; STAlloc (arXiv
2507.16274) saw up to 43 % more where interleaving and recomputation mix lifetimes."""


LEAST_IN_8_BITS, BLOCK = 4096, 256
"""Numbers of the smallest tensor with moments in 8 bits, and of a block with one scale (``parallel/adamw8.py``)."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU."""

    stage: int
    """Its pipeline stage."""
    weights: float
    """Weights that forward and backward use."""
    gradients: float
    """Accumulated gradients, and their copies."""
    optimizer: float
    """Moments, and fp32 copies of the weights."""
    activations: float
    """What the micro batches in flight keep for backward."""
    logits: float
    """Logits, and the inputs of the last norm and of the output projection."""
    temporary: float
    """The largest of what lives only within one layer or at the loss."""

    @property
    def total(self) -> float:
        """All tensors, without CUDA context and fragmentation."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.temporary

    def by_kind(self) -> dict[str, float]:
        """Bytes by kind."""
        names = ("weights", "gradients", "optimizer", "activations", "logits", "temporary")
        return {name: getattr(self, name) for name in names}


def spread(layers: int, chunks: int) -> tuple[int, ...]:
    """Layers of each model chunk, as even as possible; the last chunk, which has the output projection, and then the
    first, which has the embedding, get the smaller number."""
    least, rest = divmod(layers, chunks)
    spared = sorted(range(chunks), key=lambda number: (number != chunks - 1, number))[: chunks - rest]
    return tuple(least + (number not in spared) for number in range(chunks))


def stage_layers(shape: Shape, strategy: Strategy) -> list[list[int]]:
    """Number of layers, as ``[stage][chunk]``."""
    chunks = strategy.stage_layers or spread(shape.layers, strategy.pp * strategy.vpp)
    return [[chunks[chunk * strategy.pp + stage] for chunk in range(strategy.vpp)] for stage in range(strategy.pp)]


def parameters_of_stage(shape: Shape, strategy: Strategy, stage: int) -> float:
    """Number of weights on one GPU of a stage. Matrices are divided by tensor parallelism, norms of
    the residual stream are not."""
    layers = sum(stage_layers(shape, strategy)[stage])
    vectors = shape.divided_vectors / strategy.tp + shape.whole_vectors + 2 * shape.hidden
    held = layers * (shape.layer_matrices / strategy.tp + vectors)
    table = shape.vocab * shape.hidden / strategy.tp
    first, last = stage == 0, stage == strategy.pp - 1
    tables = int(first) + int(last) - int(shape.tied and first and last)
    held += experts_of_stage(shape, strategy, stage) + layers * shape.router
    return held + tables * table + (shape.hidden if last else 0)


def experts_of_stage(shape: Shape, strategy: Strategy, stage: int) -> float:
    """Number of weights of experts on one GPU of a stage. Expert and tensor parallelism divide them."""
    return sum(stage_layers(shape, strategy)[stage]) * shape.expert_matrices / (strategy.ep * strategy.tp)


def in_flight(strategy: Strategy, stage: int) -> int:
    """Largest number of (micro batch, model chunk) pairs whose activations a stage holds at once."""
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
    if shape.experts is not None:
        found += _expert_activations(shape, strategy, shape.experts)
    if strategy.keeps_gathered and strategy.sequence_parallel:  # inputs of QKV and of the first MLP matrix, whole
        found += 2 * size * tokens * shape.hidden * (1 - 1 / tp)
    if shape.qk_norm != "none":
        found += _normed_attention(shape, strategy)
    if strategy.plain:
        found += _plain_operators(shape, strategy)
    if strategy.adapter is not None:
        found += size * tokens * adapters.kept_columns(strategy, strategy.adapter)
        found += adapters.magnitude_bytes(shape, strategy, strategy.adapter)
        found += adapters.wide_factor_bytes(shape, strategy, strategy.adapter)
        found -= size * tokens * adapters.unread_inputs(shape, strategy, strategy.adapter)
    if strategy.cp > 1 and strategy.cp_gathers:
        found += _gathered_attention(shape, strategy)
    return found


def _expert_activations(shape: Shape, strategy: Strategy, experts: Experts) -> float:
    """Bytes that one layer's experts keep for backward where all have as many tokens: the rows that came to them, whole
    over tensor-parallel ranks; what goes into and out of their activation; their outputs, which the gradient of the
    router's weights reads; and the router's fp32 logits and probabilities."""
    size = 4 if strategy.precision == "fp32" else 2
    whole = strategy.tp if strategy.sequence_parallel else 1
    inner = experts.ffn * (2 + shape.gated) / strategy.tp
    rows = experts.active * size * (shape.hidden + inner + shape.hidden / whole)
    return strategy.tokens * (rows + 8 * experts.count / whole)


def _plain_operators(shape: Shape, strategy: Strategy) -> float:
    """Bytes that torch's operators keep more than our kernels: the scales of two norms; queries and keys after
    rotation, beside the projection, which is kept for the values in it; and attention's output as the projection reads
    it. With gathered keys and values that projection is not kept, and there are masks: of half the rank's tokens each,
    against the keys that the two halves see, together those of the sample and of another half."""
    size = 4 if strategy.precision == "fp32" else 2
    if strategy.cp > 1:
        half = strategy.tokens / strategy.micro_batch / 2
        scales = 8 / (strategy.tp if strategy.sequence_parallel else 1)
        return strategy.tokens * scales + size * half * (strategy.seq + half)
    rotated = 0 if shape.qk_norm != "none" else shape.heads + shape.groups
    scales = 8 / (strategy.tp if strategy.sequence_parallel else 1)
    return strategy.tokens * (scales + size * shape.channels * (rotated + shape.heads) / strategy.tp)


def _normed_attention(shape: Shape, strategy: Strategy) -> float:
    """Bytes that norms of queries and keys keep more. Attention does not read the projection in place then: queries and
    keys are kept as the norms read them (copies where the projection has them apart) and as they are after rotation,
    with the rotation's table. A norm over heads that tensor parallelism divides is computed in fp32."""
    size, wide = 4 if strategy.precision == "fp32" else 2, shape.qk_norm == "wide"
    queries, keys = (count * shape.channels / strategy.tp for count in (shape.heads, shape.groups))
    rotated = size * (queries + keys)
    table = 2 * shape.channels / strategy.micro_batch
    if wide and strategy.tp > 1:
        return strategy.tokens * (rotated + 2 * 4 * (queries + keys) + table)
    copied = (queries if wide or shape.heads != shape.groups else 0) + (keys if wide else 0)
    scales = 2 if wide else (shape.heads + shape.groups) / strategy.tp
    return strategy.tokens * (rotated + size * copied + 4 * scales + table)


def _gathered_attention(shape: Shape, strategy: Strategy) -> float:
    """Bytes that our context parallelism keeps more than a ring: keys and values of the whole sample, and the attention
    outputs of the rank's two pieces of the sequence beside their concatenation."""
    size = 4 if strategy.precision == "fp32" else 2
    others = strategy.tokens * (strategy.cp - 1)
    keys_values = 2 * max(shape.groups / strategy.tp, 1) * shape.channels * others
    return size * (keys_values + strategy.tokens * shape.heads * shape.channels / strategy.tp)


def recomputed_activations(shape: Shape, strategy: Strategy) -> float:
    """Bytes that the backward of one recomputed layer holds in addition to what forward kept."""
    if strategy.recompute not in ("full", "qkv", "ops"):
        return 0.0
    again = layer_activations(shape, strategy, "none")
    return again if strategy.recompute == "ops" else again - layer_activations(shape, strategy)


def memory_of_stage(shape: Shape, strategy: Strategy, stage: int) -> Memory:
    """Memory of one GPU of a stage."""
    weights, gradients, optimizer = _states(shape, strategy, stage)
    layers = stage_layers(shape, strategy)[stage]
    chunk_layers = sum(layers) / strategy.vpp
    activations = in_flight(strategy, stage) * chunk_layers * layer_activations(shape, strategy)
    if strategy.plain:
        activations += 2 * 4 * shape.channels * strategy.seq / strategy.cp  # the rotation's table
    frozen = strategy.adapter is not None and not adapters.changes_embedding(strategy.adapter)
    if frozen and stage == 0 and strategy.recompute == "none":
        # The first norm's input is the embedding's output, which needs no gradient.
        activations -= in_flight(strategy, stage) / strategy.vpp * _unread_embedding(shape, strategy)
    return Memory(
        stage=stage,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        logits=_logits(shape, strategy) if stage == strategy.pp - 1 else 0.0,
        temporary=_temporary(shape, strategy) + _received(shape, strategy, stage),
    )


def _unread_embedding(shape: Shape, strategy: Strategy) -> float:
    """Bytes of the input of a layer's first norm and, of torch's operators, its scales."""
    size = 4 if strategy.precision == "fp32" else 2
    whole = strategy.tp if strategy.sequence_parallel else 1
    return strategy.tokens * (size * shape.hidden + 4 * strategy.plain) / whole


def _states(shape: Shape, strategy: Strategy, stage: int) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimizer state.

    Fully sharded data parallelism (FSDP2) shards fp32 weights, gradients and two moments, 16 bytes per parameter. In a
    pipeline (torch.distributed.pipelining) a stage's weights stay gathered, and its whole gradients are accumulated in
    fp32 until the last micro batch's backward, for one model chunk at a time."""
    parameters = parameters_of_stage(shape, strategy, stage)
    size = 4 if strategy.precision == "fp32" else 2
    replicas = strategy.dp * strategy.cp
    if strategy.zero == 3:
        shard = 4.0 * parameters / replicas
        gathered = parameters if strategy.pp > 1 else 0.0
        return shard + size * gathered, shard + 4 * gathered / strategy.vpp, 2 * shard
    main = 0 if strategy.precision == "fp32" else 4
    if strategy.zero == 2:  # gradients of a layer at a time are whole, see _temporary
        return size * parameters, 4.0 * parameters / replicas, (8 + main) * parameters / replicas
    held = strategy.grad_bytes + strategy.copied_grad_bytes
    frozen = 0.0
    if strategy.adapter is not None:
        layers = sum(stage_layers(shape, strategy)[stage])
        dense = size * (parameters - layers * shape.layer_matrices / strategy.tp)
        frozen = dense + layers * adapters.frozen_layer_bytes(shape, strategy, strategy.adapter)
        frozen += layers * adapters.mask_bytes(shape, strategy, strategy.adapter)
        whole = adapters.whole_tables(shape, strategy, strategy.adapter, stage) * shape.vocab * shape.hidden
        frozen -= size * whole / strategy.tp
        parameters = layers * adapters.layer_parameters(shape, strategy, strategy.adapter)
        parameters += whole / strategy.tp + adapters.vocabulary_parameters(shape, strategy, strategy.adapter, stage)
    optimizer = main * parameters + _moments(shape, strategy, stage, parameters)
    if strategy.zero != 1:
        return frozen + size * parameters, held * parameters, optimizer
    # Experts are on fewer replicas than the rest.
    share = experts_of_stage(shape, strategy, stage) / parameters if shape.experts else 0.0
    divided = (1.0 - share) / replicas + share / (replicas / strategy.ep)
    return frozen + size * parameters, held * parameters, optimizer * divided


def _moments(shape: Shape, strategy: Strategy, stage: int, parameters: float) -> float:
    """Bytes of both moments of a stage's ``parameters``. In 8 bits, large tensors have two codes for each number and
    two scales for each block, on average over replicas; the embedding (and an output projection that is the same) and
    vectors stay in fp32."""
    if strategy.moment_bits == 32:
        return 8 * parameters
    layers = sum(stage_layers(shape, strategy)[stage])
    if strategy.adapter is not None:
        whole = adapters.factors(shape, strategy.adapter)
        share = sum(count for count in whole if count >= LEAST_IN_8_BITS) / (sum(whole) or 1)
        eight = share * layers * adapters.layer_parameters(shape, strategy, strategy.adapter)
        tables = adapters.whole_tables(shape, strategy, strategy.adapter, stage)
        if tables and stage == strategy.pp - 1 and not shape.tied and "lm_head" in strategy.adapter.modules_to_save:
            eight += shape.vocab * shape.hidden / strategy.tp
    else:
        vectors = 2 * shape.hidden if shape.hidden >= LEAST_IN_8_BITS else 0
        eight = layers * (shape.layer_matrices / strategy.tp + vectors)
        if stage == strategy.pp - 1 and not shape.tied:
            eight += shape.vocab * shape.hidden / strategy.tp
    return 8 * (parameters - eight) + (2 + 8 / BLOCK) * eight


def _logits(shape: Shape, strategy: Strategy) -> float:
    """Bytes at the loss: inputs of the last norm and of the output projection, the logits, and what the loss derives
    from them. Our loss writes the gradient over the logits; torch.distributed.pipelining returns every micro batch's
    logits."""
    size = 4 if strategy.precision == "fp32" else 2
    # The input of a frozen output projection is not read in backward.
    inputs = (2 if adapters.reads_output_input(strategy.adapter) else 1) * size * shape.hidden
    rows = (inputs + 4 * strategy.plain) / (strategy.tp if strategy.sequence_parallel else 1)
    rows += 8 * strategy.plain  # largest logits, and sums of exponentials
    if strategy.zero == 3:  # only layers are compiled there, so the last norm keeps its input and result in fp32
        rows *= 3
    width = max(size, strategy.logit_bytes)
    if strategy.zero == 3 and strategy.pp > 1:
        width += size * strategy.micro_batches
    return strategy.tokens * (rows + width * shape.vocab / strategy.tp)


def _temporary(shape: Shape, strategy: Strategy) -> float:
    """Bytes that live only within one layer's backward: the recomputed activations (the layer's input is kept already),
    the gradient of one MLP, the gathered input under sequence parallelism, and FSDP's gathered weights and whole
    gradients."""
    size = 4 if strategy.precision == "fp32" else 2
    found = recomputed_activations(shape, strategy)
    wide = max(shape.ffn, shape.experts.active * shape.experts.ffn if shape.experts else 0)
    found += size * strategy.tokens * wide * (2 if shape.gated else 1) / strategy.tp
    if strategy.adapter is not None:
        found += adapters.dequantized_bytes(shape, strategy, strategy.adapter)
    if not strategy.fused:  # inputs and results of norms in fp32, and the activated gate
        found += strategy.tokens * (16 * shape.hidden + size * shape.ffn * shape.gated / strategy.tp)
    if strategy.sequence_parallel and strategy.tp > 1:
        # DTensor keeps the gathered inputs of attention, MLP and output projection; with asynchronous tensor
        # parallelism they are in NVLink's symmetric memory, which the allocator does not count.
        both = 1 if strategy.zero != 3 else 1 + 2 * (not strategy.overlap_tp)
        found += both * size * strategy.tokens * shape.hidden
    if strategy.zero == 2:  # of one layer the gradient, and its fp32 copy
        found += (size + 4) * shape.layer_parameters / strategy.tp
    if strategy.zero == 3:
        # Weights of two layers (one runs, one is gathered ahead), and of one the gradient and its fp32 copy.
        found += (2 * size + size + 4) * shape.layer_parameters / strategy.tp
        if strategy.pp == 1:  # embedding and output stay gathered from forward to backward
            found += size * shape.vocab * shape.hidden * (1 if shape.tied else 2) / strategy.tp
    return found


def _received(shape: Shape, strategy: Strategy, stage: int) -> float:
    """Bytes of torch.distributed.pipelining's buffers for every micro batch's input and its output's gradient."""
    if strategy.zero != 3 or strategy.pp == 1:
        return 0.0
    sides = (stage > 0) + (stage < strategy.pp - 1)
    return sides * strategy.micro_batches * strategy.vpp * layer_activations(shape, strategy, "full")


def memory(shape: Shape, strategy: Strategy) -> Memory:
    """Memory of the fullest GPU."""
    stages = {0, strategy.pp - 1, min(1, strategy.pp - 1)}
    return max((memory_of_stage(shape, strategy, stage) for stage in sorted(stages)), key=lambda found: found.total)
