"""Timing operators: a provider or an operator that fails loses only its own row, wherever it fails. The operators are
made up in plain torch and timed by the host's clock."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_kernels import device as on
from llm_kernels import measure
from llm_kernels.benchmark import Benchmark, Work
from llm_parallel.bench import kernels
from llm_parallel.bench.requests import KernelsRequest

CPU = torch.device("cpu")
CARD = measure.Card("a card", 1e12, 1e15)
SHAPE = {"name": "small", "n": 8}


def operator(name: str, providers: Mapping[str, Callable[[], Callable[..., Any]]], **more: Any) -> Benchmark:
    def make(shape: Any, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
        return (torch.randn(shape["n"], dtype=dtype, device=device).requires_grad_(),)

    settings: dict[str, Any] = {"bytes_moved": lambda shape, dtype: Work(16, 32), **more}
    return Benchmark(name, [SHAPE], SHAPE, make, providers, **settings)


class Once(torch.autograd.Function):
    """x²; backward writes over what forward saved, so it can run once on a graph."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        kept = x.clone()
        ctx.save_for_backward(kept)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (kept,) = ctx.saved_tensors  # raises at the second time: the version has changed
        return kept.mul_(2 * gradient)


def failing_at(call_number: int) -> Callable[..., torch.Tensor]:
    """x², except in one call, which raises."""
    calls = []

    def run(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        if len(calls) == call_number:
            raise RuntimeError("out of memory\nmore")
        return x * x

    return run


def absent() -> Callable[..., Any]:
    import no_such_package

    return no_such_package.run


def wrong_version() -> Callable[..., Any]:
    raise AttributeError("no attribute 'square'")


def rows_of(benchmark: Benchmark) -> dict[tuple[str, str], measure.Row]:
    rows = list(measure.measure(benchmark, CARD, CPU, benchmark.shapes, rounds=3))
    found = {(row.provider, row.mode): row for row in rows}
    assert len(found) == len(rows), "each row once"
    return found


def test_a_provider_that_fails_costs_its_own_row() -> None:
    providers = {
        "ours": lambda: failing_at(1), "torch": lambda: torch.square, "absent": absent, "wrong": wrong_version,
        "late": lambda: failing_at(4), "once": lambda: Once.apply,
    }  # fmt: skip
    found = rows_of(operator("square", providers))
    for provider in ("torch", "once"):
        for mode in measure.MODES:
            row = found[provider, mode]
            assert row.median_ms is not None and row.p20_ms <= row.median_ms <= row.p80_ms and row.host_us > 0
    assert found["ours", "all"].note == "failed: RuntimeError: out of memory"
    assert found["absent", "all"].note == "not installed (no_such_package)"
    assert found["wrong", "all"].note == "failed: AttributeError: no attribute 'square'"
    # Its fourth call is a timed one: that mode is lost, no other.
    late = {mode: found["late", mode].note for mode in measure.MODES}
    assert sorted(late.values()) == ["", "", "failed: RuntimeError: out of memory"]


def test_backward_is_right_where_it_may_run_once() -> None:
    """Every timed backward has a graph of its own: without that, torch refuses the second."""
    contender = measure._Contender("once", Once.apply, (torch.tensor([3.0], requires_grad=True),))
    contender.start(CPU)
    assert not contender.repeatable
    for _ in range(3):
        contender.ready()
        contender.backward()
    with pytest.raises(RuntimeError):
        contender.backward()


def test_the_table_has_every_row() -> None:
    found = rows_of(operator("square", {"ours": lambda: torch.square, "absent": absent}))
    lines = measure.table(list(found.values())).splitlines()
    assert len(lines) == 2 + len(found) and "not installed (no_such_package)" in lines[2]


def broken_bytes(shape: Any, dtype: torch.dtype) -> Work:
    raise KeyError("rows")


def three_operators() -> list[Benchmark]:
    square = {"ours": lambda: torch.square}
    return [operator("first", square), operator("second", square, bytes_moved=broken_bytes), operator("third", square)]


def test_an_operator_that_fails_costs_its_own_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``bench kernels`` as on a GPU: everything is printed and written, and the exit status says that one failed."""
    out = tmp_path / "result"
    assert kernels._measure(three_operators(), KernelsRequest(rounds=2, out=str(out)), CPU) == 1
    rows = json.loads(Path(f"{out}.json").read_text())["rows"]
    assert [row["operator"] for row in rows] == ["first"] * 3 + ["second"] + ["third"] * 3
    assert rows[3]["note"] == "failed: KeyError: 'rows'"
    said = capsys.readouterr().out
    assert said.count("| third |") == 3 and "| second |" in said
    assert len(Path(f"{out}.csv").read_text().splitlines()) == 8
    assert kernels._measure(three_operators()[::2], KernelsRequest(rounds=2), CPU) == 0


def test_a_lost_gpu_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kernel broke the CUDA context, the remaining rows say so and hold no times."""
    monkeypatch.setattr(on, "is_lost", lambda device: True)
    first = operator("first", {"torch": lambda: torch.square, "ours": lambda: failing_at(5)})
    found = dict(measure.measure_all([first, three_operators()[2]], CARD, CPU, rounds=2))
    notes = [(row.provider, row.note) for row in found["first"] if row.note]
    assert notes[0] == ("ours", "failed: RuntimeError: out of memory")
    assert "measure third in a run of its own" in found["third"][0].note and len(found["third"]) == 1


def test_a_gpu_is_asked_as_torch_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """The branches that only a GPU takes, on a stand-in with the names and arguments of torch.cuda."""
    said: list[str] = []
    memory = {"now": 100}

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            assert enable_timing

    cuda, stand_in = torch.device("cuda"), {
        "Event": Event,
        "synchronize": lambda device: said.append("synchronize"),
        "empty_cache": lambda: said.append("empty_cache"),
        "get_device_name": lambda device: "a card",
        "memory_allocated": lambda device: memory["now"],
        "reset_peak_memory_stats": lambda device: said.append("reset"),
        "max_memory_allocated": lambda device: memory["now"] + 50,
    }  # fmt: skip
    for name, function in stand_in.items():
        assert callable(getattr(torch.cuda, name)), "torch has it"
        monkeypatch.setattr(torch.cuda, name, function)
    assert isinstance(on.event(cuda), Event) and on.name_of(cuda) == "a card"
    assert on.peak_bytes(lambda: said.append("call"), cuda) == 50
    assert said == ["synchronize", "reset", "call", "synchronize"]
    on.release(cuda)
    assert said[-1] == "empty_cache" and not on.is_lost(cuda)

    def lost(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    assert on.is_lost(cuda)


def test_a_provider_that_ends_the_process_is_left_out_of_the_next_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite's stage: what was measured is kept, the provider has its row, and a new process measures the rest."""
    from benchmarks.gpu import machine, operators
    from benchmarks.gpu.plan import Job, Lost
    from llm_kernels import check

    both = {"ours": lambda: torch.square, "peer": lambda: failing_at(5)}
    monkeypatch.setattr(machine, "start_kernels", lambda rehearse: CPU)
    monkeypatch.setattr(check, "benchmark_of", lambda name: operator(name, both))
    saved: dict[str, Any] = {}
    job = Job(Path(), time.monotonic() + 100, True, saved.update, results={"environment": {"card": vars(CARD)}})
    items = [("first", SHAPE), ("second", SHAPE)]
    monkeypatch.setattr(on, "is_lost", lambda device: True)
    with pytest.raises(Lost, match="peer has ended all CUDA work"):
        operators.measured(job, items, lambda name: True)
    assert saved["broken"] == {"first small": ["peer"]} and saved["rows"][-1]["note"].startswith("failed")
    monkeypatch.setattr(on, "is_lost", lambda device: False)
    again = dataclasses.replace(job, previous=dict(saved))
    found = operators.measured(again, items, lambda name: True)
    timed = [(row["operator"], row["provider"]) for row in found["rows"] if row["median_ms"]]
    # In the second operator the peer fails once, which costs it one mode.
    assert timed.count(("first", "ours")) == timed.count(("second", "ours")) == 3
    assert timed.count(("first", "peer")) == 0 and timed.count(("second", "peer")) == 2
    assert [row["provider"] for row in found["rows"] if row["operator"] == "first" and row["note"]] == ["peer"]
