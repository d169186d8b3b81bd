"""``status`` and ``events``: what is said of a run's folder, whatever state the run is in."""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from llm_launch.lease import Lease
from llm_launch.run_status import living_holder, read_status
from llm_launch.sentences import clock, sentence
from llm_launch.show import following, next_command, show_events, show_status, timeline
from llm_parallel.config.tree import RunConfig
from llm_parallel.errors import UserError
from llm_parallel.lines import CONTROL
from llm_parallel.worker.command import after_run

NOW = datetime(2026, 11, 30, 12, 0, 0, tzinfo=timezone.utc)
START = {"event": "run_start", "step": 0, "total_steps": 100, "size": 2, "device_name": "CPU", "layout": "TP 1 x PP 2"}


def written(folder: Path, steps: int, *events: Mapping[str, Any], last: datetime = NOW) -> Path:
    """A run's folder after ``steps`` steps of a second, the last one at ``last``."""
    folder.mkdir(exist_ok=True)
    records: list[Mapping[str, Any]] = [START | {"time": (last - timedelta(seconds=steps)).isoformat()}]
    for step in range(1, steps + 1):
        at = (last - timedelta(seconds=steps - step)).isoformat()
        numbers = {"train/loss": 5.0 - step / 100, "perf/step_time": 1.0, "time/eta_s": 100.0 - step}
        records.append({"step": step, **numbers, "time": at})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = [json.dumps({**event, "time": NOW.isoformat()}) + "\n" for event in (START, *events)]
    (folder / "events.jsonl").write_text("".join(lines))
    (folder / "config.yaml").write_text("method: {kind: null}\n")
    return folder


def shown(run_dir: Path) -> tuple[str, str]:
    out = io.StringIO()
    hint = show_status(run_dir, Console(file=out, width=120))
    return out.getvalue(), hint


def test_a_run_that_trains_says_how_far_it_is(tmp_path: Path) -> None:
    run_dir = written(tmp_path / "run", 40)
    with Lease(run_dir):
        status = read_status(run_dir, living_holder(run_dir))
        text, hint = shown(run_dir)
    assert status.state == "running"
    lines = status.lines(NOW + timedelta(seconds=3))
    assert lines[0].startswith("running (process ")
    assert lines[1:] == ["step 40 of 100, loss 4.6000", "60 s left, last step 3 s ago"]
    assert status.lines(NOW + timedelta(seconds=120))[2].startswith("no step for 2 min, and one takes 1.00 s")
    assert text.startswith(f"{run_dir}: running") and hint == f"llm-parallel events {run_dir} --follow"


@pytest.mark.parametrize(
    ("events", "state", "hint"),
    [
        ([{"event": "end", "step": 100}], "finished", "llm-parallel generate"),
        ([{"event": "stop", "step": 40}, {"event": "end", "step": 40}], "stopped", "llm-parallel pretrain"),
        ([{"event": "early_stop", "step": 40}, {"event": "end", "step": 40}], "finished", "llm-parallel generate"),
        ([{"event": "fail", "fault": "bug", "cause": "all ranks raised"}], "failed: all ranks raised", "llm-parallel"),
        ([], "ended: its processes are gone and left no message", "llm-parallel pretrain"),
    ],
)
def test_a_run_that_is_over_says_how_it_ended(
    tmp_path: Path, events: list[dict[str, Any]], state: str, hint: str
) -> None:
    run_dir = written(tmp_path / "run", 100 if events[:1] == [{"event": "end", "step": 100}] else 40, *events)
    text, said = shown(run_dir)
    assert text.startswith(f"{run_dir}: {state}")
    assert said.startswith(hint)


def test_the_error_of_a_process_is_the_reason_of_a_failure(tmp_path: Path) -> None:
    run_dir = written(tmp_path / "run", 3)
    (run_dir / "logs").mkdir()
    (run_dir / "logs" / "error_rank_1.json").write_text(json.dumps({"message": "Traceback …\nRuntimeError: boom"}))
    assert read_status(run_dir, living_holder(run_dir)).lines(NOW)[0] == "failed: RuntimeError: boom"


