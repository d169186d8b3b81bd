"""Which worker hangs and which is slow, judged by what workers report."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import llm_parallel
from llm_launch import fleet
from llm_launch.blame import Device, Kind
from llm_launch.hang import FILE_CODE, _median_of_others, find_hung, find_slow, kind_of_hang, waits_for_files
from llm_launch.progress import Marker, Pace, Progress, ProgressPage
from llm_launch.roster import Worker
from llm_parallel.config.tree import ElasticConfig
from llm_parallel.jsonlines import JsonLines
from llm_parallel.worker import probe

A, B, C = (Device("n", index) for index in range(3))
WAITING = 'File "torch/distributed/distributed_c10d.py", line 1, in all_reduce'
COMPUTING = 'File "model.py", line 7, in forward'


def look(stack: str, **collectives: int) -> dict[str, Any]:
    return {"stack": stack, "collectives": collectives}


def test_who_does_not_answer_hangs() -> None:
    assert list(find_hung([A, B, C], {A: look(WAITING, dp=5), C: look(WAITING, dp=5)})) == [B]


def test_who_is_missing_in_a_collective_hangs_and_is_named_with_it() -> None:
    looks = {A: look(WAITING, dp=5), B: look(COMPUTING, dp=4), C: look(WAITING, dp=5)}
    hung = find_hung([A, B, C], looks)
    assert list(hung) == [B]
    assert "missing in collective 5 of group dp" in hung[B]


def test_who_waits_for_the_missing_one_elsewhere_is_not_to_blame() -> None:
    """B waits in its tensor-parallel group for C and is therefore missing in the data-parallel one."""
    looks = {A: look(WAITING, dp=5), B: look(WAITING, dp=4, tp=9), C: look(COMPUTING, tp=8)}
    assert list(find_hung([A, B, C], looks)) == [C]


@pytest.mark.parametrize(
    ("seen", "kind"),
    [
        ({"state": "T"}, Kind.STALL),
        ({"state": "t"}, Kind.STALL),
        ({"state": "S", **look(COMPUTING), "idle": True}, Kind.STALL),
        ({"state": "S", **look(COMPUTING), "idle": False}, Kind.HANG),
        ({"state": "R"}, Kind.HANG),
        ({"state": "D"}, Kind.HANG),
        ({}, Kind.HANG),
    ],
)
def test_what_stands_still_though_its_device_does_not(seen: dict[str, Any], kind: Kind) -> None:
    assert kind_of_hang(seen) is kind


def test_a_clock_without_the_wait_for_a_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy host makes a process slow, and no device."""
    monkeypatch.setattr(probe, "SCHEDULED", tmp_path / "schedstat")
    monkeypatch.setattr(probe.time, "perf_counter", lambda: 10.0)
    assert probe.processor_s() == 10.0, "a kernel that does not tell"
    (tmp_path / "schedstat").write_text("5000000000 3000000000 17\n")
    assert probe.processor_s() == 7.0
    watch = probe.Stopwatch(torch.device("cpu"))
    for waited_s in (0, 4):
        (tmp_path / "schedstat").write_text(f"0 {waited_s}000000000 1")
        watch.start(1)
        (tmp_path / "schedstat").write_text(f"0 {waited_s + 1}000000000 1")
        watch.stop()
    assert watch.mean_s() == -1.0, "a second of waiting is left out"


def test_who_waits_for_files_is_told_by_its_real_stack(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")  # a pipe that nobody reads is a file system that stalls
    lines = JsonLines(tmp_path / "metrics.jsonl")
    writing = threading.Thread(target=lines.append, args=({"step": 7, "text": "x" * 200_000},))
    writing.start()

    def stack_when_it_waits() -> str:
        deadline = time.monotonic() + 60.0
        while time.monotonic() < deadline:
            stack = "".join(traceback.format_stack(sys._current_frames()[writing.ident or 0]))
            if "os.write" in stack:
                return stack
            time.sleep(0.01)
        raise AssertionError("it never wrote")

    stack = stack_when_it_waits()
    reader = os.open(tmp_path / "metrics.jsonl", os.O_RDONLY)
    received = b""
    while not received.endswith(b"\n"):
        received += os.read(reader, 1 << 16)
    writing.join(10)
    os.close(reader)
    lines.close()
    assert json.loads(received)["step"] == 7
    looks = {A: look(stack, dp=4), B: look(WAITING, dp=5), C: look(WAITING, dp=5)}
    assert waits_for_files(looks.items()) == [A]
    gone_on = {A: look(COMPUTING, dp=4), B: look(WAITING, dp=5)}
    assert waits_for_files(gone_on.items()) == []
    assert waits_for_files([*looks.items(), *gone_on.items()]) == [A], "it has just gone on"
    assert waits_for_files([(A, {"state": "T"})]) == [], "it does not answer"


def test_file_code_is_where_it_is_looked_for() -> None:
    """A module that moved would make a stalled file system look like a hung device."""
    package = Path(llm_parallel.__file__).parent
    for path in FILE_CODE:
        assert (package.parent / path.lstrip("/")).exists(), path


def workers(*probes: float) -> list[Worker]:
    found = [Worker(device, 1, 1) for device in (A, B, C)]
    for worker, seconds in zip(found, probes):
        worker.probe_s = seconds
    return found


def test_slow_only_when_slow_several_times_in_a_row() -> None:
    slow: dict[Device, int] = {}
    for probes in ((1.0, 5.0, 1.0), (1.1, 5.1, 1.1)):
        assert find_slow(workers(*probes), slow, 2.0, True) == []
    found = find_slow(workers(1.2, 5.2, 1.2), slow, 2.0, True)
    assert [(item.kind, item.device) for item in found] == [(Kind.SLOW, B)]
    slow.clear()
    for probes in ((1.0, 5.0, 1.0), (1.1, 1.1, 1.1), (1.2, 5.2, 1.2), (1.3, 5.3, 1.3)):
        assert find_slow(workers(*probes), slow, 2.0, True) == []


def test_a_slow_device_stays_when_the_rest_would_be_no_faster() -> None:
    """Of two devices one that takes 1.9 times as long is still worth having."""
    pair = workers(1.0, 1.9)[:2]
    slow: dict[Device, int] = {}
    for number in range(5):
        for worker in pair:
            worker.probe_s += 1e-6 * number
        assert find_slow(pair, slow, 1.2, True) == []


def slow_by_steps(own: tuple[float, ...], whole_replicas: bool) -> list[Device | None]:
    slow: dict[Device, int] = {}
    found = []
    for number in range(3):
        three = workers(*(1.0 + 0.01 * number,) * 3)
        for worker, seconds in zip(three, own):
            worker.own_s = seconds
        found += find_slow(three, slow, 2.0, whole_replicas)
    return [item.device for item in found]


def test_a_throttled_process_is_slow_though_its_probe_is_not() -> None:
    assert slow_by_steps((0.1, 0.5, 0.11), True) == [B]
    assert slow_by_steps((0.5, 0.1, 0.0), True) == [A], "of two that were timed the slower"
    assert slow_by_steps((0.1, 0.19, 0.1), True) == []
    assert slow_by_steps((0.1, 0.5, 0.11), False) == [], "inside a replica it may have waited for another"


@given(st.lists(st.floats(0.01, 10.0), min_size=2, max_size=30), st.data())
def test_median_of_the_others(values: list[float], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(values) - 1))
    others = values[:at] + values[at + 1 :]
    assert _median_of_others(sorted(values), values[at]) == pytest.approx(statistics.median(others))


