"""What an agent tells a controller that was restarted."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest

from llm_launch import node_workers, wire
from llm_launch.agent import Agent
from llm_launch.agent_settings import AgentSettings
from llm_launch.copy_transfer import CopyServer
from llm_launch.fleet import Fleet
from llm_launch.journal import Journal
from llm_launch.node_workers import Worker
from llm_launch.wire import Channel, Message
from tests.launch.test_controller import config_of


class Sent:
    """The agent's end of a connection: notes what is sent."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def send(self, message: Message) -> None:
        """Notes it."""
        self.messages.append(message)

    def close(self) -> None:
        """Nothing."""


def settings_of(folder: Path, **changes: Any) -> AgentSettings:
    """An agent with two devices and no controller."""
    values = {"node": "n1", "host": "127.0.0.1", "controllers": (), "devices": (0, 1), "run_dir": folder,
              "run_file": "", "copies_root": folder, "copies_name": "run", "heartbeat_s": 1.0, "lost_after_s": 1.0,
              "secret": "of this test"}  # fmt: skip
    return AgentSettings(**{**values, **changes})


def test_workers_that_the_agent_has_ended_are_not_offered(tmp_path: Path) -> None:
    """Their exits may be reported later than the controller's return: it would blame the devices for them."""
    agent = Agent(settings_of(tmp_path))
    told = Sent()
    agent.controller = cast(Channel, told)
    try:
        for number, ready in ((1, True), (2, True), (3, False)):
            agent.here.workers[number] = Worker(number, number, cast(Channel, Sent()), ready=ready)
        for worker in agent.here.workers.values():
            agent.here.announce(worker)
        assert [message["number"] for message in told.messages] == [1, 2]
        told.messages.clear()
        agent.here.kill_all()
        agent.here.workers[3].ready = True  # its message was on the way
        for worker in agent.here.workers.values():
            agent.here.announce(worker)
        assert told.messages == []
    finally:
        agent.copy_server.close()


@pytest.mark.processes
def test_an_agent_imports_no_configuration() -> None:
    """It has to be there in a moment; what reads the run file is imported by its zygote."""
    heavy = "sorted({'pydantic', 'torch', 'yaml', 'numpy'} & {*sys.modules})"
    told = subprocess.run([sys.executable, "-c", f"import sys, llm_launch.agent; print({heavy})"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert told.stdout == "[]\n"


@pytest.mark.processes
@pytest.mark.parametrize("stopped", [True, False])
def test_a_zygote_that_is_stopped_is_replaced(stopped: bool, tmp_path: Path) -> None:
    """It would never report that its worker has ended. One that runs is left alone: the process may be stuck."""
    agent = Agent(settings_of(tmp_path))
    with subprocess.Popen(["sleep", "600"]) as zygote:
        try:
            if stopped:
                zygote.send_signal(signal.SIGSTOP)
                os.waitid(os.P_PID, zygote.pid, os.WSTOPPED)
            worker = agent.here.workers[1] = Worker(1, 0, None, pid=1)
            agent.here._zygote = zygote
            agent.here._check_reported(worker)
            assert (zygote.wait(60) == -signal.SIGKILL) if stopped else zygote.poll() is None
        finally:
            zygote.kill()
            agent.copy_server.close()


@pytest.mark.parametrize("vital", [True, False])
def test_a_vital_task_that_dies_ends_the_agent(vital: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The launcher starts another; one that can be done without is said and nothing more."""

    async def broken() -> None:
        raise ZeroDivisionError("of this test")

    async def act() -> Agent:
        agent = Agent(settings_of(tmp_path))
        try:
            agent.here.workers[1] = Worker(1, 0, cast(Channel, Sent()), ready=True)
            agent._spawn(broken(), vital=vital)
            while agent._tasks:
                await asyncio.sleep(0)
            return agent
        finally:
            agent.copy_server.close()

    agent = asyncio.run(act())
    assert agent.here.ending == agent._broken == agent.here.workers[1].killed == vital
    assert "ZeroDivisionError: of this test" in capsys.readouterr().err


def test_a_log_that_cannot_be_opened_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a full disk, or where a file has the folder's name: the workers train without, and no device is blamed."""
    (tmp_path / "logs").write_text("")
    agent = Agent(settings_of(tmp_path))
    try:
        fd = agent.here._open_log()
        assert os.path.samestat(os.fstat(fd), Path(os.devnull).stat())
        os.close(fd)
        assert "the workers here have no log" in capsys.readouterr().err
    finally:
        agent.copy_server.close()


def test_the_agent_sees_processes_that_are_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that stand still for five seconds, by a signal; not one that is woken in between, as a throttled one is."""
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    used = 7
    monkeypatch.setattr(node_workers, "processor_ticks", lambda pid: used)
    agent = Agent(settings_of(tmp_path))
    try:
        agent.here.workers[3] = worker = Worker(3, 0, None, pid=child.pid)
        assert not agent.here.stopped(1.0)
        child.send_signal(signal.SIGSTOP)
        os.waitpid(child.pid, os.WUNTRACED)
        early = [agent.here.stopped(at) for at in (2.0, 3.0, 6.6, 6.8, 7.0)]
        assert early == [[]] * 5, "it has just been looked, or it is too early"
        assert agent.here.stopped(7.2) == [worker]
        used += 1
        assert [agent.here.stopped(at) for at in (8.0, 12.0)] == [[], []] and agent.here.stopped(13.0) == [worker]
        child.send_signal(signal.SIGCONT)
        os.waitpid(child.pid, os.WCONTINUED)
        assert not agent.here.stopped(14.0) and worker.still is None
    finally:
        child.kill()
        child.wait()
        agent.copy_server.close()


def test_processor_time_of_a_process() -> None:
    """As the system's own call says, within the hundredth of a second that a tick is, and what passed in between."""
    before = time.process_time()
    ticks = node_workers.processor_ticks(os.getpid())
    hertz = os.sysconf("SC_CLK_TCK")
    assert before - 2 / hertz <= ticks / hertz <= time.process_time() + 2 / hertz
    assert node_workers.processor_ticks(2**22 + 1) == 0


def test_the_controller_and_the_copies_speak_ipv6(tmp_path: Path) -> None:
    """On a host that has nothing else."""
    config = config_of(tmp_path)

    async def meet() -> bool:
        fleet = Fleet(config.elastic, "of this test", Journal(tmp_path, config.elastic, "of this test"))
        port = await fleet.listen("::1")
        channel = await wire.connect("::1", port, "of this test")
        channel.send({"is": "here", "node": "n1"})
        answered = await channel.receive()
        channel.close()
        assert fleet.admitting is not None
        fleet.admitting.cancel()
        fleet.journal.close()
        return answered is not None and answered["is"] == "needs"

    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"this machine has no ::1: {error.strerror}")
    assert asyncio.run(meet())
    server = CopyServer("::1", tmp_path, "of this test")
    wire.connect_blocking(*server.address, "of this test").close()
    server.close()