def test_a_record_that_a_kill_left_is_no_running_run(tmp_path: Path) -> None:
    run_dir = written(tmp_path / "run", 3)
    lease = Lease(run_dir)
    (run_dir / "lease.json").write_bytes(lease.holder.encode())
    (run_dir / ".lease.lock").touch()
    assert read_status(run_dir, living_holder(run_dir)).state == "ended"


def test_a_folder_of_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no run's folder.*name a run_dir"):
        shown(tmp_path)


def test_times_of_day_have_the_date_where_it_is_another() -> None:
    zone = timezone(timedelta(hours=2))
    assert clock(NOW, NOW, zone) == "14:00:00"
    assert clock(NOW - timedelta(days=1), NOW, zone) == "2026-11-29 14:00:00"
    assert clock(NOW - timedelta(hours=14, seconds=1), NOW, zone) == "2026-11-29 23:59:59"


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (START, "the run begins, 100 steps: 2 x CPU, TP 1 x PP 2"),
        (START | {"step": 50}, "the run goes on after step 50 of 100: 2 x CPU, TP 1 x PP 2"),
        (
            {"event": "resume", "generation": 2, "step": 7, "world_size": 4, "seconds_since_detection": 0.789},
            "training at step 7 in generation 2, 0.79 s after the fault was noticed",
        ),
        (
            {"event": "skip", "step": 5, "reason": "loss is NaN", "first_sample": 32, "last_sample": 39},
            "step 5 was not applied: loss is NaN; samples 32 to 39",
        ),
        (
            {"event": "wait", "cause": "1 devices are left", "seconds": 9.6},
            "waiting for up to 10 s: 1 devices are left",
        ),
        ({"event": "skip", "step": 5}, "skip: step 5"),
        ({"event": "of a later version", "x": 1, "time": "…"}, "of a later version: x 1"),
    ],
)
def test_sentences(record: dict[str, Any], said: str) -> None:
    assert sentence(record) == said


def test_every_kind_that_is_written_has_a_sentence() -> None:
    import re

    from llm_launch.sentences import _SENTENCES

    root = Path(__file__).resolve().parents[2]
    kinds: set[str] = set()
    for path in (*(root / "llm_parallel").rglob("*.py"), *(root / "launch").rglob("*.py")):
        kinds |= set(re.findall(r'(?:metrics|journal)\.event\(\s*"([a-z_]+)"', path.read_text(encoding="utf-8")))
    assert len(kinds) > 12
    assert kinds <= _SENTENCES.keys()


def test_events_are_followed_until_the_run_ends(tmp_path: Path) -> None:
    path = written(tmp_path / "run", 1) / "events.jsonl"
    grown = [b'{"event": "save", "step": 1, "time": "2026-11-30T12:0', b'0:00+00:00"}\n', b"torn\n", b""]

    def pause(_: float) -> None:
        with path.open("ab") as handle:
            handle.write(grown.pop(0))

    found = [record["event"] for record in following(path, lambda: not grown, pause)]
    assert found == ["run_start", "save"]


def test_events_as_json_are_those_of_the_file(tmp_path: Path) -> None:
    run_dir = written(tmp_path / "run", 1, {"event": "save", "step": 1})
    lines: list[str] = []
    show_events(run_dir, False, True, lines.append)
    assert lines == (run_dir / "events.jsonl").read_text().splitlines()


