"""Real runs lose processes, devices and nodes, and end with the result of the undisturbed run.

Several faults are caused in one run (elastic_runs.py), and each test reads what the run recorded about its own fault.
Faults whose decision a cheaper test proves (test_controller.py, test_hang.py) are caused in a real run only in the slow
tests.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_launch.live_run import LiveRun, unix_time
from llm_parallel.config.tree import ElasticConfig
from llm_parallel.errors import EXIT_STOPPED
from tests.integration.conftest import corpus  # noqa: F401  (a fixture)
from tests.launch.elastic_runs import (
    ENDLESS,
    FAULT_AT,
    LIMIT_S,
    DeviceFaults,
    NodeFaults,
    Start,
    assert_steps_are_whole,
    cause_device_faults,
    cause_node_faults,
    elastic_runs,
    recovered,
    strike,
    undisturbed,
    worst,
)
from tests.launch.in_process import refusal
from tests.support.commands import Corpus
from tests.support.disks import grow, small_disk_at
from tests.support.freezer import freezer

pytestmark = pytest.mark.gloo
DP4 = "parallel.dp=4"


@pytest.fixture
def start(corpus: Corpus, tmp_path: Path) -> Iterator[Start]:  # noqa: F811
    """Starts runs that end with the test."""
    with elastic_runs(corpus, tmp_path) as starting:
        yield starting


@pytest.fixture(scope="module")
def devices(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> DeviceFaults:  # noqa: F811
    """What came of a run whose devices failed."""
    with elastic_runs(corpus, tmp_path_factory.mktemp("devices")) as starting:
        return cause_device_faults(starting)


@pytest.fixture(scope="module")
def nodes(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> NodeFaults:  # noqa: F811
    """What came of a run whose nodes failed."""
    with elastic_runs(corpus, tmp_path_factory.mktemp("nodes")) as starting:
        return cause_node_faults(starting)


def test_killed_and_stopped_workers_are_replaced_and_nothing_changes(devices: DeviceFaults) -> None:
    """Losses are those of the undisturbed run to the last bit, over a mistake and a second start."""
    assert worst(devices.run, devices.losses, last=devices.at["not finite"]) == 0.0
    killed, stopped = devices.of(0, "blame")[:2]
    assert killed["fault"] == "device" and stopped["fault"] == "stall" and "is stopped" in stopped["cause"]
    assert not devices.of(0, "remove"), "a device is not removed for one fault"
    assert {event["layout"] for event in devices.of(0, "form")} == {"TP 1 x PP 1 x DP 4"}


def test_the_same_mistake_everywhere_stops_the_run_and_evicts_nothing(devices: DeviceFaults) -> None:
    assert devices.ends[0] == 1 and devices.of(0, "fail")[0]["fault"] == "program"
    assert not devices.of(0, "remove")
    log = (devices.run.run_dir / "launch.log").read_text()
    assert "DrillError: the same mistake in every process" in log and "Traceback" in log


def test_copies_outlive_every_end_but_a_saved_one(devices: DeviceFaults) -> None:
    """The mistake ends the run before any checkpoint was written. The next start loses one step at most. When all is
    saved, memory is free."""
    assert devices.copies == [True, False, False] and devices.checkpoints[0] == []
    restored = devices.of(1, "form")[0]
    assert restored["cause"] == "memory" and restored["step"] >= devices.planted - 2


def test_a_loss_that_is_not_finite_on_one_replica_is_made_again_elsewhere(devices: DeviceFaults) -> None:
    assert "not finite" in devices.of(1, "blame")[0]["cause"]
    assert worst(devices.run, devices.losses, last=devices.at["flipped"]) <= 1e-5
    assert not devices.of(1, "skip")


def test_a_flipped_bit_is_found_and_its_device_removed(devices: DeviceFaults) -> None:
    removed = devices.of(1, "remove")[0]
    assert [removed["node"], removed["device"]] == devices.place["flipped"]
    layouts = [event["layout"] for event in devices.of(1, "form")]
    assert layouts[:3] == [f"TP 1 x PP 1 x DP {replicas}" for replicas in (4, 4, 3)]
    assert worst(devices.run, devices.losses) <= 1e-4


def test_a_controller_that_stalls_costs_one_recovery(devices: DeviceFaults) -> None:
    """Its agents end their workers and come back; none of them is started a second time for it."""
    before, after = devices.agents
    assert before == after
    faults = ["not finite", "flipped", "stalled", "killed after the loss that was not finite"]
    assert len(devices.of(1, "detect")) == len(faults)


def test_a_stop_survives_a_recovery(devices: DeviceFaults) -> None:
    """SIGTERM together with a killed worker: the run recovers, saves and ends; the next start goes on from there. The
    killed worker costs a step at most."""
    assert devices.ends[1:] == [EXIT_STOPPED, 0]
    saved = devices.of(1, "stopped")[0]["step"]
    assert saved >= devices.at["asked to end"] - 1 and devices.checkpoints[1] == [f"iter_{saved:07d}"]
    assert devices.of(2, "resume")[0]["step"] == saved


def test_a_device_that_fails_again_is_removed_and_remembered(devices: DeviceFaults) -> None:
    """Its loss was not finite, and then its worker died; the next start knows of it."""
    removed = devices.of(1, "remove")[1]
    assert [removed["node"], removed["device"]] == devices.place["killed after it"] == devices.place["not finite"]
    for name in ("flipped", "not finite"):
        assert devices.place[name] not in devices.ranks[2]


def test_every_step_is_made_from_its_own_samples(devices: DeviceFaults, nodes: NodeFaults) -> None:
    """Whatever happened; each fault costs a step at most."""
    found = [*devices.of(0, "detect"), *devices.of(1, "detect"), *devices.of(2, "detect")]
    assert_steps_are_whole(devices.run.steps(), len(found))
    assert_steps_are_whole(nodes.run.steps(), len(nodes.run.events("detect")))


def test_nothing_unauthenticated_is_answered(devices: DeviceFaults) -> None:
    assert isinstance(devices.refused, ConnectionError)


def test_faults_that_meet_a_recovery(nodes: NodeFaults) -> None:
    """A second worker dies when the first one's fault is seen, judged, and when its replacement is assigned."""
    before, after = nodes.threads
    assert after < 1.5 * before, "survivors hold what earlier generations had"
    assert len(nodes.run.events("detect")) >= 4 and not nodes.run.events("remove")
    assert worst(nodes.run, nodes.losses, last=nodes.at) <= 1e-4


