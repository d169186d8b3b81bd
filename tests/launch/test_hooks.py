"""The user's command for events: one after the other, never more than one, and never for ever."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from llm_launch import hooks as hooks_module
from llm_launch.hooks import Hooks

pytestmark = pytest.mark.processes


def test_events_come_in_order_and_all_of_them(tmp_path: Path) -> None:
    said: list[str] = []
    hooks = Hooks(f"cat >> {tmp_path}/seen; echo >> {tmp_path}/seen", said.append)
    for number in range(5):
        hooks.put({"event": "form", "number": number})
    hooks.close()
    seen = [json.loads(line)["number"] for line in (tmp_path / "seen").read_text().splitlines()]
    assert seen == [0, 1, 2, 3, 4] and not said


def test_a_command_that_hangs_is_ended_with_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not pile up: the next event is told, and what does not fit the queue is left out and said."""
    monkeypatch.setattr(hooks_module, "LIMIT_S", 0.2)
    monkeypatch.setattr(hooks_module, "MOST", 1)
    said: list[str] = []
    script = f"read line; case $line in *hang*) sleep 600 & echo $! > {tmp_path}/child; wait;; esac"
    script += f"; echo $line >> {tmp_path}/seen"
    hooks = Hooks(script, said.append)
    hooks.put({"event": "hang"})
    while hooks._waiting.qsize():
        pass
    for name in ("next", "too many", "too many"):
        hooks.put({"event": name})
    hooks._thread.join(0.4)
    hooks.close()
    assert said == [
        "elastic.on_event is slower than events come; 1 wait, and further ones are left out",
        "elastic.on_event took longer than 0.2 s for the event 'hang' and was ended; the run goes on",
    ]
    assert "next" in (tmp_path / "seen").read_text() and "too many" not in (tmp_path / "seen").read_text()
    child = (tmp_path / "child").read_text().strip()
    assert (
        subprocess.run(["kill", "-0", child], capture_output=True).returncode != 0
        or "Z" in Path(f"/proc/{child}/stat").read_text()
    )


def test_a_command_that_fails_is_said_once() -> None:
    said: list[str] = []
    hooks = Hooks("cat > /dev/null; exit 7", said.append)
    for _ in range(3):
        hooks.put({"event": "form"})
    hooks.close()
    assert said == ["elastic.on_event ended with status 7; the run goes on"]
