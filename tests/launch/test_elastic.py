"""A real run loses what real runs lose, and ends where the undisturbed run ends."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from llm_launch.drill import LiveRun
from llm_launch.vault import run_folder
from llm_parallel.config.tree import ElasticConfig
from llm_parallel.errors import EXIT_STOPPED
from tests.integration.conftest import corpus  # noqa: F401  (a fixture)
from tests.support.commands import Corpus, environment, write_run_file
from tests.support.disks import grow, small_disk_at

pytestmark = pytest.mark.gloo
STEPS = 40
FAULT_AT = 8

Start = Callable[..., LiveRun]


@pytest.fixture
def start(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:  # noqa: F811
    """Starts a run on four devices of one or more agents, each of which imports torch; ends it with the test."""
    runs: list[LiveRun] = []
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    run_file = write_run_file(
        corpus, tmp_path, train={"global_batch_size": 8, "steps": STEPS}, data={"eval_fraction": 0.0}
    )

    def starting(*overrides: str, nodes: int = 2, name: str = "run") -> LiveRun:
        runs.append(LiveRun.start(run_file, overrides, tmp_path / name, nodes, 4))
        return runs[-1]

    yield starting
    for run in runs:
        run.close()


_undisturbed: dict[tuple[str, ...], dict[int, float]] = {}


def undisturbed(start: Start, *overrides: str) -> dict[int, float]:
    """Losses of the run that nothing happens to; made once for all tests, whose corpus is the same."""
    if overrides not in _undisturbed:
        run = start(*overrides, nodes=1, name="undisturbed")
        assert run.wait() == 0
        _undisturbed[overrides] = run.losses()
    return _undisturbed[overrides]


def assert_goes_on(run: LiveRun, losses: dict[int, float], tolerance: float) -> None:
    """Ended well, lost at most one step each time, made every step once in the end, from the right samples."""
    assert run.wait() == 0, (run.run_dir / "launch.log").read_text()[-3000:]
    assert set(run.losses()) == set(range(1, STEPS + 1))
    assert max(abs(loss - losses[step]) for step, loss in run.losses().items()) <= tolerance
    for record in run.steps():
        assert record["train/samples"] == 8 * record["step"]
    made = [record["step"] for record in run.steps()]
    assert made == sorted(made), "what is made again is the last step"
    assert len(made) <= STEPS + len(run.events("detect"))


def test_killed_and_stopped_workers_are_replaced_and_nothing_changes(start: Start) -> None:
    losses = undisturbed(start, "parallel.dp=4")
    run = start("parallel.dp=4")
    run.reach(FAULT_AT)
    run.first_step_after(run.cause("kill", 2))
    run.first_step_after(run.cause("stop", 1))
    assert_goes_on(run, losses, 0.0)
    assert [event["fault"] for event in run.events("blame")] == ["device", "device"]
    assert "is stopped" in run.events("blame")[1]["cause"]
    assert not run.events("remove"), "a device is not removed for one fault"
    assert {event["layout"] for event in run.events("form")} == {"TP 1 x PP 1 x DP 4"}


def test_faults_that_meet_a_recovery(start: Start) -> None:
    """A second worker dies while the first one's fault is being mended, at whatever point of it."""
    run = start("parallel.pp=2", "parallel.dp=2", "train.steps=100000", "elastic.strikes=1000", nodes=4)
    run.reach(3)
    threads = max(psutil.Process(run.worker(rank)[2]).num_threads() for rank in range(4))
    for number in range(6):
        fault_s = run.cause("kill", number % 4)
        time.sleep(0.05 + 0.06 * number)
        with suppress(KeyError):  # it has just no process there
            run.cause("kill", (number + 1) % 4)
        run.first_step_after(fault_s, 30)
        run.reach(run.steps()[-1]["step"] + 2)
    run.until(lambda: run.status()["world_size"] == 4, 60, "all ranks")
    after = [psutil.Process(run.worker(rank)[2]).num_threads() for rank in range(4)]
    assert max(after) < 1.5 * threads, "survivors hold what earlier generations had"
    run.stop()
    assert run.wait() == EXIT_STOPPED and not run.events("remove")
    made = [record["step"] for record in run.steps()]
    assert made == sorted(made) and set(made) == set(range(1, max(made) + 1))
    assert all(record["train/samples"] == 8 * record["step"] for record in run.steps())


