"""What the controller decides, with agents that have no processes: no decision here depends on how fast anything is."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llm_launch.blame import Device
from llm_launch.controller import Controller
from llm_launch.placement import Trained
from llm_launch.show import show_status
from llm_parallel.config.tree import (
    CheckpointConfig,
    ElasticConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from llm_parallel.errors import EXIT_STOPPED
from llm_parallel.jsonlines import read_jsonlines
from tests.launch.fake_agents import Nodes, Story, play

FOUR = ["n1", "n2", "n3", "n4"]


def config_of(folder: Path, **elastic: Any) -> RunConfig:
    """Four replicas that write no checkpoint."""
    return RunConfig(
        run_dir=str(folder / "run"),
        model=ModelConfig(vocab_size=100, num_layers=4),
        parallel=ParallelConfig(dp=4),
        train=TrainConfig(global_batch_size=8, steps=100_000),
        checkpoint=CheckpointConfig(interval_steps=None),
        elastic=ElasticConfig(heartbeat_s=0.05, lost_after_s=30.0, wait_s=3600.0, **elastic),
    )


def test_two_nodes_that_hold_each_others_copies_are_waited_for(tmp_path: Path) -> None:
    """The first one's share is in no other node's memory. Its steps are worth a wait of 100 times a step's second."""
    config = config_of(tmp_path)
    nodes = Nodes(config, FOUR)

    async def act(story: Story) -> None:
        await story.training(4)
        for step in (98, 1, 1):
            nodes.make_steps(step)
            await story.heard_of(nodes.step)
        nodes.lose("n2", "n3")
        await story.until(lambda: story.events("form")[1:], "a new generation")
        await story.training(4)

    status, story = play(config, nodes, act)
    assert status == EXIT_STOPPED
    waited = story.events("wait")[0]
    assert waited["cause"].startswith("memory copies are on lost nodes: ") and waited["step"] == 100
    assert waited["seconds"] == 100.0, "as long as making the steps again would take"
    again = story.events("form")[1]
    assert (again["cause"], again["step"]) == ("memory", 100) and story.controller.journal.lost_steps == 0
    assert not story.events("remove")


