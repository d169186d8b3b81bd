"""Blame drills: short runs with one scenario whose culprit is known; who was removed is compared with it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llm_launch.drill_verdicts import DEVICES, START_S, Finding, check_steps
from llm_launch.live_run import LiveRun, unix_time
from llm_launch.show import timeline

BLAME_STEPS = 60


Act = Callable[[LiveRun, int], "Sequence[list[Any]]"]
"""Causes a scenario at a rank; the (node, device) pairs that have to be removed."""


def _once(kind: str, **details: Any) -> Act:
    def act(run: LiveRun, rank: int) -> Sequence[list[Any]]:
        run.first_step_after(run.cause(kind, rank, **details))
        return []

    return act


def _bad(kind: str, **details: Any) -> Act:
    def act(run: LiveRun, rank: int) -> Sequence[list[Any]]:
        node, index, _ = run.worker(rank)
        run.first_step_after(run.cause(kind, rank, **details))
        return [[node, index]]

    return act


def _again(run: LiveRun, rank: int) -> Sequence[list[Any]]:
    node, index, _ = run.worker(rank)
    run.first_step_after(run.cause("kill", rank))
    run.first_step_after(run.cause("kill", run.status()["ranks"].index([node, index])))
    return [[node, index]]


def _everywhere(run: LiveRun, rank: int) -> Sequence[list[Any]]:
    step = run.steps()[-1]["step"] + 10
    for number in range(DEVICES):
        run.cause("raise", number, from_step=step)
    return []


SCENARIOS: dict[str, Act] = {
    "worker killed": _once("kill"),
    "worker stopped": _once("stop"),
    "agent killed": _once("agent"),
    "node lost": _once("node"),
    "one loss NaN": _once("nan", left=1),
    "killed twice on one device": _again,
    "bit flipped": _bad("flip", left=1),
    "a fifth of the speed": _bad("slow"),
    "same mistake everywhere": _everywhere,
}


def blame_drill(run_file: Path, folder: Path, number: int, rng: random.Random) -> Finding:
    """One scenario, drawn with the rank and the step, on four devices."""
    name = rng.choice(sorted(SCENARIOS))
    rank, step = rng.randrange(DEVICES), rng.randrange(6, 16)
    finding = Finding(f"{number}: {name} at rank {rank} after step {step}")
    began = time.monotonic()
    overrides = ["parallel.dp=4", f"train.steps={BLAME_STEPS}", "elastic.checksum_every_steps=1",
                 "elastic.probe_every_steps=2", "elastic.strikes=2"]  # fmt: skip
    run = LiveRun.start(run_file, overrides, folder / f"blame-{number}", DEVICES, DEVICES)
    try:
        run.reach(step, START_S)
        bad = SCENARIOS[name](run, rank)
        if name == "same mistake everywhere":
            fault_s = time.time()
            status = run.wait(60.0)
            finding.expect(status == 1, f"exit status {status} instead of 1")
            ended = unix_time(run.events("fail")[-1]) - fault_s if run.events("fail") else 99.0
            finding.expect(ended < 10.0, f"the run ended {ended:.1f} s after the mistake was planted")
        else:
            finding.expect(run.wait(START_S) == 0, "the run did not end with status 0")
            check_steps(finding, run, BLAME_STEPS)
        removed = [[event["node"], event["device"]] for event in run.events("remove")]
        for device in bad:
            finding.expect(device in removed, f"bad device {device} was not removed")
        for device in removed:
            finding.expect(device in bad, f"healthy device {device} was removed")
    except TimeoutError as error:
        finding.wrong.append(str(error)[:2000])
    finally:
        run.close()
    if finding.wrong:
        finding.wrong += [line[:200] for line in timeline(run.run_dir)][-12:]
    finding.seconds = time.monotonic() - began
    return finding