def test_without_copies_in_memory_it_goes_on_from_the_newest_checkpoint(start: Start) -> None:
    losses = undisturbed(start, "parallel.dp=4")
    run = start("parallel.dp=4", "elastic.replicate_every_steps=0", "checkpoint.interval_steps=10")
    newest = run.run_dir / "checkpoints" / "latest_checkpointed_iteration.txt"
    run.until(lambda: newest.exists() and newest.read_text() == "20", 60, "a checkpoint")
    run.reach(23)
    run.first_step_after(run.cause("kill", 2))
    assert run.wait() == 0 and run.losses().keys() == losses.keys()
    assert max(abs(loss - losses[step]) for step, loss in run.losses().items()) <= 1e-5
    reached = run.events("detect")[0]["step"]
    assert [event["step"] for event in run.events("resume")] == [0, 20]
    # A step that one rank has logged may not have reached the controller; another may end after the first sign.
    assert 2 <= reached - 20 <= run.status()["lost_steps"] <= reached - 19


def test_two_nodes_that_hold_each_others_copies_are_waited_for(start: Start) -> None:
    """Neither of them has the first one's share any more, but its agent is started again and finds it in memory."""
    losses = undisturbed(start, "parallel.dp=4", "train.steps=140")
    run = start("parallel.dp=4", "train.steps=140", nodes=4)
    run.reach(100)  # making 100 steps again takes longer than an agent's start
    run.cause("node", 1)
    fault_s = run.cause("node", 2)
    run.first_step_after(fault_s)
    assert run.wait() == 0
    waited = next(event for event in run.events("wait"))
    assert waited["cause"].startswith("copies of the state went with ") and waited["step"] >= 99
    assert run.status()["lost_steps"] <= 1 and not run.events("remove")
    made = [record["step"] for record in run.steps()]
    assert made == sorted(made) and set(made) == set(range(1, 141))
    assert max(abs(loss - losses[step]) for step, loss in run.losses().items()) <= 1e-4


def test_a_lost_node_shrinks_the_run_and_comes_back(start: Start) -> None:
    layout = ("parallel.tp=2", "parallel.dp=2", "optim.schedule=constant")
    losses = undisturbed(start, *layout)
    run = start(*layout, "train.steps=100000", nodes=4)  # however long the node takes to come back
    run.reach(FAULT_AT)
    run.first_step_after(run.cause("node", 3))
    forms = run.until(lambda: run.events("form")[2:], 180, "the node's return")
    run.reach(max(forms[0]["step"] + 3, STEPS))
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.wait() == EXIT_STOPPED
    layouts = [event["layout"] for event in run.events("form")]
    assert layouts == [
        "TP 2 + SP x PP 1 x DP 2",
        "TP 2 + SP x PP 1 x DP 1",
        "TP 2 + SP x PP 1 x DP 2",
    ]
    assert not run.events("remove") and run.status()["lost_steps"] <= 1
    made = [record["step"] for record in run.steps()]
    assert made == sorted(made) and set(made) == set(range(1, max(made) + 1))
    assert all(record["train/samples"] == 8 * record["step"] for record in run.steps())
    assert max(abs(run.losses()[step] - loss) for step, loss in losses.items()) <= 1e-4


def test_a_flipped_bit_is_found_and_its_device_removed(start: Start) -> None:
    losses = undisturbed(start, "parallel.dp=4")
    run = start("parallel.dp=4", "elastic.checksum_every_steps=1")
    run.reach(FAULT_AT)
    node, index, _ = run.worker(2)
    run.first_step_after(run.cause("flip", 2, left=1))
    assert_goes_on(run, losses, 1e-4)
    assert [(e["node"], e["device"]) for e in run.events("remove")] == [(node, index)]
    assert run.events("form")[-1]["layout"] == "TP 1 x PP 1 x DP 3"


