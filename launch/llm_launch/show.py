"""``llm-parallel status`` and ``events``: what a run is doing and what happened to it."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from llm_launch.job_record import JobRecord, read_record
from llm_launch.job_view import AT_WORK, WAITING, look
from llm_launch.run_status import SignsOfLife
from llm_launch.sentences import line
from llm_launch.standing import Standing, stand
from llm_parallel.errors import UserError
from llm_parallel.files import open_regular, read_small
from llm_parallel.jsonlines import LINE_BYTES, endless, parsed, read_jsonlines
from llm_parallel.lines import CONTROL, printable
from llm_parallel.screen import show, show_table

FOLLOW_S = 0.5
LAST_EVENTS = 5


def show_status(run_dir: Path, console: Console, environment: Mapping[str, str] = os.environ) -> str:
    """Prints what a run is doing and its last events; returns the command to try next. SLURM is asked about a run that
    is its job. Raises UserError if it is no run's folder."""
    record = read_record(run_dir)
    if record is not None and record.folders:
        return show_array(run_dir, record, console, environment)
    found = stand(run_dir, record, look(record.job, environment) if record is not None else None)
    if found.elastic is not None:
        try:
            _show_elastic(run_dir, found, console)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{run_dir / 'elastic.json'} is not what the launcher writes ({type(error).__name__}: {error}); see "
                f"{run_dir / 'events.jsonl'}"
            ) from None
    else:
        first, *rest = found.status.lines(_now())
        show(printable("\n".join([f"{run_dir}: {first}", *rest])), console)
    if found.complaint:
        show(found.complaint, console)
    if (run_dir / "events.jsonl").exists():
        show("\n".join(list(timeline(run_dir))[-LAST_EVENTS:]), console)
    return next_command(run_dir, found.status.state, found.elastic is not None, record)


def next_command(run_dir: Path, state: str, elastic: bool, record: JobRecord | None = None) -> str:
    """What to try after looking at a run in a state."""
    if state == "finished":
        chat = "--chat " if _given(run_dir, "chat", "train") else ""
        return f'llm-parallel generate {shlex.quote(str(run_dir))} {chat}--prompt "…"'
    batch_file = run_dir / "submit.sbatch"
    if state in ("stopped", "failed", "ended", "cancelled", "preempted"):
        if record is not None and batch_file.exists():
            return f"sbatch {shlex.quote(str(batch_file))}"
        return f"llm-parallel {'launch' if elastic else _method(run_dir)} {shlex.quote(f'{run_dir}/config.yaml')}"
    if record is not None and state in (*WAITING, *AT_WORK):
        return f"squeue --start --jobs {record.job}" if state in WAITING else f"squeue --jobs {record.job}"
    return f"llm-parallel events {shlex.quote(str(run_dir))} --follow"


def _method(run_dir: Path) -> str:
    return str(_given(run_dir, "method", "kind") or "pretrain")


def _given(run_dir: Path, section: str, name: str) -> Any:
    """A field of the run's configuration; None if it is not there."""
    import yaml

    try:
        return yaml.safe_load(read_small(run_dir / "config.yaml", 1 << 20))[section][name]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, RecursionError):
        return None


def show_array(run_dir: Path, record: JobRecord, console: Console, environment: Mapping[str, str]) -> str:
    """Prints a line for each run of an array; returns the command to try next."""
    views, complaint = look(record.job, environment)
    rows = []
    for number, name in enumerate(record.folders):
        folder = run_dir / name
        task = read_record(folder) or JobRecord(f"{record.job}_{number}")
        view = [view for view in views if view.is_task(number)]
        status = stand(folder, task, (view, "")).status
        rows.append(tuple(map(printable, (name, status.state, status.progress, status.why))))
    show(printable(f"{run_dir}: SLURM job {record.job}, an array of {len(rows)} runs"), console)
    show_table("Runs", ("folder", "state", "step", ""), rows, console)
    if complaint:
        show(complaint, console)
    return f"llm-parallel status {shlex.quote(str(run_dir / record.folders[0]))}"


