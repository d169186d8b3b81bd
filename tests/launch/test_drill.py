"""What drills find out about a run, and what they cause from outside, without a run."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llm_launch import drill_blame, drill_soak, wire
from llm_launch.door import Door
from llm_launch.drill import drill_command
from llm_launch.drill_blame import blame_drill
from llm_launch.drill_growth import FEWEST, Change, Look, changes, look_at
from llm_launch.drill_means import Flood, SilentPartner, control_group_root
from llm_launch.drill_request import DrillRequest
from llm_launch.drill_scenes import SCENES
from llm_launch.drill_stage import Scene, Stage
from llm_launch.drill_verdicts import Finding
from llm_launch.live_run import LiveRun, Target
from llm_parallel.errors import UserError

LIMIT_S = 60.0
"""A hang ends here; nothing is measured by it."""


def until(condition: Any) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def looks(role: str = "agent", **growth: float) -> list[Look]:
    """A look every second of 100, of amounts that grow from the first to the last by ``growth``."""
    first = {"processes": 4.0, "pss_mib": 100.0, "uss_mib": 50.0, "files": 20.0, "threads": 5.0}
    return [
        Look(float(at), role, **{name: value + growth.get(name, 0.0) * at / 100 for name, value in first.items()})  # type: ignore[arg-type]
        for at in range(101)
    ]


@pytest.mark.parametrize(
    ("growth", "grown"),
    [
        ({}, []),
        ({"pss_mib": 30.0}, []),
        ({"pss_mib": 50.0}, ["pss_mib"]),
        ({"uss_mib": 40.0}, ["uss_mib"]),
        ({"files": 5.0}, []),
        ({"files": 10.0, "threads": 10.0}, ["files", "threads"]),
    ],
)
def test_growth_is_found(growth: dict[str, float], grown: list[str]) -> None:
    """Between the medians of the first window, around the time 20, and of the last, around 90."""
    found = changes(looks(**growth), 100.0)
    assert [change.amount for change in found] == ["processes", "pss_mib", "uss_mib", "files", "threads"]
    assert [change.amount for change in found if change.last > change.bound] == grown
    assert found[1].first == pytest.approx(100.0 + 0.2 * growth.get("pss_mib", 0.0))
    assert found[1].last == pytest.approx(100.0 + 0.9 * growth.get("pss_mib", 0.0))


def test_processes_that_are_left_over_are_growth() -> None:
    (found,) = changes(looks("below a worker", processes=8.0), 100.0)[:1]
    assert found.amount == "processes" and found.last > found.bound


def test_pages_that_are_shared_with_a_missing_worker_are_no_growth() -> None:
    """At the end of the soak two of three looks find a worker killed; its zygote's pages are nobody else's then."""
    found = []
    for at in range(101):
        missing = at > 80 and at % 3
        found += [Look(float(at), "zygote", 4, 160.0, 120.0 if missing else 35.0, 7.0, 1.0)]
        found += [Look(float(at), "worker", 3 if missing else 4, 180.0, 50.0, 37.5, 42.0)]
    assert all(change.last <= change.bound for change in changes(found, 100.0))
    assert [change.last for change in changes(found, 100.0) if change.amount == "uss_mib"] == [35.0, 50.0]


def test_a_peak_is_no_growth_and_few_looks_say_nothing() -> None:
    peak = [Look(60.0, "agent", 4, 9999.0, 9999.0, 999.0, 999.0)]
    assert all(change.last <= change.bound for change in changes([*looks(), *peak], 100.0))
    assert changes(looks()[: 80 + FEWEST - 1], 100.0) == []
    assert str(Change("agent", "files", 5.0, 7.0)) == "agent files 5.0 -> 7.0 (at most 9.0)"


def run_of(folder: Path, pid: int) -> LiveRun:
    """A run of which only the folder and the number of a process are there."""
    process: Any = SimpleNamespace(pid=pid, poll=lambda: None)
    return LiveRun(folder, process, "secret")


def test_a_look_sees_a_process_and_its_descriptors(tmp_path: Path) -> None:
    run = run_of(tmp_path, os.getpid())
    (before,) = [look for look in look_at(run, 1.0) if look.role == "launcher"]
    pipes = [os.pipe() for _ in range(10)]
    (after,) = [look for look in look_at(run, 2.0) if look.role == "launcher"]
    for pipe in pipes:
        for end in pipe:
            os.close(end)
    assert after.files - before.files == pytest.approx(20, abs=3) and before.threads >= 1
    assert before.pss_mib >= before.uss_mib > 1


def test_a_process_that_ends_while_it_is_looked_at(tmp_path: Path) -> None:
    """One that has ended and is still listed, as a worker that was just killed, has no memory to tell of."""

    def processes() -> dict[str, int]:
        return {look.role: look.processes for look in look_at(run_of(tmp_path, os.getpid()), 1.0)}

    before = processes()  # children of other tests among them
    child = os.fork()
    if child == 0:
        os._exit(0)
    try:
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        assert processes() == before
    finally:
        os.waitpid(child, 0)


def test_only_processes_of_the_run_are_ended(tmp_path: Path) -> None:
    """A number from the run's last status may be another program's by now."""
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    try:
        target = Target(0, "n", 0, child, child, (child,))
        with pytest.raises(ProcessLookupError, match=f"process {child} is none of this run"):
            run_of(tmp_path, 10**8).cause_at("kill", target)
        run_of(tmp_path, os.getpid()).cause_at("kill", target)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        child = 0
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_goodput_of_a_soak_is_simulated_however_many_its_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """80 interruptions in 1,800 s are a rate that no fleet has; of a step's half second lost and half a second down."""
    asked: list[Any] = []
    monkeypatch.setattr(drill_soak, "simulate", lambda job: asked.append(job) or SimpleNamespace(goodput=0.9))
    run: Any = SimpleNamespace(
        steps=lambda: [{"step": n, "time": f"2026-11-30T10:{n // 60:02d}:{n % 60:02d}+00:00"} for n in range(1800)],
        events=lambda *_: [{"time": "2026-11-30T10:00:01.500+00:00"}],
        faults=[(1796032801.0, "kill")],
    )
    useful, simulated = drill_soak.goodput_beside_simulation(run, [0.5] * 80)
    assert useful == pytest.approx(1.0) and simulated == 0.9
    (job,) = asked
    assert job.restart_s / job.interval_s == pytest.approx(0.5)
    per_s = job.num_gpus * job.rate_per_gpu_month / (365.25 / 12 * 86400)
    assert per_s * job.interval_s == pytest.approx(80 / 1799)