def test_they_are_not_waited_for_longer_than_making_the_steps_again_takes(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    nodes = Nodes(config, FOUR)
    nodes.step_s, nodes.restarts = 0.005, False

    async def act(story: Story) -> None:
        await story.training(4)
        for step in (98, 1, 1):
            nodes.make_steps(step)
            await story.heard_of(nodes.step)
        nodes.lose("n2", "n3")
        await story.training(2)

    _, story = play(config, nodes, act)
    assert [event["seconds"] for event in story.events("wait")] == [0.5]
    again = story.events("form")[1]
    assert (again["cause"], again["step"]) == ("checkpoint or new run", None)
    assert story.controller.journal.lost_steps == 100, "there is no checkpoint"


@pytest.mark.parametrize("copies", [True, False], ids=["from memory", "without copies"])
def test_a_lost_node_shrinks_the_run_and_comes_back(copies: bool, tmp_path: Path) -> None:
    config = config_of(tmp_path, replicate_every_steps=int(copies))
    nodes = Nodes(config, FOUR)

    async def act(story: Story) -> None:
        await story.training(4)
        for _ in range(3):
            nodes.make_steps(1)
            await story.heard_of(nodes.step)
        nodes.lose("n3")
        await story.training(3)
        nodes.make_steps(1)  # a lost agent is started again after the first step of the recovery
        await story.training(4)

    _, story = play(config, nodes, act)
    assert [event["world_size"] for event in story.events("form")] == [4, 3, 4]
    restored = [event["step"] for event in story.events("form")]
    assert restored == ([None, 3, 4] if copies else [None, None, None])
    assert story.controller.journal.lost_steps == (0 if copies else 4) and not story.events("remove")


def made_all_steps(story: Story) -> bool:
    """Whether the controller knows that every worker has made the steps that there are now."""
    return all(worker.step >= story.nodes.step for worker in story.controller.fleet.workers())


def test_a_throttled_worker_is_removed(tmp_path: Path) -> None:
    """One whose part of a step takes five times that of the others, three times in a row."""
    config = config_of(tmp_path, probe_every_steps=2)
    nodes = Nodes(config, FOUR)

    async def act(story: Story) -> None:
        await story.training(4)
        nodes.own_s["n2", 0] = 5.0
        while not story.events("remove"):
            await story.until(lambda: story.controller.fleet.phase.value == "training", "training")
            nodes.make_steps(1)
            nodes.beats += 1  # the probe of this step
            await story.until(lambda: made_all_steps(story), "the step, or the recovery that goes back before it")
        await story.training(3)

    _, story = play(config, nodes, act)
    assert [(event["node"], event["device"]) for event in story.events("remove")] == [("n2", 0)]
    assert "its part of a step takes 5.0 times that of 3 other replicas" in story.events("blame")[0]["cause"]
    assert nodes.agents["n2"].retired == [0]


def test_processes_that_wait_for_files_are_waited_for(tmp_path: Path) -> None:
    """No progress for ten thousand times a step: an event, and nobody is blamed."""
    config = config_of(tmp_path, first_step_limit_s=1e9)
    nodes = Nodes(config, FOUR)
    nodes.stack = 'File "/usr/lib/llm_parallel/jsonlines.py", line 30, in append'

    async def act(story: Story) -> None:
        await story.training(4)
        for _ in range(5):
            nodes.make_steps(1)
            await story.heard_of(nodes.step)
        nodes.age_s = 10_000.0
        await story.until(lambda: story.events("stall"), "the event")
        nodes.age_s = 0.0
        nodes.make_steps(1)
        await story.heard_of(nodes.step)

    _, story = play(config, nodes, act)
    assert story.events("stall")[0]["cause"].endswith(": waiting for files")
    assert not any(story.events(kind) for kind in ("detect", "blame", "remove"))


def test_a_killed_worker_whose_end_is_late_is_no_second_fault(tmp_path: Path) -> None:
    """On a busy machine a killed process is still listed when the next generation is planned. It gets no part in it, so
    that its end, when it comes, is not taken for another fault of its device."""
    config = config_of(tmp_path)
    nodes = Nodes(config, FOUR)

    async def act(story: Story) -> None:
        await story.training(4)
        fleet = story.controller.fleet
        worker = fleet.roster.worker(Device("n2", 0))
        assert worker is not None
        fleet.kill([worker])  # as for a hang; the agent has not seen its end yet
        nodes.restarts = False
        nodes.lose("n3")
        await story.training(2)
        assert {device.node for device in fleet.placement.devices} == {"n1", "n4"}  # type: ignore[union-attr]
        agent = nodes.agents["n2"]
        agent.tell({"is": "exit", "device": 0, "status": -9, "host_memory": False, "number": 0})
        agent.tell({"is": "worker", "device": 0, "pid": 2, "number": 1, "generation": 0})
        await story.training(3)

    _, story = play(config, nodes, act)
    assert not story.events("remove")
    assert [event["cause"] for event in story.events("blame") if "n2" in event["cause"]] == []


def test_copies_of_other_data_are_not_used_and_that_is_said(tmp_path: Path) -> None:
    config, run_dir = config_of(tmp_path), tmp_path / "run"

    def begun(of: RunConfig) -> Controller:
        controller = Controller(of, run_dir, Nodes(of, FOUR), "cpu")  # type: ignore[arg-type]
        controller.copies.trained.append(Trained(1, 4, (1, 1, 1, 1, 4))) if not controller.copies.trained else None
        controller._remember()
        controller.close()
        return controller

    begun(config)
    assert begun(config) and not list(read_jsonlines(run_dir / "events.jsonl"))
    other = config.model_copy(update={"data": config.data.model_copy(update={"seq_length_tokens": 64})})
    begun(other)
    (event,) = read_jsonlines(run_dir / "events.jsonl")
    assert event["event"] == "copies_ignored" and "another section data than" in event["cause"]


def test_a_layout_that_holds_more_of_the_model_is_in_the_status(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    config = config.model_copy(update={"parallel": ParallelConfig(dp=1, tp=4)})
    nodes = Nodes(config, FOUR)

    async def act(story: Story) -> None:
        await story.training(4)
        nodes.restarts = False
        nodes.lose("n2", "n3")
        await story.until(lambda: story.events("form")[1:], "a new generation")
        await story.training(2)

    _, story = play(config, nodes, act)
    (crowd,) = story.events("crowded")
    assert "elastic.min_devices=4" in crowd["cause"] and "GiB of tensors instead of" in crowd["cause"]
    out = io.StringIO()
    show_status(tmp_path / "run", Console(file=out, width=120))
    assert crowd["cause"] in out.getvalue().split("Nodes")[0]


@pytest.mark.parametrize(("later", "kept"), [(1, False), (-1, True)])
def test_a_run_that_stops_tells_the_step_that_was_saved(later: int, kept: bool, tmp_path: Path) -> None:
    """Workers may make a step, save it and end before the sign of life that would tell of it."""
    nodes = Nodes(config_of(tmp_path), FOUR)

    async def act(story: Story) -> None:
        await story.training(4)
        nodes.make_steps(3)
        await story.heard_of(nodes.step)
        story.controller._newest_step = lambda: nodes.step + later

    status, story = play(nodes.config, nodes, act)
    (stopped,) = story.events("stopped")
    assert status == EXIT_STOPPED and stopped["step"] == nodes.step + max(later, 0)
    assert (stopped.get("cause") is not None) == kept
