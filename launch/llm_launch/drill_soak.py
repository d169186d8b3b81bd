"""The soak: one long run with faults all the time, alone or in pairs, which ends by itself and does not grow."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from llm_launch.drill_growth import Change, GrowthWatch, changes
from llm_launch.drill_verdicts import DEVICES, START_S, Finding, check_steps
from llm_launch.live_run import LiveRun, Target, unix_time
from llm_parallel.errors import EXIT_STOPPED
from llm_parallel.goodput.rates import MONTH_S, Job
from llm_parallel.goodput.simulate import simulate

KINDS = ("kill", "stop", "agent", "node", "nan")
SELDOM = "growth of memory, files and threads was not compared: too few looks found all processes there"
SLOWER = 1000.0
"""The simulator takes rates of real fleets; a soak in which all takes so many times as long has the same goodput."""
BEFORE_END_S = 10.0
"""Time before the run's time limit in which no fault is caused."""


@dataclass(frozen=True)
class SoakPlan:
    """How long a soak is, and what is caused in it."""

    seconds: float
    every_s: float
    """Mean time between faults, or between pairs of them."""
    pair_ms: float = 0.0
    """Every fault is two within so many milliseconds; 0: one in six is, both at once."""


@dataclass
class Soak:
    """What a long run with many faults came to."""

    finding: Finding
    faults: dict[str, int] = field(default_factory=dict)
    apart_ms: list[float] = field(default_factory=list)
    """Time between the two faults of each pair."""
    steps: int = 0
    seconds: float = 0.0
    goodput: float = 0.0
    """Share of the time that the launcher did not spend recovering, by its own count."""
    useful: float = 0.0
    """Share of the time that the steps that were kept would have taken without any fault."""
    simulated: float = 0.0
    """What the goodput simulator gives for as many interruptions of that length."""
    recover_s: list[float] = field(default_factory=list)
    growth: list[Change] = field(default_factory=list)

    def lines(self) -> list[str]:
        """What is printed of it."""
        verdict = "; ".join(self.finding.wrong) or "ended right"
        recover = self.recover_s or [0.0]
        pairs = f", {len(self.apart_ms)} pairs at most {max(self.apart_ms):.0f} ms apart" if self.apart_ms else ""
        return [
            f"{self.finding.scenario}: {sum(self.faults.values())} faults {self.faults}{pairs}, {self.steps} steps in "
            f"{self.seconds:.0f} s, {len(self.recover_s)} recoveries of {statistics.mean(recover):.2f} s on average, "
            f"{max(recover):.1f} s at most; not recovering {self.goodput:.1%} of the time, steps kept are worth "
            f"{self.useful:.1%} of it, the simulator says {self.simulated:.1%} for such interruptions: {verdict}",
            *[f"growth: {change}" for change in self.growth],
            *(
                []
                if any(change.amount == "pss_mib" and change.role == "worker" for change in self.growth)
                else [SELDOM]
            ),
        ]


