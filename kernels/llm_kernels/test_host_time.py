"""Operators cost the host little and never make it wait: few function calls, and nothing that asks for a number.

Times differ from machine to machine, so the tests count function calls; ``python -m llm_kernels.host_time`` has the
microseconds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="the kernels need triton")

from llm_kernels import host_time

# Calls of Python and C functions in forward and backward, a few above what was counted. Through torch.library and with
# a view for every tensor they were 174, 186, 105, 200, 158, 224 and 244; a plain function of one input has 23.
MOST = {
    "rms_norm": 83,
    "add_rms_norm": 90,
    "swiglu": 69,
    "rope": 105,
    "product, rope_qkv_": 98,
    "cross_entropy": 108,
    "linear_cross_entropy": 178,
}


@pytest.fixture(autouse=True)
def nothing_runs() -> Iterator[None]:
    with host_time.without_kernels():
        yield


def count_calls(run: Callable[[], Any]) -> int:
    count = 0

    def note(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    for _ in range(3):  # imports and cached decisions
        run()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def test_operators_make_few_calls() -> None:
    found = {call.name: count_calls(host_time.both_of(call)) for call in host_time.calls() if call.name in MOST}
    print(found)
    assert found.keys() == MOST.keys()
    assert all(found[name] <= most for name, most in MOST.items()), found


class NoWaiting(TorchDispatchMode):
    """A CUDA graph can't hold what brings a number to the host, or has a shape that depends on one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        assert not any(part in name for part in ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select")), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MOST)
def test_a_layer_can_be_captured(name: str) -> None:
    (call,) = [call for call in host_time.calls() if call.name == name]
    run = host_time.both_of(call)
    with NoWaiting():
        run()


def test_the_table_has_every_operator(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["host_time", "--rounds", "2"])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    threads = torch.get_num_threads()
    try:
        host_time.main()
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(host_time.calls()) and all(line.count("|") == 4 for line in lines)
