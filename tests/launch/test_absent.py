"""Nodes that do not join: each is an event with its reason and stands in the status, and the run goes on without it or
ends at once. Fake agents speak to a real controller; fake commands stand for SLURM's."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from llm_launch import agent as agent_module
from llm_launch import attendance as attendance_module
from llm_launch import network as network_module
from llm_launch import ticker as ticker_module
from llm_launch.absence import Absence, absences, alike
from llm_launch.agent import Agent
from llm_launch.agent_settings import AgentSettings, devices_here
from llm_launch.agent_step import AgentStep
from llm_launch.blame import Device, Evidence, Fault, Kind, blame
from llm_launch.controller import Controller
from llm_launch.copy_files import run_identity
from llm_launch.ledger import Ledger
from llm_launch.live_run import read_lines
from llm_launch.needs import lacking, needs_of
from llm_launch.network import address_for
from llm_launch.show import show_status
from llm_launch.slurm import SlurmJob, is_working
from llm_launch.starters import LocalStarter
from llm_launch.steps import SlurmStarter, groups
from llm_launch.supervise import starter_of_job
from llm_parallel.config.tree import DataConfig, RunConfig, Source
from llm_parallel.errors import EXIT_USER_ERROR, UserError
from tests.launch.fake_agents import SECRET, Nodes, Story, play
from tests.launch.test_agent import settings_of
from tests.launch.test_controller import FOUR, config_of

UNREACHED = ["srun: error: Task launch for StepId=1.4 failed on node n3: Communication connection failure",
             "srun: error: Application launch failed: Communication connection failure",
             "srun: Job step aborted"]  # fmt: skip
"""As srun of SLURM 22.05 says it; so are the other texts below."""


@pytest.mark.parametrize(
    ("said", "status", "reason", "passing"),
    [
        (UNREACHED, 233, "Communication connection failure (srun ended with status 233)", True),
        (["slurmstepd-n3: error: execve(): /nosuch/python: No such file or directory",
          "srun: error: n3: task 0: Exited with exit code 2"], 2,
         "execve(): /nosuch/python: No such file or directory (Exited with exit code 2)", False),
        (["Traceback (most recent call last):", "KeyError: 'X'", "srun: error: n3: task 0: Exited with exit code 1"], 1,
         "KeyError: 'X' (Exited with exit code 1)", False),
        (["srun: error: n3: task 0: Killed", "srun: Force Terminated StepId=1.3"], 137,
         "its agent said nothing (Killed)", True),
        (["srun: error: Unable to create step for job 1: More processors requested than permitted"], 1,
         "Unable to create step for job 1: More processors requested than permitted (srun ended with status 1)", False),
        (["srun: Job 1 step creation temporarily disabled, retrying (Requested nodes are busy)",
          "srun: error: Unable to create step for job 1: Requested node configuration is not available"], 1,
         "Unable to create step for job 1: Requested node configuration is not available (srun ended with status 1)",
         True),
        (["slurmstepd-n3: error: Exceeded job memory limit",
          "slurmstepd-n3: error: StepId=2.1 exceeded memory limit (1099952128 > 734003200), being killed",
          "slurmstepd-n3: error: *** STEP 2.1 ON n3 CANCELLED AT 2026-11-30T16:10:24 ***",
          "srun: error: n3: task 0: Killed"], 137,
         "StepId=2.1 exceeded memory limit (1099952128 > 734003200), being killed (Killed)", False),
        (["slurmstepd-n3: error: Detected 1 oom-kill event(s) in StepId=2.0. Some of your processes have been killed",
          "agent n3: something else", "srun: error: n3: task 0: Out Of Memory"], 137,
         "Detected 1 oom-kill event(s) in StepId=2.0. Some of your processes have been killed (Out Of Memory)",
         False),
        (["\x1b[2Jbad"], 1, "␛[2Jbad (srun ended with status 1)", False),
        ([], 1, "its agent said nothing (srun ended with status 1)", False),
    ],
)  # fmt: skip
def test_why_an_agent_did_not_come(said: list[str], status: int, reason: str, passing: bool) -> None:
    assert absences(["n3"], said, status) == [Absence("n3", reason, passing, ended=True)]


def test_of_a_step_of_several_nodes_only_those_that_srun_names_are_at_fault() -> None:
    found = absences(["n1", "n2", "n3"], UNREACHED, 233)
    assert found == [Absence("n3", "Communication connection failure", True, True)]
    assert absences(["n1", "n2"], ["srun: error: n1: task 0: Killed"], 137) == []
    killed = ["slurmstepd-n2: error: Detected 1 oom-kill event(s)", "srun: error: n2: task 1: Out Of Memory"]
    assert absences(["n1", "n2"], killed, 137) == [Absence("n2", "Detected 1 oom-kill event(s)", False, True)]


def test_what_all_agents_said_is_said_once() -> None:
    same = [Absence(node, f"no python on {node}", False) for node in FOUR]
    assert alike(same) == "the agents of all 4 nodes ended alike: no python on n1"
    assert alike(same[:1]) == "the agent of n1 ended again: no python on n1"
    assert alike([same[0], Absence("n2", "x", False)]) == "no node has an agent: n1: no python on n1; n2: x"


@given(st.integers(1, 3000), st.integers(1, 40))
def test_the_first_steps_are_few_and_hold_every_node_once(count: int, most: int) -> None:
    names = [f"n{number}" for number in range(count)]
    found = groups(names, most)
    assert [name for names in found for name in names] == names and len(found) == min(most, count)
    sizes = [len(names) for names in found]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("state", "working"),
    [("allocated", True), ("mixed", True), ("allocated*", True), ("mixed@", True), ("allocated$", True),
     ("mixed-", True), ("draining", True), ("draining@", True), ("reserved", True), ("idle~", False), ("idle#", False),
     ("idle%", False), ("mixed^", False), ("down", False), ("down*", False), ("drained*", False), ("unknown", False),
     ("", False), ("fail", False), ("powered_down", False)],
)  # fmt: skip
def test_on_which_nodes_a_step_can_be_started(state: str, working: bool) -> None:
    """sinfo's manual lists the signs that stand behind the words."""
    assert is_working(state) == working


