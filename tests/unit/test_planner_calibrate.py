"""Calibration: known rates, written into result files of the real formats, come out of them again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_parallel.bench.collectives import Sample
from llm_parallel.bench.comm import as_row, fits_of
from llm_parallel.config.presets import MODEL_PRESETS
from llm_parallel.config.tree import RunConfig
from llm_parallel.errors import UserError
from llm_parallel.planner.calibrate import calibrate_command, read_results
from llm_parallel.planner.hardware import load_cluster
from llm_parallel.planner.shapes import shape_of, strategy_of
from llm_parallel.planner.steptime import step_time

H100 = "NVIDIA H100 80GB HBM3"
SIZES = (8192, 2**20, 2**26, 2**30)


def save(path: Path, tree: dict[str, Any], chip: str = H100) -> str:
    where = {"chip": chip, "cores": 2, "date": "2026-11-23", "commit": "abc1234", "load_average_1_min": 0.1}
    path.write_text(json.dumps({"environment": where, "command": "llm-parallel bench", **tree}))
    return str(path)


def comm(path: Path, ranks: int, beside: int, times: Any, backend: str = "nccl", chip: str = H100) -> str:
    """A result of ``bench comm``; times: (operation, bytes) → seconds."""
    rows = [
        as_row(Sample(name, size, 3, [times(name, size)] * 3), ranks, backend)
        for name in ("all_reduce", "all_gather", "reduce_scatter", "send_recv")
        for size in SIZES
    ]
    return save(path, {"processes": ranks, "processes_per_machine": beside, "backend": backend,
                       "oversubscribed": None, "rows": rows, "fits": fits_of(rows)}, chip)  # fmt: skip


def ring(ranks: int, way_s: float, bytes_per_s: float) -> Any:
    """Results of rings of ``ranks`` with this latency around the whole ring."""

    def times(name: str, size: int) -> float:
        if name == "send_recv":
            return way_s / ranks + size / bytes_per_s
        rounds = 2 if name == "all_reduce" else 1
        return rounds * (way_s + (ranks - 1) / ranks * size / bytes_per_s)

    return times


def kernels(path: Path, product: float, copy: float, chip: str = H100) -> str:
    card = {"name": chip, "copy_bytes_per_s": copy, "matmul_flops_per_s": product}
    return save(path, {"card": card, "rows": []}, chip)


def step(path: Path, seconds: float, chip: str = H100, **changes: Any) -> str:
    rows = [{"operator": "train_step", "provider": "ours", "median_ms": 1e3 * seconds, "split_s": {}, **changes}]
    return save(path, {"mfu": {}, "config": gpu_config().model_dump(mode="json"), "rows": rows}, chip)


def gpu_config() -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {**MODEL_PRESETS["llama3-8b"], "num_layers": 4},
            "data": {"seq_length_tokens": 4096},
            "train": {"global_batch_size": 4, "micro_batch_size": 1, "precision": "bf16"},
        }
    )


def test_rates_of_links_come_out(tmp_path: Path) -> None:
    """8 GPUs at 300 GB/s and 2 us a message within a node; 4 nodes at 35 GB/s per GPU and 9 us between nodes."""
    far = 4 * 9e-6 + 28 * 2e-6
    files = [
        comm(tmp_path / "inter.json", 32, 8, ring(32, far, 8 * 35e9)),
        comm(tmp_path / "intra.json", 8, 8, ring(8, 7 * 2e-6, 300e9)),
    ]
    out = tmp_path / "mine.yaml"
    assert calibrate_command(files, None, str(out)) == 0
    found, sheet = load_cluster(str(out)), load_cluster("dgx-h100")
    assert found.nvlink_bytes_per_s * found.chip.constants.nvlink == pytest.approx(300e9, rel=1e-3)
    assert found.nvlink_latency_s == pytest.approx(2e-6, rel=1e-2)
    assert found.nic_bytes_per_s * found.chip.constants.nic == pytest.approx(35e9, rel=1e-3)
    assert found.nic_latency_s == pytest.approx(9e-6, rel=2e-2)
    assert (found.gpus_per_node, found.chip.peak_flops) == (8, sheet.chip.peak_flops)
    assert found.chip.constants.gemm == sheet.chip.constants.gemm
    text = out.read_text()
    assert "inter.json, 2026-11-23, commit abc1234" in text and "  # from dgx-h100" in text


@settings(max_examples=10, deadline=None)
@given(st.floats(0.5, 1.05), st.floats(0.4, 0.9), st.floats(0.5, 0.95))
def test_a_step_scales_what_the_card_reached(
    tmp_path_factory: pytest.TempPathFactory, factor: float, product: float, copy: float
) -> None:
    """A GPU with known shares of its peaks, of which training reaches a known part."""
    folder = tmp_path_factory.mktemp("calibrate")
    sheet = load_cluster("dgx-h100")
    known = sheet.chip.constants
    true = replace(
        known, gemm=factor * product, gemm_te=factor * product, memory=factor * copy, flash=factor * known.flash,
        flash_te=factor * known.flash_te, gemm_fp8=factor * known.gemm_fp8,
    )  # fmt: skip
    config = gpu_config()
    machine = replace(sheet, chip=replace(sheet.chip, constants=true))
    seconds = step_time(shape_of(config.model), strategy_of(config, 1), machine).total
    files = [
        kernels(folder / "card.json", product * sheet.chip.peak_flops, copy * sheet.chip.memory_bytes_per_s),
        step(folder / "step.json", seconds),
    ]
    assert calibrate_command(files, None, str(folder / "mine.yaml")) == 0
    found = load_cluster(str(folder / "mine.yaml")).chip.constants
    for name in ("gemm", "memory", "flash", "flash_te"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=1e-3), name
    assert found.jitter == known.jitter


def test_what_cannot_calibrate_is_refused(tmp_path: Path) -> None:
    out = str(tmp_path / "mine.yaml")
    good = kernels(tmp_path / "card.json", 7e14, 3e12)
    other = kernels(tmp_path / "a100.json", 2e14, 1.7e12, "NVIDIA A100-SXM4-80GB")
    (tmp_path / "text.json").write_text("text")
    (tmp_path / "list.json").write_text("[1]")
    bare = save(tmp_path / "bare.json", {"card": {"name": H100}})
    gloo = comm(tmp_path / "gloo.json", 8, 8, ring(8, 1e-5, 1e9), backend="gloo")
    ragged = comm(tmp_path / "ragged.json", 9, 8, ring(9, 1e-5, 1e9))
    cases = [
        ([str(tmp_path / "none.json")], None, "cannot be read"),
        ([str(tmp_path / "text.json")], None, "is not JSON"),
        ([str(tmp_path / "list.json")], None, "is no result of bench comm"),
        ([good, other], None, "the results are of NVIDIA A100-SXM4-80GB and of NVIDIA H100"),
        ([bare], None, "lacks card.matmul_flops_per_s"),
        ([gloo], None, "measured over gloo"),
        ([ragged], None, "no whole number of machines of 8"),
        ([good], "dgx-a100", "has A100-SXM-80GB, but the results are of NVIDIA H100"),
        ([kernels(tmp_path / "fast.json", 7e15, 3e12)], None, "are not of H100-SXM"),
        ([kernels(tmp_path / "mig.json", 1e14, 1e12, H100 + " MIG 1g.10gb")], None, "is a slice of a GPU"),
        ([kernels(tmp_path / "tpu.json", 1e14, 1e12, "TPU")], None, "no data sheet of TPU"),
        ([step(tmp_path / "slow.json", 1e-9)], None, "cannot be this model's"),
        ([step(tmp_path / "failed.json", 1, median_ms=None)], None, "has no time of provider ours"),
    ]
    for files, cluster, message in cases:
        with pytest.raises(UserError, match=message):
            calibrate_command(files, cluster, out)
        assert not Path(out).exists()
    with pytest.raises(UserError, match="must end in"):
        calibrate_command([good], None, str(tmp_path / "mine.txt"))


def test_the_description_is_a_complete_one(tmp_path: Path) -> None:
    """Every field of the template is there."""
    out = tmp_path / "mine.yaml"
    calibrate_command([kernels(tmp_path / "card.json", 7e14, 3e12)], None, str(out))
    template = yaml.safe_load((Path(__file__).parents[2] / "llm_parallel/planner/data/template.yaml").read_text())
    found = yaml.safe_load(out.read_text())
    assert set(template) <= set(found) and set(template["chip"]) <= set(found["chip"])
    assert read_results([str(tmp_path / "card.json")])[0].kind == "kernels"
