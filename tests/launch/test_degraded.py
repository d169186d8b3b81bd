"""The launcher's surroundings fail it, and no run ends for that: processes that cannot be started, a deleted run
folder, output that nobody reads, a task that dies."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from llm_launch import supervise as supervise_module
from llm_launch import ticker as ticker_module
from llm_launch.copy_files import make_run_folder, run_folder
from llm_launch.journal import MEMORY_NAME, Journal
from llm_launch.supervise import StopRequests, launch_elastic
from llm_parallel.config.tree import ElasticConfig
from llm_parallel.errors import EXIT_STOPPED
from llm_parallel.jsonlines import read_jsonlines
from llm_parallel.lines import note, reader_is_gone
from tests.launch.fake_agents import Nodes, Story, play
from tests.launch.test_controller import FOUR, config_of
from tests.launch.test_stop_requests import NoStarter
from tests.launch.test_stop_requests import config_of as lonely_config


def test_an_agent_that_cannot_be_started_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine has no process left for a moment. Signs of life of the others, and the run, go on."""
    monkeypatch.setattr(ticker_module, "START_AGAIN_S", 0.05)
    config = config_of(tmp_path)
    refusals = [0]

    class Crowded(Nodes):
        def start(self, node: str) -> None:
            """Fails twice, as fork does."""
            refusals[0] += 1
            if refusals[0] <= 2:
                raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            super().start(node)

    nodes = Crowded(config, FOUR)

    async def act(story: Story) -> None:
        await story.training(4)
        nodes.make_steps(1)
        await story.heard_of(nodes.step)
        nodes.lose("n3")
        await story.training(3)
        nodes.make_steps(1)
        await story.training(4)

    status, story = play(config, nodes, act)
    assert status == EXIT_STOPPED and refusals[0] == 3
    assert [event["node"] for event in story.events("not_started")] == ["n3", "n3"]
    assert len(story.events("detect")) == 1, "no other agent was lost meanwhile"


def test_a_task_that_dies_ends_the_run_with_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody would send signs of life any more, and every agent would end its workers without a word."""
    config = config_of(tmp_path)
    nodes = Nodes(config, FOUR)

    def broken(*_: object) -> None:
        raise ZeroDivisionError("of this test")

    async def act(story: Story) -> None:
        await story.training(4)
        nodes.make_steps(2)
        await story.heard_of(nodes.step)
        monkeypatch.setattr(story.controller._ticker, "tick", broken)
        await story.until(lambda: story.controller.fleet.phase.value == "failed", "the end")

    status, story = play(config, nodes, act)
    assert status == 1
    cause = story.events("fail")[0]["cause"]
    assert "ZeroDivisionError: of this test" in cause and "ticker.py" in cause
    assert nodes.kept == [True] * 4, "memory copies are kept"


def test_agents_that_are_not_admitted_any_more_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost node could never come back, and nobody would say why."""
    config = config_of(tmp_path)
    nodes = Nodes(config, FOUR)

    def broken(_: object) -> int:
        raise ZeroDivisionError("of this test")

    async def act(story: Story) -> None:
        await story.training(4)
        fleet = story.controller.fleet
        monkeypatch.setattr(fleet.door, "enter", broken)
        _, writer = await asyncio.open_connection(*fleet.address)
        await story.until(lambda: fleet.phase.value == "failed", "the end")
        writer.close()

    status, story = play(config, nodes, act)
    assert status == 1 and nodes.kept == [True] * 4
    assert "ZeroDivisionError: of this test" in story.events("fail")[0]["cause"]


@pytest.mark.parametrize(
    "kept",
    [
        {"strikes": 5},
        {"removed": [["n1"]]},
        {"trained": [7]},
        {"errors": {"a": 1}},
        {"strikes": [["n1", 0, [["x", ""]]]]},
    ],
)
def test_a_memory_of_faults_that_nobody_wrote_is_said(
    kept: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It hinders no start."""
    config = config_of(tmp_path)
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / MEMORY_NAME).write_text(json.dumps(kept))

    async def act(story: Story) -> None:
        await story.training(4)

    status, story = play(config, Nodes(config, FOUR), act)
    assert status == EXIT_STOPPED and not story.controller.ledger.removed
    assert "is not what an earlier start wrote" in capsys.readouterr().err


def test_a_deleted_run_folder_is_made_anew(tmp_path: Path) -> None:
    """With what the next start needs to find the memory copies; events go on in a new file."""
    run_dir, shm = tmp_path / "run", tmp_path / "shm"
    run_dir.mkdir()
    shm.mkdir()
    make_run_folder(shm, run_dir)
    (run_dir / "config.yaml").write_text("seed: 7\n")
    before = run_folder(shm, run_dir)
    journal = Journal(run_dir, ElasticConfig(), "secret")
    status: dict[str, Any] = {"step": 7, "generation": 3, "world_size": 2, "excluded": [], "state": "training"}
    try:
        journal.remember({"trained": [[3, 2, [1]]]})
        journal.write_status(status)
        journal._writer.submit(lambda: None).result()
        shutil.rmtree(run_dir)
        journal.write_status(status)
    finally:
        journal._writer.submit(lambda: None).result()
        journal.close()
    assert run_folder(shm, run_dir) == before, "the run is still the same"
    assert (run_dir / "config.yaml").read_text() == "seed: 7\n" and (run_dir / "logs").is_dir()
    assert json.loads((run_dir / MEMORY_NAME).read_text()) == {"trained": [[3, 2, [1]]]}
    assert [event["event"] for event in read_jsonlines(run_dir / "events.jsonl")] == ["folder_restored"]


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    journal = Journal(run_dir, ElasticConfig(), "secret")
    (run_dir / MEMORY_NAME).mkdir()
    for _ in range(3):
        journal.remember({})
    journal._writer.submit(lambda: None).result()
    (run_dir / MEMORY_NAME).rmdir()
    journal.remember({})
    journal.close()
    told = [line for line in capsys.readouterr().err.splitlines() if "written" in line]
    assert len(told) == 2 and "cannot be written" in told[0] and "written again" in told[1]


def test_output_that_nobody_reads_ends_the_run_as_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``launch … | head``: the run would save, and ends with the status of a stop."""

    class Silent(NoStarter):
        def begin(self, port: int) -> None:
            """The reader ends as soon as the launcher listens."""
            os.close(reading)

    reading, writing = os.pipe()
    monkeypatch.setattr(supervise_module, "STANDARD_OUTPUT", writing)
    monkeypatch.setattr(supervise_module, "READER_S", 0.01)
    starter = Silent(lonely_config(tmp_path, wait_s=3600.0))
    assert launch_elastic(starter, "cpu", StopRequests()) == EXIT_STOPPED
    os.close(writing)
    kinds = [event["event"] for event in read_jsonlines(tmp_path / "run" / "events.jsonl")]
    assert kinds == ["unheard"]


def test_which_output_has_a_reader(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with (tmp_path / "log").open("w") as file:
        assert not reader_is_gone(file.fileno()) and not reader_is_gone(writing)
    os.close(reading)
    assert reader_is_gone(writing)
    os.close(writing)
    assert not reader_is_gone(writing), "nothing is known of a descriptor that is closed"
    master, terminal = os.openpty()
    os.close(master)
    assert not reader_is_gone(terminal), "a terminal says itself that it is closed, unless its user asked it not to"
    os.close(terminal)


def test_a_message_to_nobody_is_lost_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        monkeypatch.setattr("sys.stderr", stream)
        note("one")
        note("two")
