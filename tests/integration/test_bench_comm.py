"""bench comm: definitions against those of nccl-tests and numpy, results of real gloo ranks, and the command with a
baseline."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_launch.worker import WorkerEnv
from llm_parallel.bench.collectives import OPERATIONS, Call, Sample, measure, whole_size
from llm_parallel.bench.comm import as_row, bus_factor, comm_command, fit_line, parse_sizes, report
from llm_parallel.bench.environment import crowded, environment
from llm_parallel.bench.requests import CommRequest
from llm_parallel.errors import UserError
from tests.support.commands import llm_parallel
from tests.support.harness import run_ranks


@pytest.mark.parametrize(
    ("operation", "factors"),
    [  # 2, 4 and 8 ranks, worked out from doc/PERFORMANCE.md of nccl-tests
        ("all_reduce", (1.0, 1.5, 1.75)),
        ("all_gather", (0.5, 0.75, 0.875)),
        ("reduce_scatter", (0.5, 0.75, 0.875)),
        ("all_to_all", (0.5, 0.75, 0.875)),
        ("broadcast", (1.0, 1.0, 1.0)),
        ("send_recv", (1.0, 1.0, 1.0)),
    ],
)
def test_bus_factors_are_those_of_nccl_tests(operation: str, factors: tuple[float, ...]) -> None:
    assert tuple(bus_factor(operation, ranks) for ranks in (2, 4, 8)) == factors


@given(latency=st.floats(1e-6, 1e-2), rate=st.floats(1e7, 1e12))
def test_fit_finds_the_line_that_made_the_times(latency: float, rate: float) -> None:
    sizes = [2.0**power for power in range(10, 31, 2)]
    fit = fit_line(sizes, [latency + size / rate for size in sizes])
    assert fit is not None and fit.mean_error < 1e-6
    assert fit.bytes_per_s == pytest.approx(rate, rel=1e-4)
    assert fit.latency_s == pytest.approx(latency, rel=1e-4)


@given(st.lists(st.floats(0.5, 2.0), min_size=6, max_size=6))
def test_fit_is_numpys_weighted_least_squares(noise: list[float]) -> None:
    sizes = np.array([2.0**power for power in (13, 16, 19, 22, 25, 28)])
    seconds = (3e-4 + sizes / 2e9) * np.array(noise)
    fit = fit_line(sizes.tolist(), seconds.tolist())
    design = np.stack([1 / seconds, sizes / seconds], 1)
    (latency, per_byte), *_ = np.linalg.lstsq(design / [1, 1e9], np.ones(6), rcond=None)
    assert fit is not None
    if latency > 0 and per_byte > 0:
        assert fit.latency_s == pytest.approx(latency, rel=1e-6)
        assert fit.bytes_per_s == pytest.approx(1e9 / per_byte, rel=1e-6)
    assert fit.latency_s >= 0 and fit.bytes_per_s > 0


def test_fit_needs_two_sizes() -> None:
    assert fit_line([8.0, 8.0], [1.0, 1.1]) is None


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("8", [8]),
        ("1M,8K", [8192, 2**20]),
        ("8K:1M:4", [8192, 32768, 131072, 524288]),
        ("4KiB:16kb:2,1G", [4096, 8192, 16384, 2**30]),
    ],
)
def test_sizes(text: str, sizes: list[int]) -> None:
    assert parse_sizes(text) == sizes


@pytest.mark.parametrize("text", ["", "8X", "0", "8K:1M", "1M:8K:2", "8K:1M:1", "-8", "1.5M"])
def test_bad_sizes_are_named(text: str) -> None:
    with pytest.raises(UserError, match="--sizes"):
        parse_sizes(text)


@pytest.mark.parametrize(("size", "ranks", "whole"), [(1, 3, 12), (8192, 3, 8184), (8192, 4, 8192), (24, 2, 24)])
def test_sizes_are_shared_out_evenly(size: int, ranks: int, whole: int) -> None:
    assert whole_size(size, ranks) == whole


def _measured(rank: int, ranks: int) -> list[tuple[str, int, int]]:
    import torch

    plan = {"operations": OPERATIONS, "sizes_bytes": [1, 3000, 100_000], "rounds": 2, "sample_s": 1e-4}
    samples = measure(plan, torch.device("cpu"))
    assert all(seconds > 0 for sample in samples for seconds in sample.seconds)
    return [(sample.operation, sample.size_bytes, len(sample.seconds)) for sample in samples]


@pytest.mark.gloo
@pytest.mark.parametrize("ranks", [2, 3])
def test_every_operation_gives_the_right_result_on_gloo(ranks: int) -> None:
    """measure() raises if an element is wrong; the sizes do not divide evenly and begin with one byte."""
    per_rank = run_ranks(_measured, ranks)
    assert per_rank[0] == per_rank[-1]
    sizes = [4 * ranks, 3000 // (4 * ranks) * 4 * ranks, 100_000 // (4 * ranks) * 4 * ranks]
    assert per_rank[0] == [(operation, size, 2) for operation in OPERATIONS for size in sizes]


def _wrong_without_doing(rank: int, ranks: int) -> dict[str, tuple[int, int]]:
    import torch

    found = {}
    for operation in OPERATIONS:
        call = Call(operation, 4096, torch.device("cpu"))
        right = call.wrong()
        call.run = lambda: None  # type: ignore[method-assign]
        found[operation] = (right, call.wrong())
    return found


@pytest.mark.gloo
def test_a_lazy_collective_is_found_wrong() -> None:
    first, second = run_ranks(_wrong_without_doing, 2)
    for operation in OPERATIONS:
        assert first[operation][0] == second[operation][0] == 0
        assert first[operation][1] + second[operation][1] > 0, operation


@pytest.mark.gloo
def test_the_command_writes_and_gates(tmp_path: Path) -> None:
    """A run passes against times of 1,000 s, and fails against its own times divided by a thousand."""
    options = ["--processes", "2", "--ops", "all_reduce,send_recv", "--sizes", "8K,1M", "--rounds", "3"]
    samples = [Sample(name, size, 1, [1e3]) for name in ("all_reduce", "send_recv") for size in (8192, 2**20)]
    slow = {"environment": environment(), "rows": [as_row(sample, 2, "gloo") for sample in samples]}
    (tmp_path / "slower").write_text(json.dumps(slow))
    first = llm_parallel("bench", "comm", *options, "--out", tmp_path / "first", "--baseline", tmp_path / "slower")
    assert first.returncode == 0 and "SLOWER" not in first.stdout, first.stderr
    assert "4 rows held against" in first.stdout
    assert "| all_reduce | 8,192 |" in first.stdout and "2 processes" in first.stdout
    result = json.loads((tmp_path / "first.json").read_text())
    # On a busy machine a larger message may take less time, and then there is no line through the two.
    assert first.stdout.count("µs + bytes") == len(result["fits"])
    assert [row["size_bytes"] for row in result["rows"]] == [8192, 2**20, 8192, 2**20]
    for row in result["rows"]:
        assert row["algbw_gb_per_s"] == pytest.approx(row["size_bytes"] / row["median_ms"] / 1e6)
        assert row["min_ms"] <= row["median_ms"] <= row["max_ms"] and row["rounds"] == 3
    with (tmp_path / "first.csv").open() as handle:
        assert len(list(csv.DictReader(handle))) == 4
    fast = {**result, "rows": [{**row, "median_ms": row["median_ms"] * 1e-3} for row in result["rows"]]}
    (tmp_path / "faster").write_text(json.dumps(fast))
    again = llm_parallel("bench", "comm", *options, "--baseline", tmp_path / "faster")
    assert again.returncode == 1, again.stdout + again.stderr
    assert again.stdout.count("SLOWER") == 4


@pytest.mark.parametrize(("load", "busy"), [(0.1, False), (0.4, False), (2.6, True), (30.0, True)])
def test_a_busy_machine_makes_the_figures_meaningless(
    load: float, busy: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Two processes on four cores leave room for two, so a load of 2.4 from others changes nothing."""
    monkeypatch.setattr("llm_parallel.bench.comm.available_cores", lambda: 4)
    samples = [Sample("all_reduce", size, 1, [1e-3, 1.1e-3]) for size in (8192, 2**20)]
    here = WorkerEnv(0, 0, 2, 2, "127.0.0.1", 0)
    assert report(CommRequest(out=str(tmp_path / "c")), samples, here, "cpu", load) == 0
    assert ("NOTE: the load was" in capsys.readouterr().out) == busy
    assert bool(json.loads((tmp_path / "c.json").read_text())["crowded"]) == busy


@pytest.mark.parametrize(
    ("processes", "cores", "load", "busy"),
    [(2, 2, 0.4, False), (2, 2, 0.6, True), (4, 2, 0.4, False), (1, 8, 7.0, False), (1, 8, 8.0, True)],
)
def test_others_had_room_or_not(processes: int, cores: int, load: float, busy: bool) -> None:
    assert (crowded(processes, cores, load) is not None) == busy


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (CommRequest(["all_reduce", "gossip"]), "--ops gossip"),
        (CommRequest(sizes="8Q"), "--sizes '8Q'"),
        (CommRequest(processes=1), "--processes 1"),
        (CommRequest(rounds=0), "--rounds 0"),
        (CommRequest(baseline="nowhere.json"), "--baseline nowhere.json"),
    ],
)
def test_bad_requests_are_named(request_: CommRequest, message: str) -> None:
    with pytest.raises(UserError, match=message):
        comm_command(request_)
