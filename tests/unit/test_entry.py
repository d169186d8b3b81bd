"""Ctrl-C at any moment of a command's start ends it with the shell's status for that, and without a traceback."""

from __future__ import annotations

import signal
import sys
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

import pytest

from llm_parallel import cli, entry


class Watch(MetaPathFinder):
    """Notes what SIGINT does while the commands are loaded."""

    def __init__(self) -> None:
        self.found: list[Any] = []

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> None:
        if name == "llm_parallel.cli":
            self.found.append(signal.getsignal(signal.SIGINT))


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN])
def test_ctrl_c_while_modules_are_loaded(monkeypatch: pytest.MonkeyPatch, before: Any) -> None:
    """The system ends the process; a process that a shell told to ignore the signal goes on to ignore it."""
    import llm_parallel

    watch = Watch()
    monkeypatch.setattr(sys, "meta_path", [watch, *sys.meta_path])
    monkeypatch.setattr(sys, "argv", ["llm-parallel", "--version"])
    monkeypatch.delitem(sys.modules, "llm_parallel.cli")
    monkeypatch.setattr(llm_parallel, "cli", cli)  # puts back what the import replaces
    monkeypatch.delattr(llm_parallel, "cli")
    now = signal.signal(signal.SIGINT, before)
    try:
        with pytest.raises(SystemExit) as ended:
            entry.main()
        assert ended.value.code == 0 and signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, now)
    assert watch.found == [signal.SIG_DFL if before is signal.default_int_handler else signal.SIG_IGN]


def test_ctrl_c_before_the_command_begins(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "refuse_unsupported", interrupted)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130 and capsys.readouterr() == ("", "")