def soak(run_file: Path, folder: Path, plan: SoakPlan, rng: random.Random) -> Soak:
    """A run with a time limit of ``plan.seconds``, at which it has to end by itself, with faults at random times."""
    layouts = (["parallel.dp=4"], ["parallel.tp=2", "parallel.dp=2"], ["parallel.pp=2", "parallel.dp=2"])
    layout = rng.choice(layouts)
    kind = f" with pairs within {plan.pair_ms:g} ms" if plan.pair_ms else ""
    found = Soak(Finding(f"soak of {plan.seconds:.0f} s{kind} in {' '.join(layout)}"))
    limits = [f"train.time_limit_s={plan.seconds:g}", "train.steps=10000000"]
    limits += ["elastic.strikes=1000000", "elastic.max_fruitless=1000"]
    run = LiveRun.start(run_file, [*layout, *limits], folder / "soak", DEVICES, DEVICES)
    began = time.monotonic()
    try:
        run.reach(3, START_S)
        watch = GrowthWatch(run)
        _cause_faults(run, plan, rng, found, watch, began + plan.seconds - BEFORE_END_S)
        status = run.wait(plan.seconds + START_S)
        found.finding.expect(status == EXIT_STOPPED, f"status {status}, not {EXIT_STOPPED}, at the run's time limit")
        check_steps(found.finding, run, max((record["step"] for record in run.steps()), default=0))
        found.finding.expect(not run.events("remove"), "a healthy device was removed")
        found.growth = changes(watch.looks, watch.looks[-1].at_s) if watch.looks else []
        for change in found.growth:
            found.finding.expect(change.last <= change.bound, f"growth of {change}")
    except TimeoutError as error:
        found.finding.wrong.append(str(error)[:2000])
    finally:
        run.close()
    found.seconds = time.monotonic() - began
    resumed = run.events("resume")
    found.recover_s = [e["seconds_since_detection"] for e in resumed if "seconds_since_detection" in e]
    found.goodput = run.status().get("goodput", {}).get("fraction", 0.0)
    found.steps = len({record["step"] for record in run.steps()})
    if found.steps > 2:
        found.useful, found.simulated = goodput_beside_simulation(run, found.recover_s)
    return found


def _cause_faults(
    run: LiveRun, plan: SoakPlan, rng: random.Random, found: Soak, watch: GrowthWatch, until_s: float
) -> None:
    while not _sleep_or_end(run, watch, rng.expovariate(1.0 / plan.every_s), until_s - time.monotonic()):
        wanted = run.status().get("state") == "training" or rng.random() < 0.5  # a fault may meet a recovery too
        if not wanted:
            continue
        both = plan.pair_ms > 0 or rng.randrange(len(KINDS) + 1) == 0
        kinds = rng.choices(KINDS, k=2) if plan.pair_ms else ["kill", "node"] if both else [rng.choice(KINDS)]
        if kinds == ["nan", "nan"]:  # in all replicas at once it is no device's, and ends a run
            kinds[1] = "kill"
        pause_s = rng.uniform(0.0, plan.pair_ms / 1000.0)
        times = _strike(run, kinds, pause_s, rng)
        for kind in kinds[: len(times)]:
            found.faults[kind] = found.faults.get(kind, 0) + 1
        if len(times) == 2:
            found.apart_ms.append(1000.0 * (times[1] - times[0]))


def _strike(run: LiveRun, kinds: list[str], pause_s: float, rng: random.Random) -> list[float]:
    """Causes one fault, or two at different ranks ``pause_s`` apart; the times of those that met something, none if the
    run had no place for them."""
    ranks = len(run.status().get("ranks", []))
    if ranks < len(kinds):
        return []
    found = [run.target_now(rank) for rank in rng.sample(range(ranks), len(kinds))]
    targets: list[Target] = [target for target in found if target is not None]
    if len(targets) < len(kinds):
        return []
    times: list[float] = []
    first_s = time.monotonic()
    for kind, target in zip(kinds, targets, strict=True):
        if times:
            time.sleep(max(0.0, first_s + pause_s - time.monotonic()))
        try:
            times.append(run.cause_at(kind, target, **({"left": 1} if kind == "nan" else {})))
        except (OSError, KeyError, ValueError):
            break  # it was just recovering from the fault before
    return times


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
        rate_per_gpu_month=len(recover_s) / (SLOWER * elapsed) * MONTH_S / DEVICES,
        detect_s=SLOWER * statistics.mean(waits),
        restart_s=SLOWER * statistics.mean(recover_s),
        write_s=0.0,
        interval_s=SLOWER * step_s,
    )
    return useful, simulate(job).goodput


def _sleep_or_end(run: LiveRun, watch: GrowthWatch, seconds: float, left_s: float) -> bool:
    """Whether the run, or the time for faults, is over before ``seconds`` are."""
    deadline = time.monotonic() + min(seconds, left_s)
    while time.monotonic() < deadline:
        if run.process.poll() is not None:
            return True
        watch.look_if_due()
        time.sleep(0.05)
    return seconds >= left_s