def test_the_end_that_worker_and_controller_both_write_is_told_once(tmp_path: Path) -> None:
    end = {"event": "end", "time": "2026-11-30T02:46:18+00:00", "step": 100}
    later = {**end, "step": 150}
    (tmp_path / "events.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in (end, end, later)))
    assert [text.rpartition(" ")[2] for text in timeline(tmp_path)] == ["100", "150"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
FIELDS = ["step", "total_steps", "time", "cause", "node", "device", "generation", "layout", "seconds", "train/loss",
          "eval/loss", "perf/step_time", "world_size", "fault", "size", "before", "after", "reason"]  # fmt: skip
KINDS = ["run_start", "form", "resume", "wait", "end", "stopped", "save_failed", "detect", "blame", "remove", "stall",
         "settings_changed", "round", "degraded", "second_copy_failed", "something else"]  # fmt: skip
RECORD = st.fixed_dictionaries({"event": st.sampled_from(KINDS) | JSON, "time": JSON}) | st.just({})
RECORDS = st.lists(st.tuples(RECORD, st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6)), max_size=4)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(RECORDS, RECORDS, st.none() | JSON)
def test_any_text_in_a_runs_folder_is_survived(tmp_path: Path, numbers: Any, events: Any, elastic: Any) -> None:
    """Whatever its files hold: no traceback, and no character that a terminal would act on."""
    run_dir = tmp_path / "run"
    run_dir.mkdir(exist_ok=True)
    for name, records in (("metrics.jsonl", numbers), ("events.jsonl", events)):
        lines = [json.dumps({**head, **rest}) + "\n" for head, rest in records]
        (run_dir / name).write_text("".join(lines))
    (run_dir / "elastic.json").unlink(missing_ok=True)
    if elastic is not None:
        (run_dir / "elastic.json").write_text(json.dumps(elastic))
    said: list[str] = []
    for as_json in (False, True):
        show_events(run_dir, False, as_json, said.append)
    with suppress(UserError):
        said.append(shown(run_dir)[0])
    assert not CONTROL.search("".join(said))


def test_text_of_a_node_does_nothing_on_the_terminal(tmp_path: Path) -> None:
    """A node's name and an error that clear the screen, and a second line that looks like an event of its own."""
    evil = "\x1b[2J\x1b]52;c;AAAA\x07\n12:00:00  all steps are done"
    run_dir = written(tmp_path / "run", 3, {"event": "lost", "node": "n\x9b1", "cause": evil})
    text = "\n".join(timeline(run_dir))
    assert not CONTROL.search(text) and "␛[2J" in text
    assert "\n    12:00:00  all steps are done" in text, "it stands to the right of what is an event"


def test_a_launcher_that_is_gone_without_a_word(tmp_path: Path) -> None:
    """elastic.json still says that it trains; whether it does is told by who holds the folder, not by a clock."""
    run_dir = written(tmp_path / "run", 3)
    elastic = {"state": "training", "step": 3, "generation": 1, "world_size": 2, "layout": "DP 2", "recoveries": 0,
               "lost_steps": 0, "goodput": {"down_s": 0.0, "elapsed_s": 9.0, "fraction": 1.0}, "excluded": [],
               "nodes": [], "updated": 4e9}  # fmt: skip
    (run_dir / "elastic.json").write_text(json.dumps(elastic))
    text, hint = shown(run_dir)
    assert "ended: the launcher is gone, and its last word was 'training'" in text
    assert hint == f"llm-parallel launch {run_dir}/config.yaml"
    (run_dir / "elastic.json").write_text(json.dumps({**elastic, "updated": 0.0}))
    with Lease(run_dir):
        assert shown(run_dir)[0].startswith(f"{run_dir}: training"), "a clock that was set back changes nothing"


@pytest.mark.parametrize("state", ["finished", "failed", "running"])
@pytest.mark.parametrize("chat", [False, True])
def test_the_next_command_can_be_pasted(state: str, chat: bool, tmp_path: Path) -> None:
    """Though the run's folder has spaces and quotes; of a run over conversations it is one that chats."""
    run_dir = tmp_path / "it's a run #1"
    run_dir.mkdir()
    tree = {"run_dir": str(run_dir), "method": {"kind": None}, "chat": {"train": ["x.jsonl"] if chat else []}}
    (run_dir / "config.yaml").write_text(json.dumps(tree))
    for elastic in (False, True):
        words = shlex.split(next_command(run_dir, state, elastic))
        assert words[0] == "llm-parallel" and words[2] in (str(run_dir), f"{run_dir}/config.yaml")
        assert ("--chat" in words) == (chat and state == "finished")
    config = RunConfig.model_validate({"run_dir": str(run_dir)})
    for status in (0, 1):
        assert str(run_dir) in shlex.split(after_run(config, status, "again"))
