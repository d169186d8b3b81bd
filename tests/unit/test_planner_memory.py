"""Memory of a GPU against Korthikanti et al. 2022 (arXiv 2205.05198), equations 1, 2, 4 and 6 and figure 1."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_parallel.config.tree import ModelConfig
from llm_parallel.model.flops import flops_per_token
from llm_parallel.model.tensors import all_names, split_name
from llm_parallel.planner.hardware import load_cluster
from llm_parallel.planner.memory import (
    in_flight,
    layer_activations,
    memory,
    memory_of_stage,
    parameters_of_stage,
    stage_layers,
)
from llm_parallel.planner.pipeline_simulation import simulate
from llm_parallel.planner.shapes import Shape, Strategy, shape_of
from llm_parallel.planner.steptime import step_time

GPT_175B = Shape(96, 12288, 96, 96, 4 * 12288, 51200, gated=False, dropout=True, tied=True, rotary=False)
LLAMA_70B = Shape(80, 8192, 64, 8, 28672, 32000)


def unfused(**changes: object) -> Strategy:
    """GPT's training of 2022: no flash attention."""
    fields = {"gpus": 64, "global_batch": 64, "micro_batch": 1, "seq": 2048, "flash": False, "precision": "fp16"}
    return Strategy(**(fields | changes))  # type: ignore[arg-type]


@given(
    tp=st.sampled_from([1, 2, 4, 8]),
    micro_batch=st.integers(1, 4),
    heads=st.sampled_from([16, 32, 64]),
    width=st.sampled_from([64, 128]),
    seq=st.sampled_from([512, 2048, 8192]),
)
def test_layer_activations_are_korthikantis(tp: int, micro_batch: int, heads: int, width: int, seq: int) -> None:
    hidden = heads * width
    shape = Shape(24, hidden, heads, heads, 4 * hidden, 51200, gated=False, dropout=True, rotary=False)
    sbh = seq * micro_batch * hidden
    scores = 5 * heads * seq / hidden

    def found(**changes: object) -> float:
        return layer_activations(shape, unfused(tp=tp, micro_batch=micro_batch, seq=seq, **changes))

    assert found(sequence_parallel=False) == pytest.approx(sbh * (10 + 24 / tp + scores / tp))
    assert found() == pytest.approx(sbh * (34 + scores) / tp)
    assert found(recompute="selective") == pytest.approx(sbh * 34 / tp)
    assert found(recompute="full", sequence_parallel=False) == pytest.approx(2 * sbh)


def test_gated_mlp_and_grouped_queries_of_llama_by_hand() -> None:
    # Kept per token and layer, in bf16: 2 norms' inputs and outputs, q and attention's output (8192 each), k and v
    # (1024 each), gate, up and their product (28672 each), and 64 heads' fp32 logsumexp.
    by_hand = 2 * (4 * 8192 + 2 * 8192 + 2 * 1024 + 3 * 28672) + 4 * 64
    strategy = Strategy(gpus=8, global_batch=8, micro_batch=1, seq=4096)
    assert layer_activations(LLAMA_70B, strategy) == 4096 * by_hand


@given(pp=st.sampled_from([2, 4, 8]), vpp=st.sampled_from([1, 2, 3]), groups=st.integers(1, 4))
def test_micro_batches_in_flight_are_what_the_schedule_holds(pp: int, vpp: int, groups: int) -> None:
    strategy = unfused(gpus=pp, global_batch=groups * pp, pp=pp, vpp=vpp)
    line = simulate([[1.0] * vpp] * pp, [[2.0] * vpp] * pp, groups * pp)
    for stage in range(pp):
        held = most = 0
        mine = [event for event in line.events if event.stage == stage]
        for event in sorted(mine, key=lambda event: event.begin):
            held += -1 if event.backward else 1
            most = max(most, held)
        assert in_flight(strategy, stage) == most


def test_megatron_interleaving_costs_what_korthikanti_says() -> None:
    """Section 4.2.3: the first stage of an interleaved schedule holds L (1 + (p - 1) / (p m)) layers."""
    strategy = unfused(gpus=64, tp=8, pp=8, vpp=3, recompute="selective")
    found = memory_of_stage(GPT_175B, strategy, 0).activations
    expected = 96 * (1 + 7 / (8 * 3)) * 2048 * 12288 * 34 / 8
    assert found == pytest.approx(expected)