def test_pace_by_hand() -> None:
    pace = Pace(deviations=8, first_s=600)
    assert pace.limit_s() == 600
    pace.add(0.2)
    assert pace.limit_s() == pytest.approx(10 * 0.2 + 1.0)
    for seconds in (0.1, 0.2, 0.3, 0.2):
        pace.add(seconds)
    # Median 0.2, median absolute deviation 0 of (0, 0.1, 0, 0.1, 0): three medians decide.
    assert pace.limit_s() == pytest.approx(0.6 + 0.5)
    for seconds in (0.5, 0.1, 0.5, 0.1, 0.5):
        pace.add(seconds)
    # 0.1 0.1 0.1 0.2 0.2 0.2 0.3 0.5 0.5 0.5: median 0.2, deviations 0 0 0 .1 .1 .1 .1 .3 .3 .3: MAD 0.1.
    assert pace.limit_s() == pytest.approx(0.2 + 8 * 1.4826 * 0.1 + 0.5)


def test_progress_is_seen_through_shared_memory() -> None:
    page = ProgressPage(slots=4)
    other = ProgressPage(page.fd, slots=4)
    marker = Marker(other, 2)
    marker.begin(3, 7)
    marker.stepped(8)
    seen = page.read(2)
    assert (seen.generation, seen.step, seen.marks) == (3, 8, 2)
    assert seen.step_s == marker.step_s > 0 and 0 < seen.stepped_s == marker.stepped_s <= seen.marked_s
    marker.busy(True)
    assert page.read(2).stepped_s < 0
    assert page.read(1) == Progress()


@pytest.mark.parametrize(
    ("devices", "age_s", "state", "expected"),
    [
        ([A], 5.0, "R", []),
        ([A], 31.0, "R", [A]),
        ([A], 5.0, "T", [A]),
        ([A, B], 5.0, "R", [A, B]),
    ],
)
def test_the_only_process_of_a_run_may_pause(
    devices: list[Device], age_s: float, state: str, expected: list[Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No peer tells a pause of a busy machine from a hang; a process that is stopped needs no peer."""
    monkeypatch.setattr(fleet, "LOOK_S", 0.0)

    async def same_look(asked: list[Device], _: float) -> dict[Device, dict[str, Any]]:
        return {device: {**look(COMPUTING), "state": state} for device in asked}

    workers = [SimpleNamespace(age_s=age_s)]
    known: Any = SimpleNamespace(
        look=same_look, workers=lambda: workers, evidence=[], elastic=ElasticConfig(), generation=1, step=1, pace=Pace()
    )
    assert list(asyncio.run(fleet.Fleet.find_hung(known, devices))) == expected


def test_who_is_stopped_at_the_second_look_is_the_only_one_to_blame(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others had no time to answer: that one process is stopped is known at once."""
    monkeypatch.setattr(fleet, "LOOK_S", 0.0)
    looks = [
        {device: {**look(COMPUTING), "state": "S"} for device in (A, B, C)},
        {B: {"state": "T"}, C: {"state": "S"}},
    ]

    async def next_look(*_: Any) -> dict[Device, dict[str, Any]]:
        return looks.pop(0)

    known: Any = SimpleNamespace(
        look=next_look, workers=list, evidence=[], elastic=ElasticConfig(), generation=1, step=1, pace=Pace()
    )
    assert asyncio.run(fleet.Fleet.find_hung(known, [A, B, C])) == {B: "is stopped"}
