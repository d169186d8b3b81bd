"""Events of a run as sentences, with clock times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime, tzinfo
from typing import Any

from llm_parallel.lines import printable

Record = Mapping[str, Any]
_HIDDEN = ("event", "time", "versions")


def clock(at: datetime, now: datetime, zone: tzinfo | None = None) -> str:
    """A time of day in the zone (the machine's own if none is given); with the date where it is not that of ``now``."""
    local, today = at.astimezone(zone), now.astimezone(zone).date()
    return local.strftime("%H:%M:%S" if local.date() == today else "%Y-%m-%d %H:%M:%S")


def line(record: Record, now: datetime, zone: tzinfo | None = None) -> str:
    """One entry of ``llm-parallel events``: when, and what happened. The record's texts may come from a node's name, an
    error or a model; on a terminal they do nothing."""
    try:
        at = clock(datetime.fromisoformat(record["time"]), now, zone)
    except (ValueError, TypeError, OverflowError):
        at = str(record["time"])
    return printable(f"{at}  {sentence(record)}").replace("\n", "\n    ")


def sentence(record: Record) -> str:
    """What an event says. A kind that is not known here is shown with its fields, and so is one whose fields are not
    what they should be."""
    make = _SENTENCES.get(str(record.get("event")))
    if make is not None:
        try:
            return make(record)
        except (KeyError, ValueError, TypeError, AttributeError, IndexError, OverflowError):
            pass
    rest = ", ".join(f"{name} {value}" for name, value in record.items() if name not in _HIDDEN)
    return f"{record.get('event')}: {rest}" if rest else str(record.get("event"))


def _start(record: Record) -> str:
    what = f"{record['size']} x {record['device_name']}, {record['layout']}"
    if record["step"]:
        return f"the run goes on after step {record['step']} of {record['total_steps']}: {what}"
    return f"the run begins, {record['total_steps']} steps: {what}"


def _form(record: Record) -> str:
    source = "copies in memory" if record["cause"] == "memory" else record["cause"]
    step = f" of step {record['step']}" if record.get("step") is not None else ""
    return (
        f"generation {record['generation']}: {record['world_size']} processes, {record['layout']}; state from "
        f"{source}{step}"
    )


def _resume(record: Record) -> str:
    seconds = record.get("seconds_since_detection")
    after = f", {seconds:.2f} s after the fault was noticed" if seconds is not None else ""
    return f"training at step {record['step']} in generation {record['generation']}{after}"


def _ended(record: Record) -> str:
    return f"all steps are done, the last one is {record['step']}{_because(record)}"


def _stopped(record: Record) -> str:
    return f"stopped after step {record['step']}, with its state saved{_because(record)}"


def _wait(record: Record) -> str:
    seconds = record.get("seconds")
    return f"waiting{f' for up to {seconds:.0f} s' if seconds is not None else ''}: {record['cause']}"


def _because(record: Record) -> str:
    return f"; {record['cause']}" if record.get("cause") else ""


_SENTENCES: dict[str, Callable[[Record], str]] = {
    "run_start": _start,
    "form": _form,
    "resume": _resume,
    "wait": _wait,
    "end": _ended,
    "stopped": _stopped,
    "stop": lambda r: f"stopped after step {r['step']}: asked to, or out of time",
    "early_stop": lambda r: (
        f"ended after step {r['step']}: held-out loss no longer falls (train.early_stop_evaluations)"
    ),
    "save": lambda r: f"checkpoint of step {r['step']}",
    "save_failed": lambda r: f"the checkpoint of step {r['step']} could not be saved: {r['cause']}",
    "tasks": lambda r: f"tasks scored after step {r['step']}",
    "tasks_failed": lambda r: f"the tasks could not be scored after step {r['step']}: {r['cause']}",
    "save_incomplete": lambda r: f"the checkpoint of step {r['step']}: {r['cause']}",
    "skip": lambda r: (
        f"step {r['step']} was not applied: {r['reason']}; samples {r['first_sample']} to {r['last_sample']}"
    ),
    "settings_changed": lambda r: f"goes on with other settings: {'; '.join(r['changed'])}",
    "detect": lambda r: f"a fault in step {r['step']}, generation {r['generation']}: {r['cause']}",
    "blame": lambda r: f"found to blame ({r['fault']}): {r['cause']}",
    "remove": lambda r: f"device {r['device']} of {r['node']} is removed: {r['cause']}",
    "reshape": lambda r: f"another layout: {r['after']} instead of {r['before']}",
    "scored": lambda r: f"log-probabilities of the reference were computed and are kept in {r['file']}",
    "round": lambda r: (
        f"round {r['number']} answered and judged: mean score {r['reward']:.3g}, "
        f"{r['completions/clipped_ratio']:.1%} of the answers not ended"
    ),
    "degraded": lambda r: f"{r['cause']}; the run goes on without it",
    "restored": lambda r: f"{r['target']} can be written again",
    "folder_restored": lambda r: f"{r['cause']}",
    "copies_failed": lambda r: f"no memory copies of the training state from step {r['step']} on: {r['cause']}",
    "second_copy_failed": lambda r: (
        f"the second copies of {r['node']}, device {r['device']}, do not reach {r['partner']}: {r['cause']}"
    ),
    "copies_again": lambda r: f"memory copies of the training state are made again from step {r['step']} on",
    "unheard": lambda r: f"{r['cause']}",
    "copies_ignored": lambda r: f"{r['cause']}",
    "crowded": lambda r: f"{r['cause']}",
    "lost": lambda r: f"node {r['node']} is lost: {r['cause']}",
    "stuck": lambda r: f"{r['cause']}",
    "not_started": lambda r: f"the agent of {r['node']} could not be started, and is tried again: {r['cause']}",
    "agent_ended": lambda r: f"the agent of {r['node']} ended: {r['cause']}",
    "not_joined": lambda r: f"node {r['node']} is not there: {r['cause']}",
    "exclude": lambda r: f"node {r['node']} is left out of this start: {r['cause']}",
    "join": lambda r: f"node {r['node']} is there",
    "health": lambda r: f"{r['node']}, device {r['device']}: {r['cause']}",
    "stall": lambda r: f"step {r['step']} has taken {r['seconds']:.1f} s: {r['cause']}",
    "requeue": lambda r: f"back to SLURM's queue: {r['cause']}",
    "not_requeued": lambda r: f"the job ends, and does not go back to SLURM's queue: {r['cause']}",
    "fail": lambda r: f"the run cannot go on ({r['fault']}): {r['cause']}",
}
"""Kind of an event → its sentence. A lambda raises KeyError where a field is missing."""