def test_a_lost_node_shrinks_the_run_and_comes_back(nodes: NodeFaults) -> None:
    assert nodes.forms == ["TP 2 + SP x PP 1 x DP 1", "TP 2 + SP x PP 1 x DP 2"]
    assert worst(nodes.run, nodes.losses) <= 1e-4


def test_sigterm_saves(nodes: NodeFaults) -> None:
    assert nodes.status == EXIT_STOPPED and nodes.run.status()["state"] == "stopped"
    saved = nodes.run.steps()[-1]["step"]
    assert (nodes.run.run_dir / "checkpoints" / f"iter_{saved:07d}").is_dir()


def test_a_full_disk_does_not_end_a_run_whose_state_is_in_memory(start: Start, tmp_path: Path) -> None:
    with small_disk_at(tmp_path / "full" / "checkpoints", "1m") as disk:
        run = start(DP4, "checkpoint.interval_steps=4", ENDLESS, name="full", nodes=1)
        run.until(lambda: len(run.events("save_failed")) >= 3, LIMIT_S, "three checkpoints without room")
        assert not list(disk.glob("iter_*")), "there was room after all"
        grow(disk, "64m")
        run.until(lambda: run.events("save"), LIMIT_S, "a checkpoint")
        run.stop()
        assert run.wait() == EXIT_STOPPED
        failed, saved = (run.events(kind) for kind in ("save_failed", "save"))
        assert [event["step"] for event in failed[:3]] == [4, 8, 12] and "make room" in failed[0]["cause"]
        assert saved[0]["step"] > failed[-1]["step"] and not run.events("detect")
        last = run.steps()[-1]["step"]
        assert (disk / "latest_checkpointed_iteration.txt").read_text() == str(last)
        assert worst(run, undisturbed(start, last, DP4)) == 0.0


