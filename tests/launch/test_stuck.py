"""Processes that the system cannot end, and a start that the run folder tells nothing: agents without processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_launch import controller as controller_module
from llm_launch import fleet as fleet_module
from llm_launch.blame import Device
from llm_launch.journal import MEMORY_NAME
from llm_launch.ledger import PROVEN_STEPS
from llm_parallel.errors import EXIT_STOPPED
from tests.launch.fake_agents import Nodes, Story, play
from tests.launch.test_controller import FOUR, config_of

FIVE = [*FOUR, "n5"]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits are short: nothing comes."""
    for name in ("LEAVE_S", "REPLACE_S"):
        monkeypatch.setattr(controller_module, name, 0.1)
    monkeypatch.setattr(fleet_module, "LOOK_S", 0.02)
    monkeypatch.setattr(fleet_module, "PATIENT_S", 0.1)


def test_a_process_that_cannot_be_killed_is_planned_without(tmp_path: Path) -> None:
    """In state D, or in a frozen control group. The spare takes its place; it is waited for once, gets no assignment as
    long as it is there, and its end, when it can end at last, is no fault of its device."""
    config = config_of(tmp_path, strikes=2)
    nodes = Nodes(config, FIVE)

    async def act(story: Story) -> None:
        fleet = story.controller.fleet
        await story.training(4)
        for _ in range(4):
            nodes.make_steps(1)
            await story.heard_of(nodes.step)
        nodes.frozen.add("n2")
        nodes.age_s = 1e6  # no progress
        await story.until(lambda: story.events("form")[1:], "the generation without it")
        nodes.age_s = 0.0
        await story.training(4)
        assert fleet.placement is not None and Device("n2", 0) not in fleet.placement.devices
        assert Device("n5", 0) in fleet.placement.devices
        nodes.restarts = False
        nodes.make_steps(2)
        await story.heard_of(nodes.step)
        nodes.lose("n3")
        await story.training(3)
        nodes.frozen.clear()  # it thaws, and the kill of before takes effect
        agent = nodes.agents["n2"]
        agent.tell({"is": "exit", "device": 0, "status": -9, "host_memory": False, "number": 0})
        agent.tell({"is": "worker", "device": 0, "pid": 2, "number": 1, "generation": 0})
        await story.training(4)

    status, story = play(config, nodes, act)
    assert status == EXIT_STOPPED
    assert [event["cause"] for event in story.events("stuck")] == [
        "no process can be started on n2/0, and the run goes on without"
    ], "it is waited for once"
    assert not story.events("remove") and len(story.controller.ledger.counts[Device("n2", 0)]) == 1


def test_copies_say_themselves_what_they_are(tmp_path: Path) -> None:
    """The disk of the run folder was full when the last generation formed, and the folder is silent about it: its
    copies have what the next start must know, and the next generation has a number of its own."""
    config = config_of(tmp_path)
    first = Nodes(config, FOUR)

    async def train(story: Story) -> None:
        await story.training(4)
        for _ in range(3):
            story.nodes.make_steps(1)
            await story.heard_of(story.nodes.step)

    _, story = play(config, first, train)
    made = story.controller.fleet.generation
    for name in (MEMORY_NAME, "elastic.json"):
        (tmp_path / "run" / name).unlink()
    again = Nodes(config, FOUR)
    again.memory, again.origins = first.memory, first.origins

    async def look(story: Story) -> None:
        await story.training(4)

    _, story = play(config, again, look)
    formed = story.events("form")[0]
    assert (formed["cause"], formed["step"]) == ("memory", 3) and formed["generation"] > made

    other = config.model_copy(update={"seed": 7})
    (tmp_path / "run" / MEMORY_NAME).unlink()
    strange = Nodes(other, FOUR)
    strange.memory, strange.origins = first.memory, first.origins
    _, story = play(other, strange, look)
    assert story.events("form")[0]["cause"] == "checkpoint or new run"
    (ignored,) = story.events("copies_ignored")
    assert "another seed" in ignored["cause"]


