"""What a published row leaves blank, and what is known of its software: synthetic rows whose truth is known because the
planner's own model made them under stated settings, and rows that contradict themselves."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from llm_parallel.planner.hardware import load_cluster
from llm_parallel.planner.memory import memory_of_stage
from llm_parallel.planner.published.fit import predict, prediction
from llm_parallel.planner.published.rows import Row, read_rows
from llm_parallel.planner.published.sources import source_named
from llm_parallel.planner.shapes import Shape, Strategy
from llm_parallel.planner.steptime import Model, step_time
from tests.unit.test_published_rows import LLAMA_8B, only, write

H100 = load_cluster("dgx-h100")
LLAMA_405B = LLAMA_8B | {
    "model": "Llama 3 405B", "layers": "126", "hidden": "16384", "heads": "128", "ffn": "53248", "gpus": "8192",
    "tp": "8", "pp": "16", "global_batch": "2048", "n_params_b": "405.9", "step_time_s": "20",
    "source": "a cluster with Megatron-Core", "recompute": "none",
}  # fmt: skip


def read(folder: Path, **changes: str) -> Row:
    return only(write(folder, LLAMA_8B | {"step_time_s": "12", "recompute": "none"} | changes, columns=_columns()))


def _columns() -> tuple[str, ...]:
    from llm_parallel.planner.published.rows import COLUMNS as NEEDED

    return tuple(dict.fromkeys((*NEEDED, "n_params_b")))


def refused(folder: Path, **changes: str) -> str:
    rows, found = read_rows(write(folder, LLAMA_8B | {"step_time_s": "12"} | changes, columns=_columns()))
    assert not rows
    return found[0].reason


def test_blank_model_chunks_of_a_pipeline_are_not_one(tmp_path: Path) -> None:
    """126 layers on 16 stages run with 8 chunks a stage, of which two have no layer (Llama 3's own layout)."""
    row = only(write(tmp_path, LLAMA_405B, columns=_columns()))
    assert "vpp" in row.unknown
    found = prediction(row, H100)
    times = {vpp: step_time(row.shape, replace(row.strategy, vpp=vpp, overlap_pp=True), H100).total for vpp in (7, 8)}
    assert found.counted <= min(times.values()) * (1 + 1e-9)
    assert found.most >= step_time(row.shape, replace(row.strategy, vpp=1), H100).total * (1 - 1e-9)
    assert found.least <= found.counted <= found.most
    stated = only(write(tmp_path, LLAMA_405B | {"vpp": "8"}, columns=_columns()))
    assert stated.strategy.vpp == 8 and "vpp" not in stated.unknown
    assert predict(stated, H100) == pytest.approx(step_time(stated.shape, stated.strategy, H100).total)


def test_layers_that_no_chunks_hold_are_refused(tmp_path: Path) -> None:
    assert "30 layers on PP 4 x VPP 16" in refused(tmp_path, layers="30", pp="4", vpp="16", gpus="32")


def test_the_middle_of_what_software_may_do_counts(tmp_path: Path) -> None:
    """With an unknown program at TP 8, sequence parallelism and overlap are open, and neither is given to it."""
    row = read(tmp_path, tp="8", gpus="64")
    assert row.unknown == ("sequence_parallel", "overlap_tp") and row.software == "not stated"
    times = [
        step_time(row.shape, replace(row.strategy, sequence_parallel=sequence, overlap_tp=overlap), H100).total
        for sequence in (False, True)
        for overlap in (False, True)
    ]
    found = prediction(row, H100)
    assert (found.least, found.most) == pytest.approx((min(times), max(times)))
    assert sorted(times)[1] <= found.counted <= sorted(times)[2]


def test_recomputation_that_is_not_stated_is_what_fits(tmp_path: Path) -> None:
    """70 billion parameters on eight GPUs of 64 fit only if everything is recomputed."""
    large = {"layers": "80", "hidden": "8192", "heads": "64", "ffn": "28672", "gpus": "64", "tp": "8", "seq": "32768"}
    row = read(tmp_path, **large, micro_batch="1", recompute="", source="a run with NeMo", step_time_s="90")
    assert "recompute" in row.unknown
    full = step_time(row.shape, replace(row.strategy, recompute="full"), H100).total
    assert prediction(row, H100).most == pytest.approx(full, rel=0.3)
    small = read(tmp_path, recompute="", source="a run with NeMo", seq="2048")
    none = step_time(small.shape, replace(small.strategy, recompute="none"), H100).total
    assert prediction(small, H100).least == pytest.approx(none)


@pytest.mark.parametrize("model", ["Mistral 7B", "Qwen3 8B", "our 8B", "Llama 3 8B"])
def test_the_number_of_parameters_decides_whether_there_is_a_gate(model: str, tmp_path: Path) -> None:
    row = read(tmp_path, model=model, n_params_b="8.03")
    assert row.shape.gated and row.shape.rotary and not row.shape.tied
    assert row.shape.parameters == pytest.approx(8.03e9, rel=0.001)
    plain = read(tmp_path, model=model, n_params_b="6.15")
    assert not plain.shape.gated, "two matrices instead of three are 1.88 billion less"


def test_heads_of_keys_that_are_not_stated_follow_from_the_parameters(tmp_path: Path) -> None:
    assert read(tmp_path, n_params_b="8.03", kv_heads="").shape.groups == 8


def test_parameters_that_contradict_the_dimensions_are_refused(tmp_path: Path) -> None:
    assert re.match("n_params_b is 13, and 32 layers of 4096", refused(tmp_path, n_params_b="13"))


def test_software_is_known_by_its_name(tmp_path: Path) -> None:
    assert source_named("our cluster", "Llama 8B NeMo 25.04").te
    assert not source_named("our cluster", "Llama 8B").sequence_parallel
    assert not source_named("our cluster", "Megatron-LM with local kernels").te
    assert read(tmp_path, note="FSDP2 of torchtitan").strategy.zero == 3


def test_attention_has_the_rate_of_its_implementation() -> None:
    """Triton's kernels of 2023 are slower than FlashAttention 2 by the ratio of that paper; Transformer Engine is
    faster."""
    shape = Shape(32, 4096, 32, 8, 14336, 128256)
    plain = Strategy(gpus=8, global_batch=8, micro_batch=1, seq=131072)
    open_, old = (Model(shape, replace(plain, flash_rate=rate), H100)._attention(False)[0] for rate in (1.0, 0.55))
    te = Model(shape, replace(plain, te=True), H100)._attention(False)[0]
    assert old == pytest.approx(open_ / 0.55) and te < open_
    assert H100.chip.constants.flash == pytest.approx(0.35, abs=0.03), "FlashAttention 2 on an H100, arXiv 2407.08608"


def test_selective_recomputation_calls_fused_attention_again() -> None:
    shape = Shape(32, 4096, 32, 8, 14336, 128256)
    plain = Strategy(gpus=8, global_batch=8, micro_batch=1, seq=8192)
    forward = Model(shape, plain, H100)._attention(False)[0]
    again = Model(shape, replace(plain, recompute="selective"), H100).again()
    assert again.compute == pytest.approx(forward)


def test_inputs_that_were_gathered_take_memory_where_they_are_kept() -> None:
    shape = Shape(32, 4096, 32, 8, 14336, 128256)
    plain = Strategy(gpus=8, global_batch=8, micro_batch=1, seq=8192, tp=8)
    kept = replace(plain, keeps_gathered=True)
    more = memory_of_stage(shape, kept, 0).activations - memory_of_stage(shape, plain, 0).activations
    assert more == pytest.approx(32 * 2 * 2 * 8192 * 4096 * 7 / 8), (
        "two inputs a layer in 16 bits, seven eighths of each"
    )


BAD_ROWS = [
    ({"step_time_s": "", "mfu_pct": "0.41"}, "mfu_pct is 0.41, a share; give percent, as 41"),
    ({"step_time_s": "", "mfu_pct": "410"}, "mfu_pct is 410, which is .* times the chip's peak; its unit is percent"),
    ({"step_time_s": "", "tflops_per_gpu": "4e14"}, "tflops_per_gpu is 4e14, .* its unit is TFLOP/s of one GPU"),
    ({"step_time_s": "", "tokens_per_s_per_gpu": "160000"}, "_gpu is 160000, .* of one GPU, not of all"),
    ({"step_time_s": "0.01"}, "step_time_s is 0.01, .* its unit is seconds"),
    ({"step_time_s": "12", "tokens_per_s_per_gpu": "5000"}, "5000 and step_time_s 12 contradict each other"),
    ({"step_time_s": "40", "mfu_pct": "60"}, "contradict each other"),
    ({"step_time_s": ""}, "no figure of throughput"),
    ({"step_time_s": "-3"}, "step_time_s is -3, which must be over 0"),
    ({"step_time_s": "nan"}, "step_time_s is nan, which must be over 0"),
    ({"step_time_s": "twelve"}, "step_time_s is 'twelve', no number"),
    ({"global_batch": "4"}, "global_batch 4 is smaller than 8 replicas"),
    ({"tp": "3", "gpus": "24"}, "32 heads do not divide by TP 3"),
    ({"tp": "16"}, "8 GPUs are no multiple of TP 16"),
    ({"chip": "H100 PCIe"}, "chip H100 PCIe is another than the SXM one"),
    ({"chip": "H100 NVL"}, "chip H100 NVL is another"),
    ({"chip": "A100", "precision": "fp8"}, "an A100 has no 8-bit"),
    ({"chip": "MI300X"}, "chip MI300X is none of A100, H100 and H200"),
    ({"chip": ""}, "chip not stated is none of"),
    ({"layers": ""}, "layers is not stated"),
    ({"layers": "32.5"}, "layers is '32.5', no whole number"),
    ({"heads": "8192"}, "are no model"),
    ({"seq": "0"}, "seq is 0, which must be over 0"),
    ({"model": "Mixtral 8x7B"}, "mixture of experts"),
    ({"model": "Llama 3 8B LoRA"}, "fine-tuning"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), BAD_ROWS, ids=[said[:40] for _, said in BAD_ROWS])
def test_a_row_that_cannot_be_right_is_named_and_not_counted(
    changes: dict[str, str], said: str, tmp_path: Path
) -> None:
    assert re.search(said, refused(tmp_path, **changes)), refused(tmp_path, **changes)