def _show_elastic(run_dir: Path, found: Standing, console: Console) -> None:
    elastic, status = found.elastic, found.status
    assert elastic is not None
    goodput = elastic["goodput"]
    loss = status.record.get("train/loss")
    numbers = f", loss {loss:.4f}" if isinstance(loss, float) else ""
    say = partial(_say, console)
    say(
        f"{run_dir}: {status.headline}\n"
        f"{status.progress}{numbers}, generation {elastic['generation']}, {elastic['world_size']} processes, "
        f"{elastic['layout'] or 'no layout'}\n"
        f"{elastic['recoveries']} recoveries, {elastic['lost_steps']} steps made again, {goodput['down_s']:.1f} s of "
        f"{goodput['elapsed_s']:.0f} s recovering: goodput {goodput['fraction']:.1%} (wall time of this start)"
    )
    if elastic.get("crowded"):
        say(elastic["crowded"])
    excluded = {(entry["node"], entry["device"]): entry["reason"] for entry in elastic["excluded"]}
    excluded |= {(node, number): reason for node, number, reason in elastic.get("unfit", ())}
    missing = elastic.get("missing", {})
    rows = []
    for node in elastic["nodes"]:
        gone = [f"{number}: {reason[:80]}" for (name, number), reason in excluded.items() if name == node["name"]]
        gone += [missing[node["name"]]] if node["name"] in missing else []
        row = (node["name"], node["state"], " ".join(map(str, node["devices"])), "; ".join(gone))
        rows.append(tuple(printable(str(cell)).replace("\n", " ") for cell in row))
    show_table("Nodes", ("node", "state", "devices", "excluded"), rows, console)


def _say(console: Console, text: str) -> None:
    show(printable(text), console)


def timeline(run_dir: Path) -> Iterator[str]:
    """One line for each event: the time of day, and a sentence."""
    return (line(record, _now()) for record in _told_once(_events(read_jsonlines(run_dir / "events.jsonl"))))


def show_events(run_dir: Path, follow: bool, as_json: bool, say: Callable[[str], None]) -> None:
    """Hands each event to ``say``, as a sentence or as JSON; with ``follow`` also those to come, until the run ends.
    Raises UserError if there are none."""
    path = run_dir / "events.jsonl"
    signs = SignsOfLife(run_dir)
    records = following(path, lambda: signs.look()[0] is None) if follow else read_jsonlines(path)
    if as_json:
        for record in _events(records):
            say(CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(record, ensure_ascii=False)))
        return
    for record in _told_once(_events(records)):
        say(line(record, _now()))


def following(
    path: Path, is_over: Callable[[], bool], pause: Callable[[float], None] = time.sleep
) -> Iterator[dict[str, Any]]:
    """Records of a file of JSON lines as they come, until it does not grow and ``is_over`` says so. A line counts when
    it is complete. A run that has just begun may not have the file yet. Raises UserError if it cannot be read."""
    while not path.exists() and not is_over():
        pause(FOLLOW_S)
    try:
        with os.fdopen(open_regular(path), "rb") as handle:
            rest = b""
            while True:
                over = is_over()
                rest += handle.read(LINE_BYTES - len(rest))
                *lines, rest = rest.split(b"\n")
                if len(rest) >= LINE_BYTES:
                    raise endless(path)
                for text in lines:
                    record = parsed(text)
                    if record is not None:
                        yield record
                if over and not lines:
                    return
                pause(FOLLOW_S)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give the folder of a run") from error


def _events(records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return (record for record in records if "event" in record and "time" in record)


def _told_once(records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Without the second record of a run's end, which under ``launch`` both worker and controller write."""
    before: Any = None
    for record in records:
        if record["event"] != "end" or before != ("end", record.get("step")):
            yield record
        before = record["event"], record.get("step")


def _now() -> datetime:
    return datetime.now(timezone.utc)
