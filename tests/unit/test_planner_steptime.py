"""Step time without fitted constants: parts add up, limits hold, and trends have the right sign."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_parallel.planner.hardware import Constants, load_cluster
from llm_parallel.planner.shapes import Shape, Strategy
from llm_parallel.planner.steptime import Model, step_time

LLAMA_8B = Shape(32, 4096, 32, 8, 14336, 128256)
LLAMA_70B = Shape(80, 8192, 64, 8, 28672, 32000)
H100 = load_cluster("dgx-h100")
ONE = Strategy(gpus=8, global_batch=64, micro_batch=1, seq=8192, tp=8, flash=True)
PERFECT = Constants(
    gemm=1.0, gemm_te=1.0, gemm_fp8=1.0, flash=1.0, flash_te=1.0, memory=1.0, nvlink=1.0, nic=1.0, tp_hidden=1.0,
    dp_hidden=1.0, layer_us=0.0, jitter=0.0,
)  # fmt: skip
LAYOUTS = st.builds(
    lambda tp, pp, micro, recompute, batches: Strategy(
        gpus=8 * tp * pp, global_batch=8 * micro * pp * batches, micro_batch=micro, seq=4096, tp=tp, pp=pp,
        recompute=recompute, sequence_parallel=tp > 1,
    ),
    st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4]),
    st.sampled_from(["none", "full"]), st.integers(1, 6),
)  # fmt: skip


def utilisation(shape: Shape, strategy: Strategy) -> float:
    """Share of the peak, attention counted causally."""
    flops = shape.flops_per_token(strategy.seq, causal=True) * strategy.global_batch * strategy.seq
    return flops / step_time(shape, strategy, H100).total / strategy.gpus / H100.chip.peak_flops


@settings(max_examples=60, deadline=None)
@given(LAYOUTS)
def test_parts_add_up_and_no_layout_beats_the_peak(strategy: Strategy) -> None:
    found = step_time(LLAMA_70B, strategy, H100)
    assert found.total == pytest.approx(sum(found.parts().values()))
    assert min(found.parts().values()) >= 0.0
    assert 0.01 < utilisation(LLAMA_70B, strategy) < H100.chip.constants.gemm


@settings(max_examples=60, deadline=None)
@given(LAYOUTS)
def test_closed_bubble_agrees_with_the_simulation(strategy: Strategy) -> None:
    """The closed form that the search uses is within a few per cent of the simulation of the same step."""
    model = Model(LLAMA_70B, strategy, H100)
    found = model.step()
    pipeline = found.compute + found.elementwise + found.recompute + found.tp + found.cp + found.host + found.bubble
    assert model.timeline().makespan == pytest.approx(pipeline + found.pp, rel=0.04)


def test_compute_is_flops_over_the_peak_of_a_perfect_chip() -> None:
    """With ideal constants a layer's matrix products take FLOPs / peak, except for the tile that is not full."""
    cluster = replace(H100, chip=replace(H100.chip, constants=PERFECT))
    strategy = Strategy(gpus=1, global_batch=1, micro_batch=1, seq=65536)
    ideal = LLAMA_8B.flops_per_token(65536, causal=True) * 65536 / H100.chip.peak_flops
    found = step_time(LLAMA_8B, strategy, cluster).compute
    # Flash attention's backward takes 2.5 / 0.8 instead of 2 forwards, and attention is half of the FLOPs here.
    assert ideal < found < 1.3 * ideal


def test_eight_bits_are_faster_but_not_twice() -> None:
    sixteen = step_time(LLAMA_70B, ONE, H100).total
    eight = step_time(LLAMA_70B, replace(ONE, precision="fp8"), H100).total
    assert 1.1 < sixteen / eight < 2.0


def test_full_recomputation_costs_up_to_a_forward() -> None:
    without = step_time(LLAMA_70B, ONE, H100).total
    full = step_time(LLAMA_70B, replace(ONE, recompute="full"), H100).total
    assert 1.2 < full / without < 1.4  # forward is a third of forward and backward, and dearer in communication


def test_tensor_parallelism_over_nodes_is_slower() -> None:
    within = step_time(LLAMA_70B, replace(ONE, gpus=16, tp=8), H100)
    across = step_time(LLAMA_70B, replace(ONE, gpus=16, tp=16), H100)
    assert across.tp / 64 > 1.1 * within.tp / 32  # one micro batch's; eight NICs together are nearly as fast as NVLink


def test_bubble_is_the_closed_forms() -> None:
    """Equal stages (no output): (p - 1) / (m v) of the busy time, less the constant parts of a step."""
    shape = replace(LLAMA_70B, vocab=1)
    for vpp in (1, 5):
        strategy = Strategy(gpus=32, global_batch=32, micro_batch=1, seq=4096, tp=8, pp=4, vpp=vpp)
        found = step_time(shape, strategy, H100)
        busy = found.compute + found.elementwise + found.tp + found.host
        assert found.bubble / busy == pytest.approx(3 / (32 * vpp), rel=0.1)


