"""The kinds of blame drills: what is caused, and whose fault it is."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from typing import Any

import psutil

from llm_launch.drill_means import (
    ControlGroup,
    Flood,
    SilentPartner,
    WriterKiller,
    control_group_root,
    port_of_copies,
)
from llm_launch.drill_stage import PROVEN_MORE, Device, Scene, Stage
from llm_launch.drill_verdicts import DEVICES

FLOOD_STEPS = 200
"""More than a run makes while a flood begins, which takes a second or more."""


def _nobody(kind: str, **details: Any) -> Scene:
    def act(stage: Stage) -> list[Device]:
        stage.once(kind, **details)
        return []

    return Scene(act)


def _bad(kind: str, **details: Any) -> Scene:
    return Scene(lambda stage: [stage.once(kind, **details)])


def _killed_twice(stage: Stage) -> list[Device]:
    device = stage.once("kill")
    stage.again(device, "kill")
    return [device]


def _twice_apart(kind: str, **details: Any) -> Scene:
    """Two faults that are no device's, on one device, with enough steps between them."""

    def act(stage: Stage) -> list[Device]:
        device = stage.once(kind, **details)
        stage.make_steps(PROVEN_MORE)
        stage.again(device, kind, **details)
        return []

    return Scene(act, steps=55)


def _everywhere(stage: Stage) -> list[Device]:
    step = stage.run.steps()[-1]["step"] + 10
    for number in range(DEVICES):
        stage.run.cause("raise", number, from_step=step)
    return []


def _unkillable(stage: Stage) -> list[Device]:
    """A frozen process takes no signal before it thaws; the run goes on without it, and takes its device back after."""
    target = stage.run.target(stage.rank)
    group = ControlGroup("freezer", target.pid)
    stage.clean_up.callback(group.remove)
    stage.clean_up.callback(group.write, "freezer.state", "THAWED")
    fault_s = stage.run.note_fault(f"frozen at rank {stage.rank}")
    group.write("freezer.state", "FROZEN")
    stage.run.first_step_after(fault_s)
    stage.finding.expect(bool(stage.events("stuck")), "no event says that the process cannot be ended")
    stage.finding.expect(psutil.pid_exists(target.pid), "the frozen process could be ended")
    group.write("freezer.state", "THAWED")
    _wait_for_rank(stage, [target.node, target.device])
    return []


def _zygote_stopped(stage: Stage) -> list[Device]:
    """The process that reports a worker's end, and forks the next one, is stopped."""
    target = stage.run.target(stage.rank)
    os.kill(psutil.Process(target.pid).ppid(), signal.SIGSTOP)
    stage.run.first_step_after(stage.run.cause_at("kill", target))
    _wait_for_rank(stage, [target.node, target.device])
    return []


def _no_fork(stage: Stage) -> list[Device]:
    """The process that forks workers may have no other process; the run goes on without, and forks when it may."""
    target = stage.run.target(stage.rank)
    group = ControlGroup("pids", psutil.Process(target.pid).ppid())
    stage.clean_up.callback(group.remove)
    group.write("pids.max", "1")
    stage.run.first_step_after(stage.run.cause_at("kill", target))
    said = [event["cause"] for event in stage.events("health")]
    stage.finding.expect(any("no process could be started" in text for text in said), "no event tells of the fork")
    group.write("pids.max", "max")
    _wait_for_rank(stage, [target.node, target.device])
    return []


def _wait_for_rank(stage: Stage, device: Device) -> None:
    """Until a device trains again, or the run has made all its steps without it, which a slow machine may need."""

    def back() -> bool:
        return device in stage.run.status().get("ranks", []) or bool(stage.run.events("end"))

    stage.run.until(back, 120.0, f"{device} to be used again")


def _flood_at_copies(stage: Stage) -> list[Device]:
    """Strangers hold the server that keeps a node's second copies, while a generation that needs it forms."""
    flood = Flood(port_of_copies(stage.run.target(stage.rank).agent_pid))
    with flood:
        return _during_flood(stage, flood, (stage.rank + 1) % DEVICES, "kill")


def _flood_at_controller(stage: Stage) -> list[Device]:
    """Strangers hold the controller's port, while the agent of a node that is lost has to come back through it."""
    host, port = stage.run.status()["controller"]
    flood = Flood((host, port))
    with flood:
        return _during_flood(stage, flood, stage.rank, "agent")


def _during_flood(stage: Stage, flood: Flood, rank: int, kind: str) -> list[Device]:
    stage.run.until(lambda: flood.opened >= flood.silent + flood.dripping, 120.0, "the flood")
    stage.make_steps(5)
    stage.finding.expect(not stage.events("detect", "lost"), "the flood alone caused a recovery")
    stage.run.first_step_after(stage.run.cause(kind, rank))
    stage.make_steps(5)
    return []


def _silent_partner(stage: Stage) -> list[Device]:
    """A node accepts copies and answers nothing: the partner is to blame, not who sends, and nothing is interrupted."""
    partner = SilentPartner(stage.run.secret)
    with partner:
        stage.run.cause("partner", stage.rank, address=list(partner.address))
        stage.run.until(lambda: stage.events("second_copy_failed"), 120.0, "the event of a second copy that failed")
        stage.make_steps(3)
        stage.finding.expect(partner.received > 0, "the silent partner was sent nothing")
    stage.finding.expect(not stage.events("detect"), "a silent partner caused a recovery")
    return []


def _writer_killed(stage: Stage) -> list[Device]:
    """The processes that write checkpoints are ended, as where memory runs out; the last checkpoint is complete."""

    def workers() -> list[int]:
        return [pid for node in stage.run.status().get("nodes", []) for pid in node["workers"].values()]

    # One that is killed when it has written all is no failure, so they are killed until one is said.
    with WriterKiller(workers):
        stage.run.until(lambda: stage.events("save_failed"), 120.0, "the event of a checkpoint that failed")
    stage.finding.expect(not stage.events("detect"), "a killed writer caused a recovery")
    return []


def _lacks(controller: str) -> str:
    return (
        "" if control_group_root(controller) else f"this machine lends no control group of version 1 for {controller}"
    )


SCENES: dict[str, Scene] = {
    "worker killed": _nobody("kill"),
    "worker stopped": _nobody("stop"),
    "agent killed": _nobody("agent"),
    "node lost": _nobody("node"),
    "one loss NaN": _nobody("nan", left=1),
    "killed twice on one device": Scene(_killed_twice),
    "bit flipped": _bad("flip", left=1),
    "a fifth of the speed": replace(_bad("slow"), steps=90, overrides=("elastic.hang_deviations=100",)),
    "same mistake everywhere": Scene(_everywhere, status=1, end_s=60.0),
    "stopped twice on one device": _twice_apart("stop"),
    "program stalls twice on one device": _twice_apart("stall", left=1),
    "program stalls twice with the interpreter's lock": _twice_apart("hold", left=1),
    "process that cannot be killed": Scene(_unkillable, impossible=lambda: _lacks("freezer")),
    "worker killed under a stopped zygote": Scene(_zygote_stopped),
    "no process can be forked": Scene(_no_fork, impossible=lambda: _lacks("pids")),
    "flood at the server of copies": Scene(_flood_at_copies, steps=FLOOD_STEPS),
    "flood at the controller": Scene(_flood_at_controller, steps=FLOOD_STEPS),
    "silent partner": Scene(_silent_partner),
    "writer of a checkpoint killed": Scene(_writer_killed, overrides=("checkpoint.interval_steps=2",)),
}
