"""Real runs of four devices, and the faults that are caused in them one after the other."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from llm_launch import wire
from llm_launch.copy_files import run_folder
from llm_launch.live_run import LiveRun, unix_time
from llm_parallel.config.tree import ElasticConfig
from tests.support.commands import Corpus, write_run_file

FAULT_AT = 5
ENDLESS = "train.steps=100000"
PATIENT = ("elastic.hang_deviations=100", "elastic.lost_after_s=5", "elastic.slow_ratio=1000")
"""On a busy machine a healthy process may stand still, or be slow, for as long as only a faulty one is otherwise."""
LIMIT_S = 300.0
"""A hang ends here; nothing is measured by it."""
PLANTED_STEPS = 30
"""Steps from planting a mistake to its coming due: each of four messages takes two hundredths of a second."""
BATCH = 8

Start = Callable[..., LiveRun]


@contextmanager
def elastic_runs(corpus: Corpus, folder: Path) -> Iterator[Start]:
    """Starts runs on four devices of one or more agents, each of which imports torch; ends them with the block."""
    # A constant learning rate: a step's loss does not depend on how many steps there will be.
    train, optim = {"global_batch_size": BATCH, "steps": 40}, {"schedule": "constant"}
    with runs_of(write_run_file(corpus, folder, train=train, optim=optim, data={"eval_fraction": 0.0})) as starting:
        yield starting


@contextmanager
def runs_of(run_file: Path) -> Iterator[Start]:
    """The same of a run file, whose learning rate is constant; the runs' folders lie beside it."""
    runs: list[LiveRun] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("TRITON_INTERPRET", raising=False)

        def starting(*overrides: str, nodes: int = 2, name: str = "run") -> LiveRun:
            runs.append(LiveRun.start(run_file, [*PATIENT, *overrides], run_file.parent / name, nodes, 4))
            return runs[-1]

        try:
            yield starting
        finally:
            for run in runs:
                run.close()


def undisturbed(start: Start, steps: int, *layout: str) -> dict[int, float]:
    """Losses of a run of so many steps to which nothing happens."""
    run = start(*layout, f"train.steps={steps}", nodes=1, name=f"undisturbed-{'-'.join(layout)}")
    assert run.wait() == 0
    return run.losses()


def worst(run: LiveRun, losses: dict[int, float], first: int = 1, last: int = 10**9) -> float:
    """Largest difference from the undisturbed run in these steps, as they were made last."""
    mine = {step: loss for step, loss in run.losses().items() if first <= step <= last}
    assert mine
    return max(abs(loss - losses[step]) for step, loss in mine.items())


def assert_steps_are_whole(steps: Sequence[dict[str, Any]], again: int) -> None:
    """Every step was made, in order, from its own samples, and at most ``again`` of them twice."""
    made = [record["step"] for record in steps]
    assert made == sorted(made), "what is made again is the last step"
    assert set(made) == set(range(1, max(made) + 1))
    assert len(made) - len(set(made)) <= again
    assert all(record["train/samples"] == BATCH * record["step"] for record in steps)


def rank_of(run: LiveRun, place: list[Any]) -> int:
    """Rank of a device, ``[node, number]``, in the present generation."""
    return run.status()["ranks"].index(place)


def plant_mistake(run: LiveRun) -> int:
    """The same exception in every process before the step after this one."""
    step = run.steps()[-1]["step"] + PLANTED_STEPS
    for rank in range(run.status()["world_size"]):
        run.cause("raise", rank, from_step=step)
    return step


def stall_controller(run: LiveRun) -> tuple[set[int], set[int]]:
    """Stops the controller until each of its agents has given it up; process ids of the agents before and after. A
    stopped worker keeps the others from making steps meanwhile."""
    agents, world = {node["agent_pid"] for node in run.status()["nodes"]}, run.status()["world_size"]
    log = run.run_dir / "logs" / "agents.log"
    found = len(run.events("detect"))
    os.kill(run.process.pid, signal.SIGSTOP)
    os.kill(run.worker(0)[2], signal.SIGSTOP)
    try:
        run.until(lambda: log.exists() and log.read_text().count("nothing heard") == len(agents), LIMIT_S, "silence")
    finally:
        os.kill(run.process.pid, signal.SIGCONT)
    run.until(lambda: len(run.events("detect")) > found, LIMIT_S, "a recovery")
    run.first_step_after(unix_time(run.events("detect")[found]), LIMIT_S)
    all_ranks_train(run, world)  # an agent may come back before the others
    return agents, {node["agent_pid"] for node in run.status()["nodes"]}


@dataclass
class DeviceFaults:
    """Three starts of one run of DP 4 in which devices fail. place: device of each fault; at: last step before it;
    ends: exit status of each start; events, copies, checkpoints, ranks: of each start, or what was there after it."""

    run: LiveRun
    place: dict[str, list[Any]] = field(default_factory=dict)
    at: dict[str, int] = field(default_factory=dict)
    ends: list[int] = field(default_factory=list)
    events: list[list[dict[str, Any]]] = field(default_factory=list)
    copies: list[bool] = field(default_factory=list)
    checkpoints: list[list[str]] = field(default_factory=list)
    ranks: list[list[list[Any]]] = field(default_factory=list)
    refused: Exception | None = None
    agents: tuple[set[int], set[int]] = (set(), set())
    planted: int = 0
    losses: dict[int, float] = field(default_factory=dict)

    def of(self, start: int, *kinds: str) -> list[dict[str, Any]]:
        """Events of one start."""
        return [event for event in self.events[start] if event["event"] in kinds]

    def cause(self, kind: str, name: str, place: list[Any], **details: Any) -> None:
        """One fault, and the first step after it."""
        self.place[name], self.at[name] = place, self.run.steps()[-1]["step"]
        self.run.first_step_after(self.run.cause(kind, rank_of(self.run, place), **details), LIMIT_S)

    def ended(self) -> None:
        """Notes how a start ended and what it left."""
        self.ends.append(self.run.wait())
        self.events.append(self.run.events()[sum(map(len, self.events)) :])
        self.copies.append(run_folder(Path(ElasticConfig().replica_dir), self.run.run_dir).is_dir())
        self.checkpoints.append(sorted(path.name for path in self.run.run_dir.glob("checkpoints/iter_*")))
        self.ranks.append(self.run.status()["ranks"])