NAMES = {"n1": "127.0.1.1", "n2": "10.7.0.2", "n3": "10.7.0.3", "here": "127.0.0.1", "me": "10.9.0.1"}
WAYS = {"10.7.0.2": "10.7.0.1", "10.7.0.3": "10.7.0.1"}


@pytest.mark.parametrize(
    ("others", "own", "address"),
    [(["n2", "n3"], "n1", "10.7.0.1"), (["away", "n3"], "n1", "10.7.0.1"), ([], "n1", "127.0.0.1"),
     (["here", "here"], "here", "127.0.0.1"), (["away"], "me", "10.9.0.1"), (["away"], "n1", None)],
)  # fmt: skip
def test_the_controller_listens_where_other_nodes_reach_it(
    others: list[str], own: str, address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Debian and Ubuntu write 127.0.1.1 beside a machine's own name. Where all nodes are of one machine, loopback does;
    a node that nobody can find says so."""

    def resolve(name: str) -> str:
        if name not in NAMES:
            raise socket.gaierror(-2, "Name or service not known")
        return NAMES[name]

    monkeypatch.setattr(network_module, "resolve", resolve)
    monkeypatch.setattr(network_module, "own_address", lambda towards: WAYS[towards[0]])
    if address is None:
        with pytest.raises(OSError, match="away can reach"):
            address_for(others, own)
    else:
        assert address_for(others, own) == address


def test_the_first_address_of_a_name_is_of_ipv4() -> None:
    assert network_module.resolve("127.0.0.1") == "127.0.0.1" and network_module.resolve("::1") == "::1"
    assert network_module.is_loopback("127.0.1.1") and network_module.is_loopback("::1%lo")


def test_a_node_uses_no_more_gpus_than_slurm_gave_it() -> None:
    step = {"SLURM_STEP_ID": "0"}
    assert devices_here([0, 1, 2, 3], {**step, "SLURM_GPUS_ON_NODE": "2"}) == (0, 1)
    assert devices_here([0, 1], {**step, "SLURM_GPUS_ON_NODE": "8"}) == (0, 1)
    assert devices_here([0, 1], step) == devices_here([0, 1], {"SLURM_GPUS_ON_NODE": "1"}) == (0, 1)


def test_an_agent_without_the_secret_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with --export=NONE for its step."""
    monkeypatch.delenv("LLM_PARALLEL_SECRET", raising=False)
    told = {"controller": "h:1", "node": "auto", "host": "h", "devices": "0", "run-dir": "r", "run-file": "f",
            "replica-dir": "d", "copies": "c", "heartbeat-s": "1", "lost-after-s": "1"}  # fmt: skip
    with pytest.raises(UserError, match="--export=ALL"):
        AgentSettings.parse([part for name, value in told.items() for part in (f"--{name}", value)])


@pytest.fixture
def shared(tmp_path: Path) -> tuple[RunConfig, Path]:
    """A run with one source of tokens, and its run file."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    run_identity(run_dir)
    run_file = run_dir / "config.yaml"
    run_file.write_text("seed: 1\n")
    for ending in (".bin", ".idx"):
        (tmp_path / f"docs{ending}").write_bytes(b"12345678")
    data = DataConfig(train=(Source(path=str(tmp_path / "docs")),))
    return config_of(tmp_path).model_copy(update={"data": data}), run_file


def test_what_a_node_lacks(shared: tuple[RunConfig, Path], tmp_path: Path) -> None:
    """Each thing in turn; nothing is made where the run folder is not."""
    config, run_file = shared
    needs = json.loads(json.dumps(needs_of(config, run_file)))
    assert needs["at"] is None and lacking(needs) is None
    (tmp_path / "docs.idx").write_bytes(b"1")
    assert lacking(needs) == f"{tmp_path}/docs.idx is another file there: 1 bytes instead of 8"
    (tmp_path / "docs.idx").unlink()
    assert lacking(needs) == f"{tmp_path}/docs.idx cannot be read there: No such file or directory"
    (tmp_path / "docs.idx").write_bytes(b"12345678")
    run_file.rename(tmp_path / "elsewhere")
    assert str(lacking(needs)).startswith(f"{run_file} cannot be read there")
    (tmp_path / "run" / "run_id").write_text("0" * 32)
    assert "is another run's folder there; is the shared file system mounted?" in str(lacking(needs))
    (tmp_path / "run").rename(tmp_path / "gone")
    assert "is no run's folder there" in str(lacking(needs)) and not (tmp_path / "run").exists()


def test_relative_paths_begin_where_the_launcher_was(
    shared: tuple[RunConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM goes to /tmp where a node does not have the job's folder."""
    config, run_file = shared
    monkeypatch.chdir(tmp_path)
    needs = needs_of(config.model_copy(update={"run_dir": "run"}), run_file)
    monkeypatch.chdir("/")
    assert lacking(needs) is None and Path.cwd() == tmp_path
    assert "from which the run was started" in str(lacking({**needs, "at": str(tmp_path / "none")}))


@pytest.mark.parametrize("waits", ["for a mount", "in vain"])
def test_an_agent_whose_node_lacks_something_waits_for_it(
    waits: str, shared: tuple[RunConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It joins when the file is there, and ends with the run."""
    monkeypatch.setattr(agent_module, "PATIENCE_S", 0.0)
    monkeypatch.setattr(agent_module, "FINAL_S", 0.0)
    monkeypatch.setattr(agent_module, "LOOK_S", 0.01)
    config, run_file = shared
    (tmp_path / "docs.bin").rename(tmp_path / "away")
    nodes = Nodes(config, ["n1"])
    nodes.away = {"n1"}

    async def act() -> bool:
        (tmp_path / "away").rename(tmp_path / "docs.bin")
        controller = Controller(config, Path(config.run_dir), nodes, "cpu")  # type: ignore[arg-type]
        (tmp_path / "docs.bin").rename(tmp_path / "away")
        port = await controller.listen("127.0.0.1")
        agent = Agent(settings_of(tmp_path, controllers=(("127.0.0.1", port),), secret=SECRET, run_dir=run_file.parent))
        try:
            channel = await agent._find_controller()
            assert channel is not None
            fit = asyncio.create_task(agent._is_fit(channel))
            while "n1" not in controller.fleet.attendance.missing:
                await asyncio.sleep(0.01)
            assert not fit.done() and controller.fleet.attendance.hopeless({"n1": 1})
            reason = controller.fleet.attendance.missing["n1"].absence.reason
            assert reason == f"{tmp_path}/docs.bin cannot be read there: No such file or directory"
            if waits == "for a mount":
                (tmp_path / "away").rename(tmp_path / "docs.bin")
            else:
                controller.fleet.attendance.dismiss()
            return await fit
        finally:
            agent.copy_server.close()
            controller.close()

    assert asyncio.run(asyncio.wait_for(act(), 60)) == (waits == "for a mount")


def test_a_node_that_does_not_come_is_named_and_the_others_begin(tmp_path: Path) -> None:
    """wait_s is an hour. When the node is there after all, it is taken in."""
    config = config_of(tmp_path)
    nodes = Nodes(config, FOUR)
    nodes.away = {"n3"}
    nodes.absences = [Absence("n3", "SLURM calls it down*"), Absence("n3", "SLURM calls it down*")]

    async def act(story: Story) -> None:
        await story.training(3)
        controller = story.controller
        controller._write_status()
        controller.journal._writer.submit(lambda: None).result()
        nodes.away.clear()
        nodes._start("n3")
        await story.training(4)
        assert not controller.fleet.attendance.missing
        nodes.make_steps(1)
        await story.heard_of(nodes.step)

    seen: list[str] = []

    async def looking(story: Story) -> None:
        await story.training(3)
        await story.until(lambda: "n3" in status_of(config), "the node in the status")
        seen.append(status_of(config))
        await act(story)

    _, story = play(config, nodes, looking)
    assert [(event["node"], event["cause"]) for event in story.events("not_joined")] == [("n3", "SLURM calls it down*")]
    assert "not joined" in seen[0] and "SLURM calls it down*" in seen[0].replace("\n", " ")


def status_of(config: RunConfig) -> str:
    """What ``llm-parallel status`` prints; empty before the first state is written."""
    out = io.StringIO()
    if not (Path(config.run_dir) / "elastic.json").exists():
        return ""
    show_status(Path(config.run_dir), Console(file=out, width=200))
    return out.getvalue()


class Ending(Nodes):
    """Agents that end by themselves before they join."""

    reason = "ModuleNotFoundError: No module named 'llm_launch'"

    def _start(self, name: str) -> None:
        if name in self.away:
            self.absences.append(Absence(name, self.reason, passing=False, ended=True))
        else:
            super()._start(name)


def test_agents_that_all_end_alike_end_the_run_at_once(tmp_path: Path) -> None:
    """wait_s is an hour; each was started twice. The sentence is on the terminal and in the events."""
    config = config_of(tmp_path)
    nodes = Ending(config, FOUR)
    nodes.away = set(FOUR)
    assert ended(config, nodes) == 1
    (fail,) = [event for event in read_lines(tmp_path / "run" / "events.jsonl") if event["event"] == "fail"]
    assert fail["cause"] == f"the agents of all 4 nodes ended alike: {nodes.reason}"


def ended(config: RunConfig, nodes: Nodes) -> int:
    """Exit status of a run that ends by itself."""

    async def run() -> int:
        controller = Controller(config, Path(config.run_dir), nodes, "cpu")  # type: ignore[arg-type]
        nodes.begin(await controller.listen("127.0.0.1"))
        try:
            return await asyncio.wait_for(controller.run(), 60)
        finally:
            controller.close()

    return asyncio.run(run())


def test_an_agent_that_ends_again_and_again_is_started_with_pauses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others train meanwhile; its reason is said once."""
    monkeypatch.setattr(ticker_module, "START_AGAIN_S", 0.02)
    config = config_of(tmp_path)
    nodes = Ending(config, FOUR)
    nodes.away = {"n2"}

    async def act(story: Story) -> None:
        await story.training(3)
        nodes.make_steps(1)
        await story.heard_of(nodes.step)
        missing = story.controller.fleet.attendance.missing
        await story.until(lambda: missing["n2"].tries >= 4, "further tries")
        nodes.away.clear()
        await story.training(4)

    _, story = play(config, nodes, act)
    assert len(story.events("not_joined")) == 1


def test_nodes_of_which_nothing_is_heard_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attendance_module, "SAY_S", 0.0)
    config = config_of(tmp_path)
    config = config.model_copy(update={"elastic": config.elastic.model_copy(update={"wait_s": 0.5})})
    nodes = Nodes(config, FOUR)
    nodes.away = {"n4"}

    async def act(story: Story) -> None:
        await story.training(3)

    _, story = play(config, nodes, act)
    assert "n4" in story.events("wait")[0]["cause"]
    assert [event["node"] for event in story.events("not_joined")] == ["n4"]


def test_what_one_node_alone_lacks_ends_no_run(tmp_path: Path) -> None:
    """Its workers raise before they train, as where a file is missing. The others go on; the next start tries it again,
    since nothing of it is remembered."""
    config = config_of(tmp_path)
    nodes = Nodes(config, FOUR)
    nodes.refusals = {"n3": ("UserError", "data.train.0.path = /data/x does not exist")}

    async def act(story: Story) -> None:
        await story.training(3)

    _, story = play(config, nodes, act)
    assert [(event["node"], event["cause"]) for event in story.events("exclude")] == [("n3", nodes.refusals["n3"][1])]
    assert not story.controller.ledger.removed and not story.events("fail")


@pytest.mark.parametrize("error", ["UserError", "FileNotFoundError"])
def test_what_a_second_node_says_too_is_not_the_nodes(error: str, tmp_path: Path) -> None:
    """Whether a user's mistake or a file that nobody has."""
    config = config_of(tmp_path)
    nodes = Nodes(config, FOUR)
    message = "[Errno 2] No such file or directory: '/data/x'"
    nodes.refusals = dict.fromkeys(FOUR, (error, message))
    status = ended(config, nodes)
    assert status == (EXIT_USER_ERROR if error == "UserError" else 1)
    (fail,) = [event for event in read_lines(tmp_path / "run" / "events.jsonl") if event["event"] == "fail"]
    assert message in fail["cause"]


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Callable[..., SlurmStarter]]:
    """Makes a starter for n1 to n3 on commands that are scripts: their arguments go into the file ``calls``."""
    made: list[SlurmStarter] = []

    def make(**scripts: str) -> SlurmStarter:
        answers = {
            "scontrol": 'case "$2" in job) echo "JobId=7 JobState=RUNNING NodeList=n[1-3] Partition=main '
            'Account=(null) QOS=normal WorkDir=/";; hostnames) echo "n1 n2 n3";; esac',
            "sinfo": 'echo "$4 allocated"',
            "squeue": "echo 1:00:00",
            "scancel": ":",
            "sbatch": "echo 9",
        }
        for name, script in {**answers, **scripts}.items():
            path = tmp_path / name
            path.write_text(f'#!/bin/bash\necho {name} "$@" >> {tmp_path}/calls\n{script}\n')
            path.chmod(0o755)
        config = config_of(tmp_path)
        Path(config.run_dir).mkdir()
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_CPUS_ON_NODE": "64", "SLURM_GPUS": "16",
                       "SLURM_TRES_PER_TASK": "cpu=64",
                       "SLURM_EXPORT_ENV": "NONE", "SLURM_CPUS_PER_TASK": "64"}  # fmt: skip
        job = SlurmJob("7", 0, "n1", environment)
        starter = SlurmStarter(config, tmp_path / "f.yaml", job, ["n1", "n2", "n3"], [0], "s", "10.7.0.1")
        made.append(starter)
        return starter

    yield make
    for starter in made:
        for step in starter.steps:
            step.process.kill()
        starter.end()


