"""``llm-parallel status`` and ``events``: what an elastic run is doing and what happened to it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llm_launch.states import OVER
from llm_parallel.errors import UserError
from llm_parallel.jsonlines import read_jsonlines

STALE_S = 10.0


def show_status(run_dir: Path, console: Console) -> None:
    """Prints state, world, nodes, what is excluded, and goodput. Raises UserError if it is no elastic run's folder."""
    path = run_dir / "elastic.json"
    try:
        status = json.loads(path.read_text())
    except (OSError, ValueError):
        raise UserError(f"{path} is missing; give the folder of a run that `llm-parallel launch` started") from None
    age = time.time() - status["updated"]
    state = status["state"]
    if state not in [phase.value for phase in OVER] and age > STALE_S:
        state += f", but nothing was written for {age:.0f} s: the launcher is gone"
    goodput = status["goodput"]
    console.print(f"{run_dir}: {state}", highlight=False)
    console.print(
        f"step {status['step']}, generation {status['generation']}, {status['world_size']} processes,"
        f" {status['layout'] or 'no layout'}",
        highlight=False,
    )
    console.print(
        f"{status['recoveries']} recoveries, {status['lost_steps']} steps made again, {goodput['down_s']:.1f} s of"
        f" {goodput['elapsed_s']:.0f} s recovering: goodput {goodput['fraction']:.1%} (wall time of this start)",
        highlight=False,
    )
    table = Table("node", "state", "devices", "excluded")
    excluded = {(entry["node"], entry["device"]): entry["reason"] for entry in status["excluded"]}
    for node in status["nodes"]:
        gone = [f"{number}: {reason[:80]}" for (name, number), reason in excluded.items() if name == node["name"]]
        table.add_row(node["name"], node["state"], " ".join(map(str, node["devices"])), "; ".join(gone))
    console.print(table)
    for line in list(timeline(run_dir))[-5:]:
        console.print(line, highlight=False, markup=False)


def timeline(run_dir: Path) -> Iterator[str]:
    """One line per event, with seconds since the first."""
    first: float | None = None
    for record in read_jsonlines(run_dir / "events.jsonl"):
        if "event" not in record or "time" not in record:
            continue
        at = datetime.fromisoformat(record["time"]).timestamp()
        first = at if first is None else first
        yield f"{at - first:10.3f} s  {record['event']:<9} {_details(record)}"


def _details(record: dict[str, Any]) -> str:
    hidden = ("event", "time", "versions")
    return ", ".join(f"{name} {value}" for name, value in record.items() if name not in hidden)
