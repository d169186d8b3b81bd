"""``llm-parallel drill``: random faults in real runs, and whether they were survived and blamed rightly.

Two kinds. A *blame* drill is a short run with one scenario whose culprit is known: no healthy device may be removed and
every bad one must be. A *soak* is one long run with a fault every so often, which has to end by itself with every step
made from the right samples. Both print what happened and give exit status 1 if something was not as it has to be.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from llm_launch.live_run import LiveRun, unix_time
from llm_launch.show import timeline
from llm_parallel.errors import UserError
from llm_parallel.goodput.rates import MONTH_S, Job
from llm_parallel.goodput.simulate import simulate
from llm_parallel.lines import say

DEVICES = 4
START_S = 180.0
SOAK_KINDS = ("kill", "stop", "agent", "node", "nan", "two")
BLAME_STEPS = 60


@dataclass
class Finding:
    """One drill: what was done, what came out, what is wrong about it (nothing: it passed)."""

    scenario: str
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)


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
            _expect(finding, status == 1, f"exit status {status} instead of 1")
            ended = unix_time(run.events("fail")[-1]) - fault_s if run.events("fail") else 99.0
            _expect(finding, ended < 10.0, f"the run ended {ended:.1f} s after the mistake was planted")
        else:
            _expect(finding, run.wait(START_S) == 0, "the run did not end with status 0")
            check_steps(finding, run, BLAME_STEPS)
        removed = [[event["node"], event["device"]] for event in run.events("remove")]
        for device in bad:
            _expect(finding, device in removed, f"bad device {device} was not removed")
        for device in removed:
            _expect(finding, device in bad, f"healthy device {device} was removed")
    except TimeoutError as error:
        finding.wrong.append(str(error)[:2000])
    finally:
        run.close()
    if finding.wrong:
        finding.wrong += [line[:200] for line in timeline(run.run_dir)][-12:]
    finding.seconds = time.monotonic() - began
    return finding


def check_steps(finding: Finding, run: LiveRun, steps: int) -> None:
    """Every step is there, in order, from its own samples, and no fault cost more than one."""
    made = run.steps()
    numbers = [record["step"] for record in made]
    _expect(finding, set(numbers) == set(range(1, steps + 1)), f"steps are missing of {steps}")
    _expect(finding, numbers == sorted(numbers), "steps before the last one were made again")
    again = len(numbers) - len(set(numbers))
    _expect(finding, again <= len(run.events("detect")), f"{again} steps made again")
    batch = made[0]["train/samples"] // made[0]["step"] if made else 0
    _expect(finding, all(r["train/samples"] == batch * r["step"] for r in made), "samples were lost or repeated")


def _expect(finding: Finding, holds: bool, otherwise: str) -> None:
    if not holds:
        finding.wrong.append(otherwise)


@dataclass
class Soak:
    """What a long run with many faults came to."""

    faults: dict[str, int]
    steps: int
    seconds: float
    goodput: float
    """Share of the time that the launcher did not spend recovering, by its own count."""
    useful: float
    """Share of the time that the steps that were kept would have taken without any fault."""
    simulated: float
    """What the goodput simulator gives for as many interruptions of that length."""
    recover_s: list[float]
    finding: Finding


def soak(run_file: Path, folder: Path, seconds: float, every_s: float, rng: random.Random) -> Soak:
    """A run with a time limit of ``seconds``, at which it has to end by itself, and faults at random times, ``every_s``
    apart on average."""
    layouts = (["parallel.dp=4"], ["parallel.tp=2", "parallel.dp=2"], ["parallel.pp=2", "parallel.dp=2"])
    layout = rng.choice(layouts)
    finding = Finding(f"soak of {seconds:.0f} s in {' '.join(layout)}")
    run = LiveRun.start(
        run_file, [*layout, f"train.time_limit_s={seconds:g}", "train.steps=10000000", "elastic.strikes=1000000",
                   "elastic.max_fruitless=1000"], folder / "soak", DEVICES, DEVICES,
    )  # fmt: skip
    faults: dict[str, int] = {}
    began = time.monotonic()
    try:
        run.reach(3, START_S)
        while True:
            pause = rng.expovariate(1.0 / every_s)
            over = _sleep_or_end(run, pause, began + seconds - 10.0 - time.monotonic())
            if over:
                break
            kind = rng.choice(SOAK_KINDS)
            status = run.status()
            ranks = len(status.get("ranks", []))
            wanted = status.get("state") == "training" or rng.random() < 0.5  # a fault may meet a recovery too
            if wanted and _strike(run, kind, rng, ranks):
                faults[kind] = faults.get(kind, 0) + 1
        _expect(finding, run.wait(seconds + START_S) == 0, "the run did not end with status 0")
        last = max((record["step"] for record in run.steps()), default=0)
        check_steps(finding, run, last)
        _expect(finding, not run.events("remove"), "a healthy device was removed")
    except TimeoutError as error:
        finding.wrong.append(str(error)[:2000])
    finally:
        run.close()
    finding.seconds = time.monotonic() - began
    recover = [event["seconds_since_detection"] for event in run.events("resume") if "seconds_since_detection" in event]
    goodput = run.status().get("goodput", {}).get("fraction", 0.0)
    useful, simulated = goodput_beside_simulation(run, recover)
    steps = len({r["step"] for r in run.steps()})
    return Soak(faults, steps, finding.seconds, goodput, useful, simulated, recover, finding)


def goodput_beside_simulation(run: LiveRun, recover_s: list[float]) -> tuple[float, float]:
    """Share of a run's time that kept steps would have taken undisturbed, and the simulator's goodput for its
    interruptions: their number, mean time to detection and mean time from there, losing half a step each on average."""
    steps = run.steps()
    times = [unix_time(record) for record in steps]
    elapsed = times[-1] - times[0]
    step_s = statistics.median(after - before for before, after in pairwise(times))
    useful = step_s * (len({record["step"] for record in steps}) - 1) / elapsed
    detected = [unix_time(event) for event in run.events("detect")]
    waits = [min((d - fault for d in detected if d >= fault), default=0.0) for fault, _ in run.faults]
    if not recover_s or not waits:
        return useful, 1.0
    job = Job(
        num_gpus=DEVICES,
        rate_per_gpu_month=len(recover_s) / elapsed * MONTH_S / DEVICES,
        detect_s=statistics.mean(waits),
        restart_s=statistics.mean(recover_s),
        write_s=0.0,
        interval_s=step_s,
    )
    return useful, simulate(job).goodput


def _sleep_or_end(run: LiveRun, seconds: float, left_s: float) -> bool:
    """Whether the run, or the time for faults, is over before ``seconds`` are."""
    deadline = time.monotonic() + min(seconds, left_s)
    while time.monotonic() < deadline:
        if run.process.poll() is not None:
            return True
        time.sleep(0.05)
    return seconds >= left_s


def _strike(run: LiveRun, kind: str, rng: random.Random, ranks: int) -> bool:
    """Causes one fault, or two in different nodes at once; False if the run had no place for it."""
    try:
        if kind == "two":
            if ranks < 2:
                return False
            first, second = rng.sample(range(ranks), 2)
            run.cause("kill", first)
            run.cause("node", second)
        else:
            run.cause(kind, rng.randrange(max(ranks, 1)), **({"left": 1} if kind == "nan" else {}))
    except (OSError, KeyError, IndexError, StopIteration, ValueError):
        return False  # it was just recovering from the fault before
    return True


def drill_command(run_file: Path, folder: Path, blame: int, soak_s: float, every_s: float, seed: int) -> int:
    """Runs the drills and prints what came out; exit status 1 if any was not survived as it has to be."""
    if blame < 0 or soak_s < 0 or every_s <= 0:
        raise UserError(f"--blame {blame}, --soak-s {soak_s:g} must not be negative and --every-s {every_s:g} over 0")
    if not run_file.is_file():
        raise UserError(f"{run_file} does not exist; give a run file whose data is here")
    rng, failed = random.Random(seed), 0
    for number in range(blame):
        finding = blame_drill(run_file, folder, number, rng)
        failed += bool(finding.wrong)
        verdict = "; ".join(finding.wrong) or "right"
        say(f"blame {finding.scenario}: {verdict} ({finding.seconds:.0f} s)")
    if blame:
        say(f"{blame} blame drills, seed {seed}: {blame - failed} right, {failed} wrong")
    if soak_s:
        result = soak(run_file, folder, soak_s, every_s, rng)
        failed += bool(result.finding.wrong)
        mean = sum(result.recover_s) / max(len(result.recover_s), 1)
        say(
            f"{result.finding.scenario}: {sum(result.faults.values())} faults {result.faults}, {result.steps} steps in "
            f"{result.seconds:.0f} s, {len(result.recover_s)} recoveries of {mean:.2f} s on average; not recovering "
            f"{result.goodput:.1%} of the time, steps kept are worth {result.useful:.1%} of it, the simulator says "
            f"{result.simulated:.1%} for such interruptions: {'; '.join(result.finding.wrong) or 'ended right'}"
        )
    return int(failed > 0)