def test_a_throttled_worker_is_found_and_removed(start: Start) -> None:
    losses = undisturbed(start, "parallel.dp=4")
    run = start("parallel.dp=4", "elastic.probe_every_steps=2", "train.steps=1000", "optim.schedule=constant")
    run.reach(FAULT_AT)
    node, index, _ = run.worker(2)
    run.cause("slow", 2, factor=10.0)  # the others, too, are slow while other tests run
    run.until(lambda: run.events("remove"), 100, "the removal")
    assert [(e["node"], e["device"]) for e in run.events("remove")] == [(node, index)]
    # The pauses meet all three probes of a millisecond, or none.
    cause = run.events("blame")[-1]["cause"]
    assert "its part of a step takes" in cause or "its probe takes" in cause
    run.reach(run.steps()[-1]["step"] + 3)
    run.stop()
    assert run.wait() == EXIT_STOPPED and run.status()["lost_steps"] <= 1
    assert losses[1] == run.losses()[1]


def test_a_loss_that_is_not_finite_on_one_replica_is_made_again_elsewhere(start: Start) -> None:
    losses = undisturbed(start, "parallel.dp=4")
    run = start("parallel.dp=4", "elastic.checksum_every_steps=0")
    run.reach(FAULT_AT)
    run.first_step_after(run.cause("nan", 2, left=1))
    assert_goes_on(run, losses, 1e-5)
    assert not run.events("remove") and not run.events("skip")


def test_a_device_that_fails_again_is_removed_and_remembered(start: Start) -> None:
    run = start("parallel.dp=4")
    run.reach(FAULT_AT)
    node, index, _ = run.worker(1)
    run.first_step_after(run.cause("kill", 1))
    rank = run.status()["ranks"].index([node, index])
    run.first_step_after(run.cause("kill", rank))
    assert run.wait() == 0
    assert [(e["node"], e["device"]) for e in run.events("remove")] == [(node, index)]
    again = start("parallel.dp=4", "train.steps=44")
    assert again.wait() == 0
    assert [node, index] not in again.status()["ranks"]


def test_the_same_mistake_everywhere_stops_the_run_and_evicts_nothing(start: Start) -> None:
    run = start("parallel.dp=4")
    run.reach(FAULT_AT)
    for rank in range(4):
        run.cause("raise", rank, from_step=FAULT_AT + 8)
    assert run.wait(60) == 1
    assert not run.events("remove")
    log = (run.run_dir / "launch.log").read_text()
    assert "DrillError: the same mistake in every process" in log and "Traceback" in log
    assert run.events("fail")[0]["fault"] == "program"


def test_a_full_disk_does_not_end_a_run_whose_state_is_in_memory(start: Start, tmp_path: Path) -> None:
    losses = undisturbed(start, "parallel.dp=4")
    with small_disk_at(tmp_path / "full" / "checkpoints", "1m") as disk:
        run = start("parallel.dp=4", "checkpoint.interval_steps=4", name="full")
        run.reach(14)
        assert not list(disk.glob("iter_*")), "there was room after all"
        grow(disk, "64m")
        assert_goes_on(run, losses, 0.0)
        failed, saved = (run.events(kind) for kind in ("save_failed", "save"))
        assert failed[0]["step"] == 4 and len(failed) >= 3 and "make room" in failed[0]["cause"]
        assert [event["step"] for event in saved][-1] == 36 and saved[0]["step"] > failed[-1]["step"]
        assert not run.events("detect")
        assert (disk / "latest_checkpointed_iteration.txt").read_text() == str(STEPS)


def test_a_file_system_that_stalls_is_waited_for(start: Start, tmp_path: Path) -> None:
    """Rank 0 writes its records into a pipe that holds two of them and is not read for a while."""
    losses = undisturbed(start, "parallel.dp=4")
    pipe = tmp_path / "stalled" / "metrics.jsonl"
    pipe.parent.mkdir()
    os.mkfifo(pipe)
    run = start("parallel.dp=4", "log.plots=false", name="stalled")
    with pipe.open("rb", buffering=0) as records:
        fcntl.fcntl(records, fcntl.F_SETPIPE_SZ, 4096)
        text = b""
        while text.count(b"\n") < FAULT_AT:
            text += records.read(1024)
        run.until(lambda: run.events("stall"), 60.0, "a wait for files")
        time.sleep(3.0)
        while part := records.read(1 << 16):
            text += part
    assert run.wait() == 0
    made = [json.loads(line) for line in text.splitlines()]
    assert {record["step"]: record["train/loss"] for record in made if "train/grad_norm" in record} == losses
    assert not run.events("detect", "blame", "remove")
    node, device = run.status()["ranks"][0]
    assert run.events("stall")[0]["cause"] == f"{node}/{device}: waiting for files"