def test_without_copies_in_memory_it_goes_on_from_the_newest_checkpoint(start: Start) -> None:
    run = start(DP4, "elastic.replicate_every_steps=0", "checkpoint.interval_steps=5", ENDLESS, nodes=1)
    newest = run.run_dir / "checkpoints" / "latest_checkpointed_iteration.txt"
    run.until(newest.exists, LIMIT_S, "a checkpoint")
    saved = int(newest.read_text())
    run.first_step_after(run.cause("kill", 2), LIMIT_S)
    reached = run.events("detect")[0]["step"]
    run.stop()
    assert run.wait() == EXIT_STOPPED
    resumed = [event["step"] for event in run.events("resume")]
    assert resumed[0] == 0 and saved <= resumed[1] <= reached + 1 and resumed[1] % 5 == 0
    # A step that one rank has logged may not have reached the controller; another may end after the first sign.
    assert reached - resumed[1] <= run.status()["lost_steps"] <= reached - resumed[1] + 1
    assert worst(run, undisturbed(start, max(run.losses()), DP4)) <= 1e-5


def test_a_users_mistake_is_one_sentence(start: Start, tmp_path: Path) -> None:
    assert "--nodes 9 is more than the 1 devices" in refusal("launch", tmp_path / "run.yaml", "--nodes", "9")


@pytest.mark.slow
def test_faults_at_six_moments_of_a_recovery(start: Start) -> None:
    """Between the events that test_faults_that_meet_a_recovery waits for, where nothing is recorded that could be."""
    run = start("parallel.pp=2", "parallel.dp=2", ENDLESS, "elastic.strikes=1000", nodes=4)
    run.reach(3)
    for number in range(6):
        fault_s = run.cause("kill", number % 4)
        time.sleep(0.05 + 0.06 * number)
        strike(run, (number + 1) % 4)
        recovered(run, fault_s)
    run.stop()
    assert run.wait() == EXIT_STOPPED and not run.events("remove")
    assert_steps_are_whole(run.steps(), len(run.events("detect")))


@pytest.mark.slow
def test_two_nodes_that_hold_each_others_copies_are_waited_for(start: Start) -> None:
    """Neither of them has the first one's share any more, but its agent is started again and finds it in memory. They
    are waited for as long as making the steps again would take: here one and a half times the start of all agents."""
    began = time.time()
    run = start(DP4, ENDLESS, nodes=4)
    run.reach(FAULT_AT)
    started_s = unix_time(run.events("form")[0]) - began

    def worth_waiting_for() -> bool:
        made = run.steps()
        return unix_time(made[-1]) - unix_time(made[1]) > 1.5 * started_s

    run.until(worth_waiting_for, 2 * LIMIT_S, "enough steps")
    run.cause("node", 1)
    run.first_step_after(run.cause("node", 2))
    run.stop()
    assert run.wait() == EXIT_STOPPED
    waited = run.events("wait")[0]
    assert waited["cause"].startswith("memory copies are on lost nodes: ")
    assert run.events("form")[1]["cause"] == "memory" and run.status()["lost_steps"] <= 1
    assert not run.events("remove")
    assert_steps_are_whole(run.steps(), len(run.events("detect")))
    assert worst(run, undisturbed(start, max(run.losses()), DP4)) <= 1e-4


@pytest.mark.slow
def test_a_throttled_worker_is_found_and_removed(start: Start) -> None:
    """By its part of a step or by its probe: the pauses meet all three probes of a millisecond, or none."""
    run = start(DP4, "elastic.probe_every_steps=2", f"elastic.slow_ratio={ElasticConfig().slow_ratio}", ENDLESS)
    run.reach(FAULT_AT)
    node, index, _ = run.worker(2)
    run.cause("slow", 2, factor=10.0)  # the others, too, are slow while other tests run
    run.until(lambda: run.events("remove"), LIMIT_S, "the removal")
    assert [(e["node"], e["device"]) for e in run.events("remove")] == [(node, index)]
    cause = run.events("blame")[-1]["cause"]
    assert "its part of a step takes" in cause or "its probe takes" in cause
    run.first_step_after(unix_time(run.events("remove")[0]))
    run.stop()
    assert run.wait() == EXIT_STOPPED and run.status()["lost_steps"] <= 1


