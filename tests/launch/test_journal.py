"""What the controller writes is whole and in order, and a slow file system keeps nobody waiting."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from llm_launch import journal as module
from llm_launch.blame import Fault, Verdict
from llm_launch.journal import Journal
from llm_launch.starters import paced
from llm_parallel.config.tree import ElasticConfig, RunConfig

STATUS = {"generation": 1, "world_size": 2, "excluded": [], "state": "training"}


def test_a_file_system_that_stalls_does_not_stop_the_controller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, stalled = module.atomic_write, threading.Event()

    @contextmanager
    def slow(path: Path) -> Any:
        assert stalled.wait(30), "it waited for the file system"
        with written(path) as handle:
            yield handle

    monkeypatch.setattr(module, "atomic_write", slow)
    journal = Journal(tmp_path, ElasticConfig(on_event=f'line=$(cat); echo "$line" >> {tmp_path}/hook'), "secret")
    for step in range(100):
        journal.write_status({**STATUS, "step": step})
    journal.remember({"strikes": [["a", 0, ["x"]]]})
    before = time.time()
    journal.event("detect", step=100, cause="a/0: exit")
    journal.event("resume", step=99, cause=None)
    after = time.time()
    assert not (tmp_path / "elastic.json").exists(), "what was called has returned, and nothing is written yet"
    stalled.set()
    journal.close()
    assert json.loads((tmp_path / "elastic.json").read_text())["step"] == 99, "the newest state of all"
    assert journal.remembered() == {"strikes": [["a", 0, ["x"]]]}
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["detect", "resume"] and "cause" not in events[1]
    times = [datetime.fromisoformat(event["time"]).timestamp() for event in events]
    assert before - 0.001 <= times[0] <= times[1] <= after, "the time of the event, not of the writing"
    hook, deadline = tmp_path / "hook", time.monotonic() + 60.0
    while not (hook.exists() and hook.read_text().count("\n") == 2) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert {"detect", "resume"} == {json.loads(x)["event"] for x in hook.read_text().splitlines()}


def test_a_full_disk_is_said_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def full(path: Path) -> Any:
        raise OSError(28, "No space left on device")
        yield path

    monkeypatch.setattr(module, "atomic_write", full)
    journal = Journal(tmp_path, ElasticConfig(), "secret")
    journal.write_status({**STATUS, "step": 3})
    journal.remember({})
    journal.close()
    assert capsys.readouterr().err.count("No space left on device") == 1, "it is said once"


def test_the_first_traceback_comes_before_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal(tmp_path, ElasticConfig(), "secret")
    journal.keep_traceback(module.Device("a", 0), 1, "Traceback: here")
    journal.fail(Verdict(Fault.PROGRAM, "the program's fault"))
    journal.close()
    said = capsys.readouterr().err
    assert 0 <= said.index("Traceback: here") < said.index("the program's fault")
    assert json.loads((tmp_path / "events.jsonl").read_text())["fault"] == "program"


@pytest.mark.parametrize(
    ("nodes", "heartbeat_s", "lost_after_s"), [(4, 0.25, 2.0), (250, 0.25, 2.0), (2048, 2.048, 16.384)]
)
def test_many_nodes_speak_less_often(nodes: int, heartbeat_s: float, lost_after_s: float) -> None:
    elastic = paced(RunConfig.model_validate({"model": {"preset": "debug"}}), nodes).elastic
    assert (elastic.heartbeat_s, elastic.lost_after_s) == (heartbeat_s, lost_after_s)