def test_a_controller_that_stalls_costs_one_recovery(start: Start) -> None:
    """Its agents end their workers and come back; none of them is started a second time for it."""
    run = start("parallel.dp=4", "train.steps=150")
    run.reach(FAULT_AT)
    agents = {node["agent_pid"] for node in run.status()["nodes"]}
    os.kill(run.process.pid, signal.SIGSTOP)
    time.sleep(4.0)
    os.kill(run.process.pid, signal.SIGCONT)
    run.until(lambda: run.events("detect"), 60.0, "a recovery")
    run.reach(run.steps()[-1]["step"] + 5)
    assert {node["agent_pid"] for node in run.status()["nodes"]} == agents
    assert run.wait() == 0
    assert len(run.events("detect")) == 1 and not run.events("remove")
    made = [record["step"] for record in run.steps()]
    assert made == sorted(made) and set(made) == set(range(1, 151)) and len(made) <= 151


def test_sigterm_saves_and_the_next_start_goes_on(start: Start) -> None:
    losses = undisturbed(start, "parallel.dp=4")
    run = start("parallel.dp=4")
    run.reach(FAULT_AT)
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.wait() == EXIT_STOPPED
    assert max(run.losses()) < STEPS and run.status()["state"] == "stopped"
    again = start("parallel.dp=4")
    assert again.wait() == 0
    assert again.losses() == losses


@pytest.mark.parametrize("kind", ["kill", "stop"])
def test_a_stop_survives_a_recovery(kind: str, start: Start) -> None:
    """SIGTERM together with a killed or a stopped worker: the run recovers, saves and ends; nothing is made again but
    the step under way."""
    losses = undisturbed(start, "parallel.dp=4")
    run = start("parallel.dp=4")
    run.reach(FAULT_AT)
    run.cause(kind, 1)
    run.stop()
    assert run.wait() == EXIT_STOPPED, (run.run_dir / "launch.log").read_text()[-3000:]
    saved = max(run.losses())
    assert (run.run_dir / "checkpoints" / f"iter_{saved:07d}").is_dir() and FAULT_AT <= saved < STEPS
    again = start("parallel.dp=4")
    assert_goes_on(again, losses, 0.0)


def test_copies_outlive_every_end_but_a_saved_one(start: Start) -> None:
    """A mistake of the program ends the run before any checkpoint was written. The next start loses one step at most.
    When the run is done, memory is free."""
    losses = undisturbed(start, "parallel.dp=4")
    run = start("parallel.dp=4")
    run.reach(FAULT_AT)
    for rank in range(4):
        run.cause("raise", rank, from_step=FAULT_AT + 8)
    assert run.wait(60) == 1
    copies = run_folder(Path(ElasticConfig().replica_dir), run.run_dir)
    assert copies.is_dir() and not list((run.run_dir / "checkpoints").glob("iter_*"))
    again = start("parallel.dp=4")
    assert_goes_on(again, losses, 0.0)
    restored = again.events("form")[-1]
    assert restored["cause"] == "memory" and restored["step"] >= FAULT_AT + 6
    assert not copies.exists()


def test_a_users_mistake_is_one_sentence_and_status_2(start: Start, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "llm_parallel.cli", "launch", str(tmp_path / "run.yaml"), "--nodes", "9"],
        env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "--nodes 9 is more than the 1 devices" in result.stderr.splitlines()[-1]


def test_nothing_unauthenticated_is_answered(start: Start) -> None:
    from llm_launch import wire

    run = start("parallel.dp=4")
    run.reach(2)
    status: dict[str, Any] = run.status()
    host, port = status["controller"]
    with pytest.raises(ConnectionError):
        wire.connect_blocking(host, port, "another secret")
    assert run.wait() == 0
