"""A run that is asked to end exits with the status that says so, whenever the request comes."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest

from llm_launch import controller as controller_module
from llm_launch import wire
from llm_launch.absence import Absence
from llm_launch.controller import Controller, Stopped
from llm_launch.starters import AgentStarter
from llm_launch.states import EXIT_TOO_FEW
from llm_launch.supervise import StopRequests, launch_elastic
from llm_parallel.config.tree import ElasticConfig, ModelConfig, RunConfig
from llm_parallel.errors import EXIT_STOPPED

SECRET = "of this test"


def config_of(folder: Path, **elastic: Any) -> RunConfig:
    """A run that copies nothing."""
    return RunConfig(
        run_dir=str(folder / "run"),
        model=ModelConfig(vocab_size=100),
        elastic=ElasticConfig(replicate_every_steps=0, **elastic),
    )


class NoStarter:
    """Starts no agent; a test acts in ``begin``."""

    secret, host = SECRET, "127.0.0.1"

    def __init__(self, config: RunConfig) -> None:
        self.config, self.expected, self.begun = config, {"n1": 1}, False

    def begin(self, port: int) -> None:
        """Asks the launcher to end as soon as it listens."""
        self.begun = True
        signal.raise_signal(signal.SIGTERM)

    def start(self, node: str) -> None:
        """Never."""

    def look(self) -> list[Absence]:
        """None."""
        return []

    def condemn(self, node: str, reason: str) -> None:
        """Never."""

    def end(self) -> None:
        """Nothing to end."""


def test_a_stop_before_any_agent_is_there(tmp_path: Path) -> None:
    """With an hour to wait for devices."""
    starter = NoStarter(config_of(tmp_path, wait_s=3600.0))
    assert launch_elastic(starter, "cpu", StopRequests()) == EXIT_STOPPED
    assert starter.begun


@pytest.mark.parametrize("already", ["TERM", "USR1"])
def test_a_stop_before_the_launcher_listened(already: str, tmp_path: Path) -> None:
    """As the batch script hands it on: nothing is started."""
    starter = NoStarter(config_of(tmp_path, wait_s=3600.0))
    requests = StopRequests(already)
    assert launch_elastic(starter, "cpu", requests) == EXIT_STOPPED
    assert not starter.begun and requests.time_is_up == (already == "USR1")


def test_without_a_stop_it_is_too_few_devices(tmp_path: Path) -> None:
    class Silent(NoStarter):
        def begin(self, port: int) -> None:
            """Nobody comes."""

    starter = Silent(config_of(tmp_path, wait_s=0.05))
    assert launch_elastic(starter, "cpu", StopRequests()) == EXIT_TOO_FEW


async def with_an_agent(controller: Controller, devices: int, phase: str, hear: list[str], term: bool) -> int:
    """Exit status of a run with one agent that is asked to end in a phase."""
    port = await controller.listen("127.0.0.1")
    running = asyncio.create_task(controller.run())
    channel = await wire.connect("127.0.0.1", port, SECRET)
    hello = {"is": "hello", "node": "n1", "host": "127.0.0.1", "devices": [0], "copies": ["127.0.0.1", 1], "pid": 1}
    channel.send(hello)
    for device in range(devices):
        channel.send({"is": "worker", "device": device, "pid": 1, "number": device, "generation": 0})
    while controller.fleet.phase.value != phase or not controller.fleet.roster.nodes:
        await asyncio.sleep(0.01)
    if term:
        channel.send({"is": "terminated"})
    else:
        controller.stop()
    while (message := await channel.receive()) is not None:
        hear.append(message["is"])
        if message["is"] == "end":
            assert message["keep"], "copies of an earlier start are not on disk perhaps"
            break
    return await running


@pytest.mark.parametrize("term", [False, True], ids=["asked", "an agent got TERM"])
@pytest.mark.parametrize(
    ("devices", "needed", "phase"),
    [(0, 1, "waiting"), (1, 2, "waiting"), (1, 1, "forming")],
    ids=["waiting for workers", "waiting for devices", "forming"],
)
def test_a_stop_while_it_waits_or_forms(devices: int, needed: int, phase: str, term: bool, tmp_path: Path) -> None:
    """Nothing was trained, so nothing is waited for. TERM reaches agents alone when SLURM preempts a job."""
    config = config_of(tmp_path, wait_s=3600.0, min_devices=needed)
    starter: AgentStarter = NoStarter(config)
    controller = Controller(config, Path(config.run_dir), starter, "cpu")
    heard: list[str] = []
    try:
        ending = asyncio.wait_for(with_an_agent(controller, devices, phase, heard, term), 120)
        assert asyncio.run(ending) == EXIT_STOPPED
    finally:
        controller.close()
    assert heard[-1] == "end"


def test_a_stop_when_too_few_devices_are_left_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state is in memory, and at its time limit a SLURM job has to go back to the queue for it."""
    monkeypatch.setattr(controller_module, "STOP_WAIT_S", 0.0)
    config = config_of(tmp_path, wait_s=3600.0, min_devices=2)
    controller = Controller(config, Path(config.run_dir), NoStarter(config), "cpu")
    controller._trained = True
    try:
        ending = asyncio.wait_for(with_an_agent(controller, 1, "waiting", [], False), 120)
        assert asyncio.run(ending) == EXIT_TOO_FEW
    finally:
        controller.close()


@pytest.mark.parametrize(("on_disk", "keep"), [(7, False), (6, True)])
@pytest.mark.parametrize(("done", "status"), [(True, 0), (False, EXIT_STOPPED)])
def test_copies_go_only_when_the_last_step_is_on_disk(
    done: bool, status: int, on_disk: int, keep: bool, tmp_path: Path
) -> None:
    """All workers have said that they saved; what counts is what is there."""
    config = config_of(tmp_path)
    controller = Controller(config, Path(config.run_dir), NoStarter(config), "cpu", lambda: on_disk)
    controller.fleet.step = 7
    try:
        with pytest.raises(Stopped) as end:
            asyncio.run(controller._end(done))
    finally:
        controller.close()
    assert (end.value.status, end.value.keep) == (status, keep)
