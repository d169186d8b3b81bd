"""Derived values against hand arithmetic, and device names against their data sheets."""

from __future__ import annotations

import math

import pytest

from llm_parallel.metrics.peaks import find_peak
from llm_parallel.metrics.record import Basis, EvalRecord, StepMeasurement, derive, scalars

MEASURED = StepMeasurement(
    step=40,
    consumed_samples=40 * 512,
    global_batch_size=512,
    loss=2.5,
    grad_norm=0.7,
    lr=3e-4,
    step_time_s=4.0,
    data_time_s=0.1,
    forward_backward_time_s=3.0,
    optimizer_time_s=0.5,
    memory_allocated_gib=30.0,
    memory_reserved_gib=40.0,
)
BASIS = Basis(world_size=64, seq_length=4096, flops_per_token=10**11, peak_tflops=989.4, total_steps=100)


def test_rates_of_a_step() -> None:
    record = derive(MEASURED, BASIS)
    assert record.consumed_tokens == 40 * 512 * 4096
    assert record.tokens_per_s == 512 * 4096 / 4.0
    assert record.tokens_per_s_per_gpu == 8192.0
    assert record.tflops_per_gpu == pytest.approx(819.2)  # 8192 tokens/s of 0.1 TFLOP each.
    assert record.mfu == pytest.approx(819.2 / 989.4)
    assert record.eta_s == 60 * 4.0
    assert not record.skipped


def test_one_slow_step_does_not_move_the_estimate() -> None:
    assert derive(MEASURED, BASIS, [1.0, 1.0, 50.0]).eta_s == 60 * 1.0


def test_last_step_leaves_nothing_to_wait_for() -> None:
    done = Basis(world_size=1, seq_length=1, flops_per_token=1, peak_tflops=None, total_steps=40)
    assert derive(MEASURED, done).eta_s == 0.0


def test_names_of_a_step() -> None:
    names = set(scalars(derive(MEASURED, BASIS)))
    assert {
        *("train/loss", "train/grad_norm", "train/lr", "train/tokens", "train/samples", "train/global_batch_size"),
        *("train/skipped", "perf/tokens_per_s", "perf/tokens_per_s_per_gpu", "perf/tflops", "perf/mfu"),
        *("perf/step_time", "perf/data_time", "perf/forward_backward_time", "perf/optimizer_time"),
        *("memory/allocated_gib", "memory/reserved_gib", "time/eta_s"),
    } <= names
    assert "perf/communication_time" not in names, "an unknown time is left out, not zero"


def test_unknown_peak_gives_no_mfu() -> None:
    basis = Basis(world_size=1, seq_length=8, flops_per_token=10, peak_tflops=None, total_steps=50)
    record = derive(MEASURED, basis)
    assert record.mfu is None
    assert "perf/mfu" not in scalars(record)


def test_skipped_step_is_counted_as_a_number() -> None:
    measured = StepMeasurement(**{**MEASURED.__dict__, "loss": math.nan, "skip_reason": "loss is NaN"})
    values = scalars(derive(measured, BASIS))
    assert type(values["train/skipped"]) is int
    assert values["train/skipped"] == 1
    assert math.isnan(values["train/loss"])


def test_perplexity() -> None:
    assert EvalRecord.from_loss(1, math.log(50.0), 1, 1).perplexity == pytest.approx(50.0)
    assert EvalRecord.from_loss(1, 1e4, 1, 1).perplexity == math.inf
    assert math.isnan(EvalRecord.from_loss(1, math.nan, 1, 1).perplexity)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("A100-PCIE-40GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H20", 148.0),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L40", 181.05),
        ("NVIDIA L4", 121.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA RTX A6000", 154.8),
        ("Tesla V100-SXM2-32GB", 125.0),
        ("Tesla V100-PCIE-16GB", 112.0),
        ("Tesla T4", 65.0),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_peak_by_device_name(name: str, tflops: float) -> None:
    peak = find_peak(name)
    assert peak.tflops == tflops
    assert name in peak.describe(), "the peak that MFU divides by is named"
    assert "dense" in peak.describe()


@pytest.mark.parametrize(
    "name", ["CPU", "NVIDIA A10G", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A1000", "GeForce GTX 1080"]
)
def test_unknown_device_has_no_peak(name: str) -> None:
    peak = find_peak(name)
    assert peak.tflops is None
    assert peak.describe().startswith("n/a")
    assert "log.peak_tflops" in peak.describe()


def test_given_peak_wins() -> None:
    assert find_peak("NVIDIA A100-SXM4-80GB", 271.2).tflops == 271.2
    assert find_peak("CPU", 0.1).describe() == "peak 0.1 TFLOP/s, log.peak_tflops"