def calls(folder: Path, name: str) -> list[str]:
    """Argument lists of a command's calls so far."""
    path = folder / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in lines if line.startswith(f"{name} ")]


def seen(starter: SlurmStarter, enough: Callable[[list[Absence]], Any]) -> list[Absence]:
    """What the starter tells until it is enough."""
    found: list[Absence] = []

    async def look() -> None:
        while not enough(found):
            found.extend(starter.look())
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(look(), 60))
    return found


RUNS = 'for word; do case "$word" in n2) echo "$SAYS" >&2; exit 1;; n?) exec sleep 600;; esac; done'


@pytest.mark.processes
def test_a_step_that_fails_ends_no_other_and_says_why(
    slurm: Callable[..., SlurmStarter], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = "srun: error: Task launch for StepId=7.1 failed on node n2: Communication connection failure"
    starter = slurm(srun=f'SAYS="{said}"; {RUNS}')
    starter.begin(9)
    (absence,) = seen(starter, len)
    assert absence == Absence("n2", "Communication connection failure (srun ended with status 1)", True, True)
    assert [step.names for step in starter.steps if step.process.poll() is None] == [("n1",), ("n3",)]
    assert said in capfd.readouterr().err
    made = calls(tmp_path, "srun")
    assert len(made) == 3 and all("--export=ALL" in call and "--cpus-per-task" not in call for call in made)
    starter.start("n2")
    seen(starter, len)
    assert len(calls(tmp_path, "srun")) >= 4


@pytest.mark.processes
def test_why_an_agent_ended_is_told_though_another_is_started_already(slurm: Callable[..., SlurmStarter]) -> None:
    """The loss of the connection is known before srun's end, and the agent is started again at once."""
    go = "while [ ! -e go ]; do sleep 0.05; done"
    said = "slurmstepd-n2: error: Detected 1 oom-kill event(s) in StepId=7.1."
    starter = slurm(srun=f"cd $(dirname $0); {go}; SAYS='{said}'; {RUNS}")
    starter.begin(9)
    folder = Path(starter.job.environment["PATH"].split(":")[0])
    starter._newest.pop("n2")  # as ``start`` does
    (folder / "go").touch()
    (absence,) = seen(starter, len)
    reason = "Detected 1 oom-kill event(s) in StepId=7.1. (srun ended with status 1)"
    assert absence == Absence("n2", reason, False, ended=False, late=True)


def test_a_run_whose_agents_end_again_and_again_says_why(tmp_path: Path) -> None:
    """What SLURM said of an agent that was lost is an event, and stands in the last sentence and in ``status``."""
    config = config_of(tmp_path, max_fruitless=1)
    nodes = Nodes(config, ["n1"])
    killed = Absence("n1", "StepId=7.1 exceeded memory limit", False, ended=False, late=True)

    async def act(story: Story) -> None:
        for generation in (1, 2):
            await story.until(lambda n=generation: len(story.events("resume")) == n, f"generation {generation}")
            nodes.absences.append(killed)
            await story.until(lambda n=generation: len(story.events("agent_ended")) == n, "the agent's last words")
            nodes.lose("n1")

    async def run() -> int:
        controller = Controller(config, Path(config.run_dir), nodes, "cpu")
        acting = asyncio.create_task(act(Story(controller, nodes)))
        nodes.begin(await controller.listen("127.0.0.1"))
        try:
            status = await asyncio.wait_for(controller.run(), 60)
            await acting
            return status
        finally:
            acting.cancel()
            controller.close()

    assert asyncio.run(run()) == 1
    (fail,) = [event for event in read_lines(tmp_path / "run" / "events.jsonl") if event["event"] == "fail"]
    assert fail["cause"] == (
        "given up after 2 recoveries without a step (elastic.max_fruitless): the agent of n1 is gone; of n1: StepId=7.1"
        " exceeded memory limit"
    )
    assert "exceeded memory limit" in status_of(config)


@pytest.mark.processes
def test_the_environment_of_a_step_has_nothing_of_the_batch_nodes_size(
    slurm: Callable[..., SlurmStarter], tmp_path: Path
) -> None:
    starter = slurm(srun=f"env > {tmp_path}/env.$$; exec sleep 600")
    starter.begin(9)
    asyncio.run(asyncio.wait_for(until_three(tmp_path), 60))
    for path in tmp_path.glob("env.*"):
        names = {line.partition("=")[0] for line in path.read_text().splitlines()}
        assert (
            not names & {"SLURM_GPUS", "SLURM_CPUS_PER_TASK", "SLURM_TRES_PER_TASK"} and "LLM_PARALLEL_SECRET" in names
        )
        assert "SLURM_OOM_KILL_STEP=0" in path.read_text().splitlines()


async def until_three(folder: Path) -> None:
    """Until three steps have written their environment, whose last variable is bash's own."""
    while sum("\n_=" in path.read_text() for path in folder.glob("env.*")) < 3:
        await asyncio.sleep(0.01)


@pytest.mark.processes
def test_a_node_that_slurm_took_away_before_the_launcher_asked_is_expected(
    slurm: Callable[..., SlurmStarter], tmp_path: Path
) -> None:
    """n2 was down; n4 works, so a user has given it back."""
    scontrol = ('case "$2" in job) echo "JobId=7 JobState=RUNNING NodeList=n[1,3]";; '
                'node) for node in ${3//,/ }; do echo "NodeName=$node NodeAddr=127.0.0.1"; done;; '
                'hostnames) [ "$3" = "n[1-4]" ] && echo n1 n2 n3 n4 || echo n1 n3;; esac')  # fmt: skip
    states = "for node in ${4//,/ }; do [ $node = n2 ] && echo $node down\\* || echo $node allocated; done"
    before = slurm(scontrol=scontrol, sinfo=states)
    job = replace(before.job, environment={**before.job.environment, "SLURM_JOB_NODELIST": "n[1-4]"})
    assert (job.nodes(), job.first_nodes()) == (["n1", "n3"], ["n1", "n2", "n3", "n4"])
    assert job.taken(["n2", "n4"]) == ["n2"] and job.taken([]) == []
    starter = starter_of_job(before.config, tmp_path / "f.yaml", job, 0, {}, AgentStep())
    assert isinstance(starter, SlurmStarter)
    assert (starter.names, starter.lost, starter.host) == (["n1", "n2", "n3"], ["n2"], "127.0.0.1")


@pytest.mark.processes
@pytest.mark.parametrize("allowed", [True, False])
def test_a_node_that_slurm_took_away_comes_back_by_a_job_of_its_own(
    allowed: bool, slurm: Callable[..., SlurmStarter], tmp_path: Path
) -> None:
    """Where that is not allowed, it is said that it cannot. The job is of the same partition and ends with the run."""
    scontrol = ('case "$2" in job) case "$3" in 7) echo "JobId=7 JobState=RUNNING NodeList=n[1,3] OverSubscribe=NO '
                'Partition=main Account=(null) QOS=normal WorkDir=/";; 9) echo "JobId=9 JobState=PENDING";; esac;; '
                'hostnames) echo "n1 n3";; esac')  # fmt: skip
    sbatch = "echo 9" if allowed else "echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1"
    starter = slurm(scontrol=scontrol, sbatch=sbatch, srun="exec sleep 600")
    starter.port = 9
    starter.start("n2")
    (absence,) = seen(starter, len)
    assert absence.passing and "SLURM has taken it out of this job" in absence.reason
    (asked,) = calls(tmp_path, "sbatch")
    assert "--nodelist=n2" in asked and "--partition=main" in asked and "--qos=normal" in asked
    assert "--exclusive" in asked and "--cpus-per-task" not in asked
    assert "--account" not in asked and "--time=60" in asked and "--rescue" not in asked
    starter.end()
    if allowed:
        assert "job 9 (pending) brings it back" in absence.reason
        assert calls(tmp_path, "scancel") == ["scancel 9"]
    else:
        assert "QOSMaxSubmitJobPerUserLimit" in absence.reason and "next start" in absence.reason


@pytest.mark.processes
def test_an_agent_of_this_machine_that_ends_is_told_once(tmp_path: Path) -> None:
    """Here for want of its Python; a new one that is started in its place counts anew."""
    config = config_of(tmp_path)
    Path(config.run_dir).mkdir()
    starter = LocalStarter(config, tmp_path / "f.yaml", {"here": [0]}, "s", {})
    starter.processes["here"] = subprocess.Popen(["false"])
    starter.processes["here"].wait()
    (absence,) = starter.look()
    assert absence == Absence("here", "its agent ended with status 1; what it said is above", False, True)
    assert starter.look() == []
    starter.known.clear()
    starter.processes["here"] = subprocess.Popen(["sleep", "600"])
    assert starter.look() == []
    starter.processes["here"].kill()
    starter.processes["here"].wait()
    assert starter.look() == [Absence("here", "its agent ended with signal 9", True, True)]


WORLD = [Device(node, index) for node in ("a", "b") for index in (0, 1)]


def raised(devices: list[Device], error: str, forming: bool = True) -> list[Evidence]:
    """What their processes raised."""
    text = "[Errno 2] No such file or directory: 'x'"
    return [Evidence(Kind.RAISED, device.node, device, WORLD.index(device), error, text, forming=forming)
            for device in devices]  # fmt: skip


@pytest.mark.parametrize(
    ("evidence", "fault"),
    [
        (raised(WORLD[2:], "UserError"), Fault.SETUP),
        (raised(WORLD[2:3], "UserError"), Fault.SETUP),
        (raised(WORLD[1:3], "UserError"), Fault.USER),
        (raised(WORLD[2:], "UserError", forming=False), Fault.USER),
        (raised(WORLD[2:], "FileNotFoundError"), Fault.SETUP),
        (raised(WORLD[2:], "ModuleNotFoundError"), Fault.SETUP),
        (raised(WORLD[2:], "ModuleNotFoundError", forming=False), Fault.PROGRAM),
        (raised(WORLD, "ModuleNotFoundError"), Fault.PROGRAM),
        (raised(WORLD[2:3], "FileNotFoundError"), Fault.ENVIRONMENT),
    ],
)
def test_whose_fault_it_is_that_a_node_cannot_begin(evidence: list[Evidence], fault: Fault) -> None:
    verdict = blame(evidence, WORLD)
    assert verdict.fault is fault and (fault is not Fault.SETUP or verdict.nodes == ("b",))
    alone = [Device("b", index) for index in (0, 1)]
    assert blame(evidence, alone).fault is not Fault.SETUP, "a run on one node has no other to compare with"


def test_what_the_system_refuses_one_node_twice_is_the_nodes() -> None:
    ledger, verdict = Ledger(), blame(raised(WORLD[2:3], "FileNotFoundError"), WORLD)
    assert ledger.judge(verdict).fault is Fault.ENVIRONMENT
    ledger.formed()
    assert ledger.judge(verdict).fault is Fault.ENVIRONMENT, "others have trained in between"
    assert ledger.judge(verdict).fault is Fault.SETUP and "b" in ledger.lacking
    other = blame(raised(WORLD[:2], "FileNotFoundError"), WORLD)
    assert ledger.judge(other).fault is Fault.PROGRAM


def test_a_mount_that_hangs_holds_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent asks again and again meanwhile, and takes the answer of the first look when it comes."""
    answers, looks = threading.Event(), []

    def slow(needs: Any) -> None:
        looks.append(needs)
        answers.wait(60.0)

    monkeypatch.setattr(agent_module, "lacking", slow)
    monkeypatch.setattr(agent_module, "MOUNT_S", 0.02)
    agent = object.__new__(Agent)
    agent._look = None
    said = [asyncio.run(agent._lacking({})) for _ in range(3)]
    assert said == ["a file system of the run does not answer there for 0.02 s"] * 3 and len(looks) == 1
    answers.set()
    monkeypatch.setattr(agent_module, "MOUNT_S", 60.0)
    assert asyncio.run(agent._lacking({})) is None and len(looks) == 1