def test_a_network_that_breaks_for_a_while_does_not_end_a_run(tmp_path: Path) -> None:
    """Connections of the collectives break three times without a step in between, as a stranger at their ports can have
    it while a generation forms: nobody is blamed, and the run goes on when they leave it alone."""
    config = config_of(tmp_path, max_fruitless=1)
    quick = config.elastic.model_copy(
        update={"lost_after_s": 1.0}
    )  # so long the cause of a broken connection is awaited
    config = config.model_copy(update={"elastic": quick})
    nodes = Nodes(config, FOUR)

    async def act(story: Story) -> None:
        await story.training(4)
        nodes.make_steps(1)
        await story.heard_of(nodes.step)
        for number in range(1, 4):
            left = {"is": "left", "device": 0, "outcome": "failed", "error": "RuntimeError"}
            agent = nodes.agents["n2"]
            agent.tell({**left, "message": "Connection closed by peer", "generation": agent.generation})
            await story.until(lambda number=number: len(story.events("form")) > number, "another generation")
            await story.training(4)

    status, story = play(config, nodes, act)
    assert status == EXIT_STOPPED
    assert {event["fault"] for event in story.events("blame")} == {"network"} and not story.events("remove")


async def stands_still(story: Story, seen: dict[str, Any], formed: int) -> None:
    """The process of n2 makes no progress, for longer and longer, until one more generation has formed."""
    nodes = story.nodes
    nodes.behind["n2"], nodes.age_s = seen, 1e6

    def replaced() -> bool:
        nodes.age_s = min(1.1 * nodes.age_s, 1e300)  # a look that is late for a busy machine counts as a slow step
        return len(story.events("form")) > formed

    await story.until(replaced, "the next generation")
    nodes.age_s = 0.0


@pytest.mark.parametrize(
    ("seen", "removed"),
    [({"idle": True}, False), ({"idle": False}, True)],
    ids=["its program", "its device"],
)
def test_two_stalls_on_one_device(
    seen: dict[str, Any], removed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step after the other: a process that answers, and whose device has nothing to do, tells nothing of it."""
    monkeypatch.setattr(fleet_module, "PATIENT_S", 60.0)
    config = config_of(tmp_path, strikes=2)
    nodes = Nodes(config, FOUR)

    async def act(story: Story) -> None:
        await story.training(4)
        for number in (1, 2):
            nodes.make_steps(1)
            await story.heard_of(nodes.step)
            await stands_still(story, seen, number)
            await story.training(3 if removed and number == 2 else 4)

    status, story = play(config, nodes, act)
    assert status == EXIT_STOPPED
    assert [event["fault"] for event in story.events("blame")] == ["device" if removed else "stall"] * 2
    assert [event["node"] for event in story.events("remove")] == ["n2"] * removed


def test_a_hang_is_forgotten_after_good_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Minutes apart, by a program that lets no thread of its process answer."""
    monkeypatch.setattr(fleet_module, "PATIENT_S", 60.0)
    config = config_of(tmp_path, strikes=2)
    nodes = Nodes(config, FOUR)

    async def act(story: Story) -> None:
        await story.training(4)
        for number in (1, 2):
            nodes.make_steps(PROVEN_STEPS)
            await story.heard_of(nodes.step)
            await stands_still(story, {"idle": False}, number)
            await story.training(4)

    status, story = play(config, nodes, act)
    assert status == EXIT_STOPPED and not story.events("remove")
    assert [event["fault"] for event in story.events("blame")] == ["device", "device"]


def test_a_process_that_is_stopped_while_a_generation_forms(tmp_path: Path) -> None:
    """No step shows that it stands still, and ``first_step_limit_s`` is ten minutes: its agent sees it. Found by a soak
    in which the generation formed for 33 s, until the next fault came."""
    config = config_of(tmp_path, strikes=1)
    nodes = Nodes(config, FOUR)
    nodes.stopped.add("n2")

    async def act(story: Story) -> None:
        await story.training(4)

    status, story = play(config, nodes, act)
    assert status == EXIT_STOPPED and not story.events("remove")
    assert [event["cause"] for event in story.events("detect")] == ["n2/0: stall is stopped"]
    assert [event["fault"] for event in story.events("blame")] == ["stall"]
