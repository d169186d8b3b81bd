"""``llm-parallel status`` and ``events``: what a run is doing and what happened to it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from llm_launch.run_status import RunStatus, living_holder, read_status
from llm_launch.sentences import line
from llm_launch.states import OVER
from llm_parallel.errors import UserError
from llm_parallel.jsonlines import read_jsonlines
from llm_parallel.lines import CONTROL, printable
from llm_parallel.screen import show, show_table

FOLLOW_S = 0.5
LAST_EVENTS = 5


def show_status(run_dir: Path, console: Console) -> str:
    """Prints what a run is doing and its last events; returns the command to try next. Raises UserError if it is no
    run's folder."""
    elastic = _elastic(run_dir)
    status = read_status(run_dir) if elastic is None or (run_dir / "metrics.jsonl").exists() else RunStatus("running")
    state = status.state
    if elastic is not None:
        state = _state(run_dir, elastic)
        try:
            _show_elastic(run_dir, elastic, state, status, console)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{run_dir / 'elastic.json'} is not what the launcher writes ({type(error).__name__}: {error}); see "
                f"{run_dir / 'events.jsonl'}"
            ) from None
    else:
        first, *rest = status.lines(_now())
        show(printable("\n".join([f"{run_dir}: {first}", *rest])), console)
    if (run_dir / "events.jsonl").exists():
        show("\n".join(list(timeline(run_dir))[-LAST_EVENTS:]), console)
    return next_command(run_dir, state, elastic is not None)


def next_command(run_dir: Path, state: str, elastic: bool) -> str:
    """What to try after looking at a run in a state."""
    if state == "finished":
        return f'llm-parallel generate {run_dir} --prompt "…"'
    if state in ("stopped", "failed", "ended"):
        return f"llm-parallel {'launch' if elastic else _method(run_dir)} {run_dir}/config.yaml"
    return f"llm-parallel events {run_dir} --follow"


def _method(run_dir: Path) -> str:
    import yaml

    try:
        tree = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
        return tree["method"]["kind"] or "pretrain"
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return "pretrain"


def _elastic(run_dir: Path) -> dict[str, Any] | None:
    """State that ``launch`` keeps; None where it did not write any."""
    try:
        found = json.loads((run_dir / "elastic.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _state(run_dir: Path, elastic: dict[str, Any]) -> str:
    """What the launcher does, or ``ended`` if it is gone without having said how it ended."""
    state = str(elastic.get("state"))
    over = state in [phase.value for phase in OVER]
    return state if over or living_holder(run_dir) is not None else "ended"


def _show_elastic(run_dir: Path, elastic: dict[str, Any], state: str, status: RunStatus, console: Console) -> None:
    if state == "ended":
        state = f"ended: the launcher is gone, and its last word was {elastic['state']!r}; the next start goes on"
    goodput = elastic["goodput"]
    loss = status.record.get("train/loss")
    of = f" of {status.total_steps}" if status.total_steps is not None else ""
    numbers = f", loss {loss:.4f}" if isinstance(loss, float) else ""
    say = partial(_say, console)
    say(
        f"{run_dir}: {state}\n"
        f"step {elastic['step']}{of}{numbers}, generation {elastic['generation']}, {elastic['world_size']} processes, "
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
    records = following(path, lambda: living_holder(run_dir) is None) if follow else read_jsonlines(path)
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
        with path.open("rb") as handle:
            rest = b""
            while True:
                over = is_over()
                rest += handle.read()
                *lines, rest = rest.split(b"\n")
                for text in lines:
                    try:
                        record = json.loads(text)
                    except ValueError:
                        continue
                    if isinstance(record, dict):
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