@pytest.mark.slow
def test_a_file_system_that_stalls_is_waited_for(start: Start, tmp_path: Path) -> None:
    """Rank 0 writes its records into a pipe that holds two of them and is not read for a while."""
    pipe = tmp_path / "stalled" / "metrics.jsonl"
    pipe.parent.mkdir()
    os.mkfifo(pipe)
    run = start(DP4, "log.plots=false", name="stalled", nodes=1)
    with pipe.open("rb", buffering=0) as records:
        fcntl.fcntl(records, fcntl.F_SETPIPE_SZ, 4096)
        text = b""
        while text.count(b"\n") < FAULT_AT:
            text += records.read(1024)
        run.until(lambda: run.events("stall"), LIMIT_S, "a wait for files")
        told = run.status()["updated"]
        run.until(lambda: run.status()["updated"] > told + 2.0, LIMIT_S, "further looks of the controller")
        while part := records.read(1 << 16):
            text += part
    assert run.wait() == 0
    made = [json.loads(line) for line in text.splitlines()]
    losses = {record["step"]: record["train/loss"] for record in made if "train/grad_norm" in record}
    assert losses == undisturbed(start, max(losses), DP4)
    assert not run.events("detect", "blame", "remove")
    node, device = run.status()["ranks"][0]
    assert run.events("stall")[0]["cause"] == f"{node}/{device}: waiting for files"


@pytest.mark.slow
def test_a_stop_survives_a_hang(start: Start) -> None:
    """SIGTERM together with a stopped worker, of which no connection tells."""
    run = start(DP4, ENDLESS)
    run.reach(FAULT_AT)
    run.cause("stop", 1)
    run.stop()
    assert run.wait() == EXIT_STOPPED, (run.run_dir / "launch.log").read_text()[-3000:]
    saved = max(run.losses())
    assert saved >= FAULT_AT and (run.run_dir / "checkpoints" / f"iter_{saved:07d}").is_dir()
    assert_steps_are_whole(run.steps(), 1)


@pytest.mark.slow
def test_a_process_in_a_frozen_control_group_is_replaced_by_a_spare(start: Start) -> None:
    """It cannot be killed: a spare trains in its place, and when it thaws, the launcher's own kill is no strike."""
    with freezer() as frozen:
        run = start("parallel.dp=2", ENDLESS, "elastic.strikes=2", nodes=1)
        run.reach(FAULT_AT, LIMIT_S)
        node, index, pid = run.worker(1)
        frozen.freeze(pid)
        run.until(lambda: run.events("stuck"), LIMIT_S, "a device without a process")
        run.until(lambda: len(run.events("form")) > 1, LIMIT_S, "the generation without it")
        formed = run.events("form")[-1]
        run.until(lambda: run.steps()[-1]["step"] > formed["step"] + 3, LIMIT_S, "steps with the spare")
        ranks = run.status()["ranks"]
        assert len(ranks) == 2 and [node, index] not in ranks
        assert len(run.events("form")) == 2 and len(run.events("stuck")) == 1, "it is not assigned again"
        frozen.thaw()
        entry = run.until(lambda: _process_on(run, node, index) not in (0, pid), LIMIT_S, "another process there")
        assert entry and len(run.events("form")) == 2, "its late end hinders nobody"
        run.first_step_after(run.cause("kill", 0), LIMIT_S)
    run.stop()
    assert run.wait() == EXIT_STOPPED and not run.events("remove")
    assert_steps_are_whole(run.steps(), 2)


def _process_on(run: LiveRun, node: str, index: int) -> int:
    """Process of a device; 0 if it has none."""
    entry = next((entry for entry in run.status().get("nodes", ()) if entry["name"] == node), {})
    return int(entry.get("workers", {}).get(str(index), 0))
