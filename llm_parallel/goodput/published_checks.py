"""Compares published reliability figures with what our formulas give from the other figures of the same source, and the
formulas with the simulation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from llm_parallel.goodput import closed_form
from llm_parallel.goodput.closed_form import kokolis_ettr
from llm_parallel.goodput.elastic_gain import elastic_job
from llm_parallel.goodput.rates import POLICIES, Job, find_profile, published, published_rows
from llm_parallel.goodput.simulate import simulate

GOODPUT_METRICS = ("ettr", "effective_training_time", "goodput", "downtime", "efficiency")


@dataclass(frozen=True)
class Check:
    """One published figure and our prediction of it."""

    system: str
    figure: str
    published: float
    predicted: float
    unit: str
    kind: str
    """``measured``, or ``projected`` where the source itself computed it."""
    inputs: str

    @property
    def error(self) -> float:
        """Relative to the published figure."""
        return self.predicted / self.published - 1.0


TOLERANCE = 0.01
"""Largest difference allowed between formula and simulation, relative."""


@dataclass(frozen=True)
class Agreement:
    """Goodput of one job by formula and by simulation."""

    name: str
    formula: float
    simulated: float

    @property
    def difference(self) -> float:
        """Relative to the formula."""
        return self.simulated / self.formula - 1.0


def agreements(seed: int = 0) -> list[Agreement]:
    """Formula and simulation for every policy, and for elastic recovery, on 16 to 131,072 GPUs with Llama 3's failure
    rate and the best checkpoint interval."""
    profile = find_profile("llama3")
    found = []
    for gpus in (16, 1024, 16384, 131072):
        job = Job(gpus, profile.rate_per_gpu_month, profile.hardware_share, spare_nodes=2)
        job = replace(job, interval_s=closed_form.best_interval_s(job.mtbf_s, job.write_s))
        jobs = {policy: replace(job, policy=policy) for policy in POLICIES}
        jobs["elastic, 3 s"] = elastic_job(job, 10.0, 3.0)
        for name, one in jobs.items():
            outcome = simulate(one, seed, relative_error=0.0015)
            found.append(Agreement(f"{gpus:,} GPUs, {name}", closed_form.goodput(one), outcome.goodput))
    return found


def checks() -> list[Check]:
    """All published figures for which the source gives the inputs of a prediction."""
    return [*_mean_times(), *_ft_hsdp(), *_torchft()]


def _mean_times() -> list[Check]:
    """Mean time to failure, from the failures per 1000 nodes and day, in proportion to the nodes."""
    found = []
    rate = float(published("Meta RSC-1", "node_failure_rate")["value"])
    for gpus in (1024, 16384, 131072):
        row = published("Meta RSC", "mttf", gpus)
        hours = 24 / (gpus / 8 * rate / 1000)
        kind, inputs = row["kind"], f"{rate} failures per 1000 node-days of RSC-1"
        found.append(Check("Meta RSC", f"MTTF at {gpus:,} GPUs", float(row["value"]), hours, "h", kind, inputs))
    rate = float(published("Meta FT-HSDP", "interruptions")["value"])
    minutes = float(published("Meta FT-HSDP", "mtbf")["value"])
    predicted = 24 * 60 / (98_000 / 8 * rate / 1000)
    inputs = f"{rate} interruptions per 1000 servers and day, seen at 32,000 GPUs"
    return [*found, Check("Meta FT-HSDP", "MTBF at 98,000 GPUs", minutes, predicted, "min", "measured", inputs)]


def _ft_hsdp() -> list[Check]:
    """Effective time at 98,000 GPUs, with one stall for each failure; a failure loses less than a step, and checkpoints
    do not count."""
    mtbf = float(published("Meta FT-HSDP", "mtbf")["value"])
    stalls = [float(text) for text in published("Meta FT-HSDP", "recovery_stall")["value"].split("->")]
    found = []
    for metric, stall in zip(("effective_training_time_sync", "effective_training_time_elastic"), stalls):
        share = float(published("Meta FT-HSDP", metric)["value"])
        predicted = 100 * kokolis_ettr(mtbf, stall, 1e-9, 0.0)
        inputs = f"MTBF {mtbf:g} min, stall {stall:g} min"
        found.append(Check("Meta FT-HSDP", metric.replace("_", " "), share, predicted, "%", "measured", inputs))
    return found


def _torchft() -> list[Check]:
    """Share of steps without a failure, exp(-step / MTBF), and the efficiency that follows with fewer groups and slower
    steps."""
    found = []
    undisturbed_step_s, num_groups = 10.9, 30
    for run, step_s, mtbf_s, groups in (("run1", 10.9, 60.0, 29.6), ("run2", 15.46, 15.0, 18.9)):
        steps = 100 * math.exp(-step_s / mtbf_s)
        overall = steps * groups / num_groups * undisturbed_step_s / step_s
        inputs = f"a failure in {mtbf_s:g} s, steps of {step_s:g} s, {groups} of {num_groups} groups"
        for metric, predicted in (("step_efficiency", steps), ("training_efficiency", overall)):
            value = float(published("torchft", f"{run}_{metric}")["value"])
            found.append(
                Check("torchft", f"{run} {metric.replace('_', ' ')}", value, predicted, "%", "measured", inputs)
            )
    return found


def bounds() -> list[str]:
    """The longest time that one interruption can have taken, from published bounds on goodput."""
    interruptions = int(published("Llama 3 405B", "interruptions_total")["value"])
    days = float(published("Llama 3 405B", "window")["value"])
    minutes = 0.1 * days * 24 * 60 / interruptions
    mega = 0.1 * 21 * 24 * 60 / 100
    return [
        f"Llama 3 405B, over 90 %: {interruptions} interruptions in {days:g} days allow at most {minutes:.1f} min each,"
        " lost work and checkpoints included; the paper gives neither interval nor restart time",
        f"MegaScale, over 90 %: 100 repairs in 21 days (the paper says several weeks) allow at most {mega:.1f} min"
        " each; it gives under 10 min to detect and diagnose and under 15 min to catch up, 25 min together",
    ]


def without_inputs() -> list[str]:
    """Published goodput figures that can't be predicted, because their source states no failure rate."""
    used = {(check.system, round(check.published, 6)) for check in checks()}
    names = []
    for row in published_rows():
        if not any(name in row["metric"] for name in GOODPUT_METRICS) or row["metric"] == "ettr_formula":
            continue
        try:
            known = (row["system"], round(float(row["value"]), 6)) in used
        except ValueError:
            known = row["system"] in ("Llama 3 405B", "MegaScale")
        if not known:
            names.append(f"{row['system']} {row['metric'].replace('_', ' ')} {row['value']} {row['unit']}".strip())
    return names