def test_parameters_of_all_stages_are_the_model() -> None:
    for pp, vpp in ((1, 1), (4, 1), (8, 2)):
        strategy = Strategy(gpus=pp, global_batch=64, micro_batch=1, seq=4096, pp=pp, vpp=vpp)
        held = sum(parameters_of_stage(LLAMA_70B, strategy, stage) for stage in range(pp))
        assert held == LLAMA_70B.parameters == 68_976_648_192


def test_states_are_eighteen_bytes_and_are_sharded() -> None:
    whole = memory(LLAMA_70B, Strategy(gpus=8, global_batch=8, micro_batch=1, seq=4096, zero=0))
    states = whole.weights + whole.gradients + whole.optimizer
    assert states == 18 * LLAMA_70B.parameters  # 2 + 4 + 12: Megatron-LM's bytes per parameter
    zero1 = memory(LLAMA_70B, Strategy(gpus=8, global_batch=8, micro_batch=1, seq=4096))
    assert zero1.optimizer == 12 * LLAMA_70B.parameters / 8
    zero3 = memory(LLAMA_70B, Strategy(gpus=8, global_batch=8, micro_batch=1, seq=4096, zero=3))
    # FSDP2 updates its fp32 shards: weight, gradient, two moments.
    assert zero3.weights + zero3.gradients + zero3.optimizer == pytest.approx(16 * LLAMA_70B.parameters / 8)
    buckets = memory(LLAMA_70B, Strategy(gpus=8, global_batch=8, micro_batch=1, seq=4096, copied_grad_bytes=4))
    assert buckets.gradients - zero1.gradients == 4 * LLAMA_70B.parameters


def test_tied_matrix_is_on_both_ends_of_a_pipeline() -> None:
    strategy = unfused(gpus=4, pp=4)
    table = 51200 * 12288
    layers = 24 * GPT_175B.layer_parameters
    assert parameters_of_stage(GPT_175B, strategy, 0) == table + layers
    assert parameters_of_stage(GPT_175B, strategy, 3) == table + layers + 12288
    alone = parameters_of_stage(GPT_175B, unfused(gpus=1), 0)
    assert alone == table + 4 * layers + 12288


def test_layers_that_do_not_divide_and_given_ones() -> None:
    shape = Shape(7, 64, 4, 4, 256, 100)
    assert stage_layers(shape, unfused(gpus=2, pp=2)) == [[4], [3]]
    given_ones = unfused(gpus=2, pp=2, vpp=2, stage_layers=(1, 2, 3, 1))
    assert stage_layers(shape, given_ones) == [[1, 3], [2, 1]]


def test_context_parallelism_divides_activations() -> None:
    one = Strategy(gpus=8, global_batch=8, micro_batch=1, seq=8192)
    four = Strategy(gpus=8, global_batch=8, micro_batch=1, seq=8192, cp=4, cp_gathers=False)
    assert layer_activations(LLAMA_70B, four) == layer_activations(LLAMA_70B, one) / 4
    # Ours gathers the other ranks' keys and values (8 groups of 128), and keeps attention's output twice (64 heads).
    ours = layer_activations(LLAMA_70B, replace(four, cp_gathers=True)) - layer_activations(LLAMA_70B, four)
    assert ours == 2 * 128 * (2 * 8 * (8192 - 2048) + 64 * 2048)
    assert memory(LLAMA_70B, four).optimizer == memory(LLAMA_70B, one).optimizer


def test_fsdp_under_a_pipeline_keeps_whole_weights_and_gradients() -> None:
    """A stage holds its whole weights in bf16 and accumulated gradients in fp32, for one of two chunks at a time; and
    the logits of all 8 micro batches, which pipelining keeps for the caller."""
    fields = {"gpus": 16, "global_batch": 32, "micro_batch": 1, "seq": 4096, "pp": 4, "zero": 3}
    one, two = Strategy(**fields), Strategy(**fields, vpp=2)  # type: ignore[arg-type]
    for stage in range(4):
        held = parameters_of_stage(LLAMA_70B, one, stage)
        found = memory_of_stage(LLAMA_70B, one, stage)
        assert found.weights == held * (4 / 4 + 2)
        assert found.gradients == held * (4 / 4 + 4)
        chunks = memory_of_stage(LLAMA_70B, two, stage)
        assert chunks.gradients == parameters_of_stage(LLAMA_70B, two, stage) * (4 / 4 + 4 / 2)
    alone = memory_of_stage(LLAMA_70B, replace(one, global_batch=4), 3).logits
    assert memory_of_stage(LLAMA_70B, one, 3).logits - alone == 7 * 2 * 4096 * 32000