def cause_device_faults(start: Start) -> DeviceFaults:
    """First start: a killed and a stopped worker, and a mistake of the program. Second: a loss that is not finite, a
    flipped bit, a stalled controller, and SIGTERM together with a second fault of the first device. Third: to the end.
    """
    layout = ("parallel.dp=4", "elastic.checksum_every_steps=1")
    # Processes that raise the same error one after the other are told from bad devices by the second of them.
    faults = DeviceFaults(start(*layout, ENDLESS, "elastic.strikes=10", "elastic.max_fruitless=1000"))
    run = faults.run
    run.reach(FAULT_AT, LIMIT_S)
    places = [[*run.worker(rank)[:2]] for rank in range(4)]
    try:
        wire.connect_blocking(*run.status()["controller"], "another secret")
    except ConnectionError as error:
        faults.refused = error
    faults.cause("kill", "killed", places[2])
    faults.cause("stop", "stopped", places[1])
    faults.planted = plant_mistake(run)
    faults.ended()

    run = faults.run = start(*layout, ENDLESS)
    run.until(lambda: run.steps()[-1]["step"] > faults.planted + 3, LIMIT_S, "the second start's steps")
    faults.cause("nan", "not finite", places[3], left=1)
    faults.cause("flip", "flipped", places[1], left=1)
    faults.agents = stall_controller(run)
    faults.place["killed after it"], faults.at["asked to end"] = places[3], run.steps()[-1]["step"]
    run.cause("kill", rank_of(run, places[3]))
    run.stop()
    faults.ended()

    last = run.steps()[-1]["step"] + 5
    faults.run = start(*layout, f"train.steps={last}")
    faults.ended()
    faults.losses = undisturbed(start, last, "parallel.dp=4")
    return faults


@dataclass
class NodeFaults:
    """One run of TP 2 x DP 2 on three nodes. threads: of a worker, before and after recoveries that failed; forms:
    layouts from the loss of a node on; at: last step before that loss."""

    run: LiveRun
    threads: tuple[int, int]
    at: int
    status: int
    forms: list[str]
    losses: dict[int, float]


def cause_node_faults(start: Start) -> NodeFaults:
    """A second worker dies at three moments of a recovery; then a node is lost and comes back; SIGTERM ends the run."""
    layout = ("parallel.tp=2", "parallel.dp=2")
    run = start(*layout, ENDLESS, "elastic.strikes=1000", nodes=3)
    run.reach(3, LIMIT_S)
    before = _most_threads(run)
    for number, moment in enumerate(("detect", "blame", "form")):
        strike_during_recovery(run, number, moment)
    after = _most_threads(run)
    at, formed = run.steps()[-1]["step"], len(run.events("form"))
    run.first_step_after(run.cause("node", 3), LIMIT_S)
    back = run.until(lambda: run.events("form")[formed + 1 :], LIMIT_S, "the node's return")[0]
    run.until(lambda: run.steps()[-1]["step"] >= back["step"] + 3, LIMIT_S, "steps after the node's return")
    run.stop()
    status = run.wait()
    forms = [event["layout"] for event in run.events("form")[formed:]]
    steps = run.steps()[-1]["step"]
    return NodeFaults(run, (before, after), at, status, forms, undisturbed(start, steps, *layout))


def strike_during_recovery(run: LiveRun, number: int, moment: str) -> None:
    """Kills a worker, and another one when the controller has recorded ``moment``; waits for all ranks."""
    seen = len(run.events(moment))
    fault_s = run.cause("kill", number % 4)
    run.until(lambda: len(run.events(moment)) > seen, LIMIT_S, f"{moment} after the first fault")
    strike(run, (number + 1) % 4)
    recovered(run, fault_s)


def strike(run: LiveRun, rank: int) -> None:
    """Kills a worker if there is one at this moment."""
    with suppress(KeyError, ProcessLookupError):
        run.cause("kill", rank)


def recovered(run: LiveRun, fault_s: float) -> None:
    """Waits until all ranks make steps again."""
    run.first_step_after(fault_s, LIMIT_S)
    all_ranks_train(run, 4)


def all_ranks_train(run: LiveRun, world: int) -> None:
    """Waits until as many ranks as that make steps."""

    def train() -> bool:
        status = run.status()
        return status["world_size"] == world and status["state"] == "training"

    run.until(train, LIMIT_S, f"training of {world} ranks")
    step = run.steps()[-1]["step"]
    run.until(lambda: run.steps()[-1]["step"] >= step + 2, LIMIT_S, "two more steps")


def _most_threads(run: LiveRun) -> int:
    return max(psutil.Process(run.worker(rank)[2]).num_threads() for rank in range(4))