def test_a_flood_holds_connections_and_opens_them_again() -> None:
    """The server turns all but 20 away, as ours does."""
    listener, door = socket.create_server(("127.0.0.1", 0), backlog=200), Door(20)
    listener.settimeout(0.05)
    flood, accepted = Flood(listener.getsockname(), silent=40, dripping=10), []
    dripped = 0
    with flood, listener:
        deadline = time.monotonic() + LIMIT_S
        while door.turned_away < 30 or flood.opened < 70 or not dripped:
            assert time.monotonic() < deadline
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                pass
            else:
                accepted.append(connection)
                door.enter(connection)
            for connection in accepted[-20:]:
                connection.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    dripped += connection.recv(1) == b"x"
    for connection in accepted:
        connection.close()


def test_a_silent_partner_takes_all_and_answers_nothing() -> None:
    partner = SilentPartner("secret")
    with partner, wire.connect_blocking(*partner.address, "secret") as connection:
        wire.send(connection, {"do": "put", "header": {"numbers": "x" * 1000}})
        until(lambda: partner.received > 1000)
        connection.settimeout(0.05)
        with pytest.raises(TimeoutError):
            connection.recv(1)


def test_a_scene_is_judged_by_what_happened_since_it_began() -> None:
    happened = [{"event": "lost"}, {"event": "detect"}]
    run: Any = SimpleNamespace(events=lambda: list(happened))
    stage = Stage(run, 0, Finding("of a busy machine"))
    stage.begin()
    assert stage.events("detect", "lost") == []
    happened.append({"event": "lost", "node": "vm-1"})
    assert stage.events("detect", "lost") == happened[2:] and stage.events("detect") == []


def test_what_cannot_be_caused_here_is_skipped_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(lambda _: [], impossible=lambda: "this machine has none")
    monkeypatch.setattr(drill_blame, "SCENES", {"a thing": scene})
    finding = blame_drill(tmp_path / "run.yaml", tmp_path, 3, random.Random(1))
    assert finding.skipped == "this machine has none" and not finding.wrong
    assert finding.scenario.startswith("3: a thing at rank ")
    assert control_group_root("no such controller") is None
    assert not [name for name in SCENES if "," in name], "--kinds divides at commas"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"blame": -1}, "--blame -1 must not be negative"),
        ({"pair_ms": -2.5}, "--pair-ms -2.5 must not be negative"),
        ({"every_s": 0.0}, "--every-s 0 must be over 0"),
        ({"kinds": "worker killed, worker kiled"}, "--kinds 'worker kiled' is unknown; take some of: a fifth"),
        ({}, "none.yaml does not exist; give a run file"),
    ],
)
def test_what_is_no_drill(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        drill_command(DrillRequest("none.yaml", **asked))
