"""Every rule of blame, and what the ledger makes of repeated faults."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from llm_launch.blame import Device, Evidence, Fault, Kind, Verdict, blame, classify_error, few
from llm_launch.ledger import Ledger

WORLD = [Device(node, index) for node in ("a", "b") for index in (0, 1)]
GONE = "[pair.cc:553] Connection closed by peer [127.0.0.1]:1"


def raised(device: Device, error: str, message: str = "x") -> Evidence:
    return Evidence(Kind.RAISED, device.node, device, WORLD.index(device), error, message)


def died(device: Device, status: int = -9) -> Evidence:
    return Evidence(Kind.EXIT, device.node, device, WORLD.index(device), status=status)


@pytest.mark.parametrize(
    ("evidence", "fault", "devices", "nodes"),
    [
        pytest.param([raised(WORLD[1], "UserError", "bad")], Fault.USER, (), (), id="a user's mistake"),
        pytest.param(
            [raised(WORLD[1], "OutOfMemoryError", "CUDA out of memory")], Fault.OUT_OF_MEMORY, (), (), id="GPU memory"
        ),
        pytest.param(
            [Evidence(Kind.HOST_MEMORY, "a", WORLD[0], 0), died(WORLD[2]), Evidence(Kind.AGENT_LOST, "b")],
            Fault.HOST_MEMORY, (), (), id="host memory",
        ),
        pytest.param(
            [raised(device, "ValueError", "bug") for device in WORLD], Fault.PROGRAM, (), (), id="same error everywhere"
        ),
        pytest.param(
            [raised(WORLD[0], "ValueError"), raised(WORLD[3], "ValueError")], Fault.PROGRAM, (), (), id="same on two"
        ),
        pytest.param([died(WORLD[2])], Fault.DEVICE, (WORLD[2],), (), id="one rank alone"),
        pytest.param(
            [raised(WORLD[1], "OSError", "[Errno 28] No space left on device: 'x'")],
            Fault.ENVIRONMENT, (), (), id="a full disk of one rank",
        ),
        pytest.param(
            [raised(WORLD[1], "PermissionError", "[Errno 13] Permission denied: 'log'"), died(WORLD[3])],
            Fault.ENVIRONMENT, (), (), id="a log that cannot be opened",
        ),
        pytest.param(
            [raised(device, "FileNotFoundError", "[Errno 2] No such file or directory: 'x'") for device in WORLD],
            Fault.PROGRAM, (), (), id="a file that nobody finds",
        ),
        pytest.param(
            [died(WORLD[2]), Evidence(Kind.CONNECTION, "a", WORLD[0], 0, "RuntimeError", GONE)],
            Fault.DEVICE, (WORLD[2],), (), id="peers of the dead are not to blame",
        ),
        pytest.param([died(WORLD[2]), died(WORLD[3])], Fault.NODE, (), ("b",), id="all of one node"),
        pytest.param([died(WORLD[0]), died(WORLD[2])], Fault.DEVICE, (WORLD[0], WORLD[2]), (), id="one of each node"),
        pytest.param([Evidence(Kind.NODE_SILENT, "b")], Fault.NODE, (), ("b",), id="no heartbeat"),
        pytest.param([Evidence(Kind.AGENT_LOST, "b"), died(WORLD[2])], Fault.AGENT, (), ("b",), id="agent gone"),
        pytest.param([Evidence(Kind.HANG, "a", WORLD[0], 0)], Fault.DEVICE, (WORLD[0],), (), id="hang"),
        pytest.param(
            [Evidence(Kind.HANG, device.node, device, 0) for device in WORLD], Fault.NETWORK, (), (), id="all hang"
        ),
        pytest.param([Evidence(Kind.STALL, "a", WORLD[0], 0)], Fault.STALL, (), (), id="a program that stands still"),
        pytest.param(
            [Evidence(Kind.STALL, "a", WORLD[0], 0), died(WORLD[2])], Fault.DEVICE, (WORLD[2],), (), id="stall and end"
        ),
        pytest.param(
            [Evidence(kind, device.node, device, 0) for kind, device in
             zip((Kind.HANG, Kind.STALL, Kind.STALL, Kind.HANG), WORLD, strict=True)],
            Fault.NETWORK, (), (), id="all stand still",
        ),
        pytest.param([Evidence(Kind.SLOW, "a", WORLD[0], 0)], Fault.DEVICE, (WORLD[0],), (), id="slow"),
        pytest.param([Evidence(Kind.NOT_FINITE, "a", WORLD[1], 1)], Fault.DEVICE, (WORLD[1],), (), id="NaN"),
        pytest.param(
            [raised(WORLD[1], "RuntimeError", "CUDA error: an illegal memory access")],
            Fault.DEVICE, (WORLD[1],), (), id="CUDA error",
        ),
        pytest.param(
            [Evidence(Kind.CONNECTION, "a", WORLD[0], 0, "RuntimeError", GONE)], Fault.NETWORK, (), (), id="nobody died"
        ),
    ],
)  # fmt: skip
def test_rules(evidence: list[Evidence], fault: Fault, devices: tuple[Device, ...], nodes: tuple[str, ...]) -> None:
    verdict = blame(evidence, WORLD)
    assert (verdict.fault, verdict.devices, verdict.nodes) == (fault, devices, nodes)
    assert verdict.stops_run == (fault in (Fault.USER, Fault.PROGRAM, Fault.OUT_OF_MEMORY))


@pytest.mark.parametrize(
    "item",
    [
        Evidence(Kind.DISAGREES, "a", WORLD[1], 1),
        Evidence(Kind.UNHEALTHY, "a", WORLD[1], 1),
        raised(WORLD[1], "RuntimeError", "CUDA error: uncorrectable ECC error encountered"),
    ],
)
def test_hard_evidence_removes_at_once(item: Evidence) -> None:
    ledger = Ledger()
    verdict = ledger.judge(blame([item], WORLD))
    assert verdict.certain and set(ledger.removed) == {WORLD[1]}


def test_a_second_strike_removes_and_a_first_does_not() -> None:
    ledger = Ledger(strikes=2)
    ledger.judge(blame([died(WORLD[1])], WORLD))
    ledger.judge(blame([died(WORLD[2])], WORLD))
    assert not ledger.removed
    ledger.judge(blame([died(WORLD[1], -11)], WORLD))
    assert set(ledger.removed) == {WORLD[1]}
    again = Ledger.from_json(ledger.to_json(), 2)
    assert (again.counts, again.removed, again.errors) == (ledger.counts, ledger.removed, ledger.errors)


def test_a_strike_expires() -> None:
    """Also over a restart; a clock that was set back makes none expire early."""
    clock = [1e9]
    ledger = Ledger(strikes=2, expire_s=3600.0, now=lambda: clock[0])
    ledger.judge(blame([died(WORLD[1])], WORLD))
    clock[0] += 3601
    ledger.judge(blame([died(WORLD[1])], WORLD))
    assert not ledger.removed
    later = Ledger.from_json(ledger.to_json(), 2, 3600.0)
    later.now = lambda: clock[0] - 1e6
    later.judge(blame([died(WORLD[1])], WORLD))
    assert set(later.removed) == {WORLD[1]}


@pytest.mark.parametrize(
    ("kinds", "steps", "removed"),
    [
        ((Kind.HANG, Kind.HANG), 9, True),
        ((Kind.HANG, Kind.HANG), 10, False),
        ((Kind.SLOW, Kind.SLOW), 79, True),
        ((Kind.SLOW, Kind.SLOW), 80, False),
        ((Kind.HANG, Kind.EXIT), 0, True),
        ((Kind.HANG, Kind.EXIT), 10, False),
        ((Kind.SLOW, Kind.EXIT), 0, False),
        ((Kind.EXIT, Kind.SLOW), 0, False),
        ((Kind.SLOW, Kind.HANG), 0, False),
        ((Kind.EXIT, Kind.HANG), 10**6, True),
        ((Kind.STALL, Kind.STALL), 0, False),
    ],
)
def test_what_would_have_shown_again_is_forgotten(kinds: tuple[Kind, Kind], steps: int, removed: bool) -> None:
    """Two stalls of a program, minutes apart, on a device that trains well in between; also over a restart."""
    ledger = Ledger.from_json({}, 2, probe_steps=2)
    for kind in kinds:
        ledger.made_steps(steps, WORLD)
        ledger.judge(blame([Evidence(kind, "a", WORLD[1], 1, status=1)], WORLD))
        ledger = Ledger.from_json(json.loads(json.dumps(ledger.to_json())), 2, probe_steps=2)
    assert (WORLD[1] in ledger.removed) == removed


def test_strikes_of_an_earlier_version_count() -> None:
    ledger = Ledger.from_json({"strikes": [["a", 1, ["rank 1 exit"]]]}, 2)
    ledger.judge(blame([died(WORLD[1])], WORLD))
    assert set(ledger.removed) == {WORLD[1]}


def test_a_process_that_ends_while_its_generation_forms() -> None:
    """Nobody is blamed the first time; the same device again, before any generation trains, has a strike."""
    ledger = Ledger(strikes=1)
    ends = {device: [replace(died(device), forming=True)] for device in WORLD}
    for device in (WORLD[1], WORLD[2], WORLD[1]):
        assert ledger.judge(blame(ends[device], WORLD)).fault is Fault.UNKNOWN
    ledger.formed()
    assert ledger.judge(blame(ends[WORLD[1]], WORLD)).fault is Fault.UNKNOWN, "a generation trained in between"
    both = ledger.judge(blame([*ends[WORLD[1]], *ends[WORLD[2]]], WORLD))
    assert both.devices == (WORLD[1],) and set(ledger.removed) == {WORLD[1]}


def test_the_same_error_on_another_device_is_the_programs() -> None:
    ledger = Ledger(strikes=2)
    assert ledger.judge(blame([raised(WORLD[1], "IndexError", "sample 7")], WORLD)).fault is Fault.DEVICE
    verdict = ledger.judge(blame([raised(WORLD[2], "IndexError", "sample 7")], WORLD))
    assert verdict.fault is Fault.PROGRAM and verdict.stops_run
    assert not ledger.removed and not ledger.counts


def test_faults_of_program_user_and_memory_never_strike() -> None:
    ledger = Ledger(strikes=1)
    for fault in (Fault.USER, Fault.PROGRAM, Fault.OUT_OF_MEMORY, Fault.HOST_MEMORY, Fault.NETWORK, Fault.AGENT):
        ledger.judge(Verdict(fault, "x", (WORLD[0],), certain=True))
    assert not ledger.removed and not ledger.counts


@pytest.mark.parametrize(
    ("error", "message", "kind"),
    [
        ("UserError", "x", "user"),
        ("RuntimeError", GONE, "connection"),
        ("DistBackendError", "NCCL error", "connection"),
        ("RuntimeError", "[enforce fail] . Cannot allocate memory", "memory"),
        ("RuntimeError", "CUDA error: device-side assert triggered", "device"),
        ("RuntimeError", "shape '[2, 3]' is invalid for input of size 5", "program"),
        ("AssertionError", "", "program"),
    ],
)
def test_errors_are_told_apart(error: str, message: str, kind: str) -> None:
    assert classify_error(error, message) == kind


def test_thousands_of_lost_nodes_fit_one_line() -> None:
    names = [f"n{number}" for number in range(2000)]
    lost = [Evidence(Kind.NODE_SILENT, name) for name in names]
    verdict = blame(lost, [Device(name, 0) for name in names])
    assert set(verdict.nodes) == set(names)
    assert verdict.reason == "no heartbeat from n0, n1, n10, n100, n1000, n1001, n1002, n1003 and 1992 more"
    assert few(["a", "b"]) == "a, b"