def test_memory_in_8b_runs_of_torchtitan_by_hand() -> None:
    """Its published run on 128 GPUs (61.8 to 62 GiB): selective operators, micro batch 2 of 8192."""
    shape = Shape(32, 4096, 32, 8, 14336, 128256)
    strategy = Strategy(
        gpus=128, global_batch=256, micro_batch=2, seq=8192, recompute="ops", zero=3, logit_bytes=12
    )  # fmt: skip
    found = memory(shape, strategy)
    tokens = 2 * 8192
    # Kept per layer: input, q, v, attention and its projection's input, gate, and the last product, in 2 bytes.
    by_hand = 32 * tokens * 2 * (4 * 4096 + 1024 + 14336)
    assert found.activations == pytest.approx(by_hand, rel=0.05)
    assert found.logits == tokens * (12 * 128256 + 12 * 4096)
    assert 0.97 < found.total / 2**30 / 62.0 < 1.03


def test_adapters_of_a_published_model() -> None:
    """Llama 3 8B with rank 16 on all projections has 41.9 M numbers in adapters (PEFT's print_trainable_parameters),
    and in 4 bits its layers take 4.5 bits a number; embedding and output stay in bf16."""
    from llm_parallel.config.presets import MODEL_PRESETS
    from llm_parallel.config.tree import ModelConfig
    from llm_parallel.config.tree_tune import AdapterConfig
    from llm_parallel.planner.adapters import layer_parameters
    from llm_parallel.planner.shapes import shape_of

    shape = shape_of(ModelConfig(**MODEL_PRESETS["llama3-8b"]))
    adapter = AdapterConfig(rank=16, base="nf4")
    strategy = Strategy(gpus=1, global_batch=1, micro_batch=1, seq=128, adapter=adapter)
    trained = 32 * layer_parameters(shape, strategy, adapter)
    assert trained == 41_943_040
    found = memory_of_stage(shape, strategy, 0)
    dense = 2 * 128256 * 4096 + 65 * 4096
    matrices = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    masks = 32 * (3 * (4096 + 2 * 1024) + 2 * 2 * 14336)  # a byte for each row and projection beside it
    assert found.weights == 2 * dense + matrices * 4.5 / 8 + 2 * trained + masks
    assert (found.gradients, found.optimizer) == (4 * trained, 12 * trained)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qkv_bias": True},
        {"attention_output_bias": True, "mlp_bias": True},
        {"qk_norm": True, "tie_embeddings": True},
        {"qk_norm_over_heads": True, "qkv_bias": True, "norm_outputs": True},
    ],
)
def test_weights_of_every_option_are_those_of_the_table_of_tensors(options: dict[str, Any]) -> None:
    model = ModelConfig(vocab_size=1000, num_layers=4, num_attention_heads=8, num_query_groups=4, **options)
    whole = sum(math.prod(split_name(name)[0].shape(model)) for name in all_names(model))
    assert shape_of(model).parameters == whole
    two = replace(Strategy(gpus=2, global_batch=1, micro_batch=1, seq=128), tp=2)
    halves = 0
    for name in all_names(model):
        kind, _ = split_name(name)
        halves += math.prod(kind.shape(model)) // (1 if kind.sharded_dim is None else 2)
    assert parameters_of_stage(shape_of(model), two, 0) == halves


@pytest.mark.parametrize(("window", "seq"), [(None, 64), (64, 64), (16, 64), (1000, 64), (33, 1024)])
def test_a_window_counts_the_pairs_that_its_mask_has(window: int | None, seq: int) -> None:
    model = ModelConfig(vocab_size=1000, window_tokens=window)
    shape = shape_of(model)
    pairs = sum(min(row + 1, window or seq) for row in range(seq))
    assert shape.seen(seq) == pytest.approx(pairs / seq**2, abs=0.5 / seq)
    assert shape.flops_per_token(seq, causal=True) == pytest.approx(flops_per_token(model, seq), rel=1e-6)
    cluster, strategy = load_cluster("dgx-h100"), Strategy(gpus=8, global_batch=8, micro_batch=1, seq=65536)
    wide = Shape(layers=2, hidden=4096, heads=32, groups=8, ffn=14336, vocab=32000)
    times = [step_time(one, strategy, cluster).total for one in (wide, replace(wide, window=4096))]
    assert times[1] < 0.6 * times[0]