def test_interleaving_and_more_micro_batches_shrink_the_bubble() -> None:
    base = Strategy(gpus=64, global_batch=64, micro_batch=1, seq=4096, tp=8, pp=8)
    plain = step_time(LLAMA_70B, base, H100)
    assert step_time(LLAMA_70B, replace(base, vpp=5), H100).bubble < plain.bubble / 2
    more = step_time(LLAMA_70B, replace(base, global_batch=128), H100)
    assert more.bubble == pytest.approx(plain.bubble)
    assert more.total < 2 * plain.total


def test_a_slower_network_never_helps() -> None:
    slow = replace(H100, nic_bytes_per_s=H100.nic_bytes_per_s / 8)
    strategy = Strategy(gpus=512, global_batch=512, micro_batch=1, seq=4096, tp=8, pp=4)
    assert step_time(LLAMA_70B, strategy, slow).total > step_time(LLAMA_70B, strategy, H100).total


def test_zero_three_gathers_every_micro_batch() -> None:
    sharded = replace(ONE, tp=1, gpus=64, global_batch=64, zero=3)
    twice = replace(sharded, global_batch=128)
    one, two = step_time(LLAMA_70B, sharded, H100), step_time(LLAMA_70B, twice, H100)
    assert two.dp == pytest.approx(2 * one.dp, rel=0.05)


def test_products_are_arithmetic_and_traffic_by_hand() -> None:
    """One layer of GPT 175B on TP 8, 2048 tokens: 2 m n k FLOPs and 2 (m k + k n + m n) bytes of four products."""
    gpt = Shape(96, 12288, 96, 96, 49152, 51200, gated=False, dropout=True, rotary=False)
    perfect = replace(H100, chip=replace(H100.chip, constants=PERFECT))
    model = Model(gpt, Strategy(gpus=8, global_batch=8, micro_batch=1, seq=2048, tp=8), perfect)
    matrices = [(12288, 4608), (1536, 12288), (12288, 6144), (6144, 12288)]
    flops = sum(2 * 2048 * a * b for a, b in matrices)
    traffic = sum(2 * (2048 * a + a * b + 2048 * b) for a, b in matrices)
    by_hand = flops / H100.chip.peak_flops + traffic / H100.chip.memory_bytes_per_s
    assert model._products(model._matrices().values()) == pytest.approx(by_hand)


def test_recomputation_stops_where_backward_reads_no_more() -> None:
    full = Strategy(gpus=8, global_batch=8, micro_batch=1, seq=4096, recompute="full")
    model = Model(LLAMA_70B, full, H100)
    assert model.again() == model.layer(False)
    down = model._products([model._matrices()["down"]])
    early = Model(LLAMA_70B, replace(full, early_stop=True), H100).again()
    assert early.compute == pytest.approx(model.again().compute - down)
    kept = Model(LLAMA_70B, replace(full, early_stop=True, recompute="qkv"), H100).again()
    assert kept.compute == pytest.approx(early.compute - model._products([model._matrices()["qkv"]]))


def test_a_ring_over_many_ranks_is_as_late_as_its_hops() -> None:
    """No bytes: 128 ranks, four of them beside one another on a node, are 32 hops over NICs and 96 over NVLink."""
    model = Model(LLAMA_70B, ONE, H100)
    hops = 32 * H100.nic_latency_s + 96 * H100.nvlink_latency_s
    assert model._collective(0.0, 128, 2, count=3) == pytest.approx(3 * hops)


def test_without_prefetching_one_gather_of_three_is_waited_for() -> None:
    """FSDP on two nodes, where compute is long enough to hide all that may be hidden: the backward's gathers of 32
    layers' weights in 16 bits, by hand. 15 of 16 parts come over all NICs, after 2 hops between nodes and 14 within."""
    cluster = replace(H100, chip=replace(H100.chip, constants=PERFECT))
    strategy = Strategy(gpus=16, global_batch=64, micro_batch=2, seq=8192, zero=3)
    hidden = step_time(LLAMA_8B, strategy, cluster)
    late = step_time(LLAMA_8B, replace(strategy, prefetches=False), cluster)
    layer = 4096 * 128 * (2 * 32 + 2 * 8) + 3 * 4096 * 14336 + 2 * 4096
    gather = 15 / 16 * 2 * 32 * layer / (8 * 50e9) + 32 * (2 * 10e-6 + 14 * 3e-6)
    assert hidden.dp == pytest.approx(0.0, abs=1e-12)
    assert late.dp == pytest.approx(2 * gather)  # of two micro batches
