"""``llm-parallel goodput``: what failures cost a job, by formula and by simulation."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

from llm_parallel.errors import UserError
from llm_parallel.files import atomic_write
from llm_parallel.goodput import closed_form
from llm_parallel.goodput.claims import deck_claims
from llm_parallel.goodput.elastic_gain import RECOVERIES_S, Worth, elastic_job, worth
from llm_parallel.goodput.published_checks import TOLERANCE, agreements, bounds, checks, without_inputs
from llm_parallel.goodput.rates import HOUR_S, MONTH_S, POLICIES, RANGES, Job, find_profile, llama3_causes
from llm_parallel.goodput.request import GoodputRequest
from llm_parallel.goodput.simulate import MOST_EVENTS, simulate
from llm_parallel.lines import say
from llm_parallel.screen import say_next, show_table

UNSETTLED = f"the simulation ended after {MOST_EVENTS:,} failures and resizings, before its error was small."
SIZES = tuple(2**exponent for exponent in range(4, 18))


def goodput_command(request: GoodputRequest) -> int:
    """Does what the request asks; exit status 1 if --validate finds a difference. Raises UserError on bad input."""
    if request.claims or request.validate:
        return claims_command() if request.claims else validate_command()
    return _goodput(request)


def _goodput(request: GoodputRequest) -> int:
    """Prints the job's goodput, where the time goes, spares and the table of sizes."""
    base, source = _job(request, 1024 if request.gpus is None else request.gpus)
    elastic_job(base, request.step_s, RECOVERIES_S[0])  # raises for a bad --step-s before anything is printed
    say(f"Failure rate: {100 * base.rate_per_gpu_month:.3g} % per GPU and month, {source}.")
    say(
        f"Detection {base.detect_s:g} s, restart {base.restart_s:g} s, a checkpoint stops training for"
        f" {base.write_s:g} s; policy {base.policy}"
        + ("." if base.policy == "restart" else f", a broken node is away for {base.repair_s / HOUR_S:g} h on average.")
        + " All figures are computed, none is measured."
    )
    if request.gpus is not None:
        _print_job(base, request)
        if request.profile in (None, "llama3") and request.rate_per_gpu_month is None:
            _print_causes(base)
    rows = [_size_row(request, gpus) for gpus in SIZES if _fits(request, gpus)]
    _print_sizes(rows, base)
    gains = worth([_job(request, row["gpus"])[0] for row in rows], request.step_s, request.seed)
    _print_worth(gains, request.step_s)
    for row, gain in zip(rows, gains):
        row["goodput_elastic"] = dict(zip((f"{seconds:g} s" for seconds in RECOVERIES_S), gain.elastic))
    if request.out:
        _write(request, rows, source)
    if request.gpus is None:
        say_next("llm-parallel goodput --gpus 1024 --policy wait")
    else:
        say_next(f"llm-parallel plan --model llama2-70b --gpus {request.gpus} --tokens 2e12")
    return 0


def claims_command() -> int:
    """Prints the well-known claims, and which of them hold."""
    for claim in deck_claims():
        say(f"{claim.claim}: {claim.verdict}.\n    {claim.sentence}")
    say_next("llm-parallel goodput --validate")
    return 0


def validate_command() -> int:
    """Prints published figures with our predictions, bounds, figures that could not be predicted, and formulas with
    simulations; exit status 1 if a formula and its simulation differ by more than ``TOLERANCE``."""
    agreed = agreements()
    worst = max(agreed, key=lambda one: abs(one.difference))
    found = checks()
    heads = ("source", "figure", "published", "predicted", "error", "kind", "inputs")
    rows = [
        (
            *(check.system, check.figure, f"{check.published:g} {check.unit}", f"{check.predicted:.3g} {check.unit}"),
            *(f"{check.error:+.1%}", check.kind, check.inputs),
        )
        for check in found
    ]
    show_table("Published figures that give enough inputs", heads, rows)
    for name, group in (
        ("mean times between failures", [check for check in found if check.unit != "%" and check.kind == "measured"]),
        ("shares of time or steps", [check for check in found if check.unit == "%"]),
    ):
        mean = sum(abs(check.error) for check in group) / len(group)
        say(f"{len(group)} measured {name}: mean absolute error {mean:.1%}; nothing was fitted to them.")
    say(
        "The rate in proportion to GPUs is optimistic at both ends: small jobs die of other causes too, and at 98,000"
        " GPUs failures come three times as often as at 32,000 would say."
    )
    for line in bounds():
        say(f"bound: {line}")
    for line in without_inputs():
        say(f"no failure rate given, not predicted: {line}")
    for one in agreed:
        say(f"formula {one.formula:.2%}, simulated {one.simulated:.2%} ({one.difference:+.2%}): {one.name}")
    holds = abs(worst.difference) <= TOLERANCE
    say(
        f"formula and simulation {'agree' if holds else 'DISAGREE'} within {TOLERANCE:.0%} in {len(agreed)} jobs; the"
        f" largest difference is {abs(worst.difference):.2%} ({worst.name})."
    )
    say_next("llm-parallel goodput --gpus 16384")
    return int(not holds)


def _job(request: GoodputRequest, gpus: int) -> tuple[Job, str]:
    """The job, and where its failure rate comes from. The interval is the best one if it is ``auto``, and the number of
    spares if it is None."""
    if request.rate_per_gpu_month is not None and request.profile is not None:
        raise UserError(f"--rate-per-gpu-month and --profile {request.profile} both give a failure rate; keep one")
    if request.rate_per_gpu_month is not None:
        rate, share, source = request.rate_per_gpu_month / 100, 1.0, "as given"
    else:
        profile = find_profile(request.profile or "llama3")
        rate, share, source = profile.rate_per_gpu_month, profile.hardware_share, profile.source
    replica = request.replica_gpus if request.replica_gpus is not None else request.gpus_per_node
    if replica < 1 or request.gpus_per_node < 1:
        raise UserError(f"--replica-gpus {replica} and --gpus-per-node {request.gpus_per_node} must be at least 1")
    job = Job(
        num_gpus=gpus,
        rate_per_gpu_month=rate,
        hardware_share=share if request.hardware_share is None else request.hardware_share,
        detect_s=request.detect_s,
        restart_s=request.restart_s,
        write_s=request.write_s,
        policy=request.policy,
        spare_nodes=request.spares or 0,
        gpus_per_node=request.gpus_per_node,
        replica_nodes=-(-replica // request.gpus_per_node),
        repair_s=request.repair_h * HOUR_S,
    )
    job = replace(job, interval_s=_interval_s(request.interval, job))
    if request.spares is None:
        job = replace(job, spare_nodes=closed_form.best_spares(job))
    return job, source


def _interval_s(text: str, job: Job) -> float:
    if text != "auto":
        try:
            return float(text)
        except ValueError:
            raise UserError(f"--interval {text} must be a number of seconds, or auto for the best") from None
    best = closed_form.best_interval_s(job.mtbf_s, job.write_s)
    if best < RANGES["interval_s"][1]:
        raise UserError(
            f"--interval auto has no answer with --checkpoint-write-s {job.write_s:g}: checkpoints that cost nothing"
            " are best taken after every step; give the step time as --interval"
        )
    return min(best, RANGES["interval_s"][2])


def _fits(request: GoodputRequest, gpus: int) -> bool:
    replica_nodes = -(-(request.replica_gpus or request.gpus_per_node) // request.gpus_per_node)
    return request.policy != "shrink" or -(-gpus // request.gpus_per_node) % replica_nodes == 0


def _print_job(job: Job, request: GoodputRequest) -> None:
    outcome = simulate(job, request.seed)
    ledger = outcome.ledger
    first_order = closed_form.kokolis_ettr(job.mtbf_s, job.down_s, job.interval_s, job.write_s)
    say(
        f"\n{job.num_gpus:,} GPUs: one failure in {_time(job.mtbf_s)}; checkpoint every"
        f" {_time(job.interval_s)} (best: {_best_interval(job)}, Young: "
        f"{_time(closed_form.young_interval_s(job.mtbf_s, job.write_s))}); {job.spare_nodes} spare nodes."
    )
    say(
        f"goodput {closed_form.goodput(job):.2%} by formula, {outcome.goodput:.2%} ± {outcome.standard_error:.2%}"
        f" simulated over {ledger.failures:,} failures (seed {request.seed}); Kokolis' first-order ETTR"
        f" {first_order:.2%}{'' if job.policy == 'restart' else ', which counts no missing nodes'}"
    )
    if not outcome.settled:
        say(UNSETTLED)
    parts = {
        "training kept": ledger.useful_s,
        "checkpoints": ledger.checkpoint_s,
        "work lost": ledger.lost_s,
        "detection and restart": ledger.down_s,
        "waiting for nodes": ledger.waiting_s,
        "fewer replicas": ledger.shrunken_s,
    }
    shares = [f"{name} {part / ledger.elapsed_s:.2%}" for name, part in parts.items() if part]
    say("simulated time: " + ", ".join(shares))
    months = ", ".join(f"{policy} {closed_form.goodput(_with_policy(job, policy)):.2%}" for policy in POLICIES)
    say(f"with these spares, by policy: {months}")
    if job.policy != "restart":
        _print_spares(job)


def _best_interval(job: Job) -> str:
    return _time(closed_form.best_interval_s(job.mtbf_s, job.write_s)) if job.write_s else "every step"


def _with_policy(job: Job, policy: str) -> Job:
    """The same job under another policy; if it is not made of whole replicas, it counts as a single one."""
    whole = job.num_nodes % job.replica_nodes == 0
    return replace(job, policy=policy, replica_nodes=job.replica_nodes if whole else job.num_nodes)


def _print_spares(job: Job) -> None:
    best = closed_form.best_spares(job)
    rows = []
    for spares in sorted({0, 1, 2, best // 2, best - 1, best, best + 1, 2 * best} - {-1}):
        trial = replace(job, spare_nodes=spares)
        values = closed_form.goodput(trial), closed_form.goodput_per_reserved_gpu(trial)
        rows.append((spares, f"{values[0]:.2%}", f"{values[1]:.2%}"))
    show_table(f"Spare nodes (best: {best})", ("spares", "goodput", "per reserved GPU"), rows)


def _print_causes(job: Job) -> None:
    causes = llama3_causes()
    total = sum(count for _, count in causes)
    rows = []
    for cause, count in causes:
        rate = job.rate_per_gpu_month * count / total
        rows.append((cause, count, f"{100 * rate:.4f}", _time(MONTH_S / rate / job.num_gpus)))
    title = f"By cause, as in Llama 3's 54 days; {job.num_gpus:,} GPUs"
    show_table(title, ("cause", "count", "% per GPU-month", "one in"), rows)


def _size_row(request: GoodputRequest, gpus: int) -> dict[str, Any]:
    job, _ = _job(request, gpus)
    outcome = simulate(job, request.seed, relative_error=0.003)
    return {
        "gpus": gpus,
        "mtbf_s": job.mtbf_s,
        "interval_s": job.interval_s,
        "spare_nodes": job.spare_nodes,
        "goodput_formula": closed_form.goodput(job),
        "goodput_simulated": outcome.goodput,
        "standard_error": outcome.standard_error,
        "settled": outcome.settled,
        "kokolis_ettr": closed_form.kokolis_ettr(job.mtbf_s, job.down_s, job.interval_s, job.write_s),
        "goodput_per_reserved_gpu": closed_form.goodput_per_reserved_gpu(job),
    }


def _print_sizes(rows: list[dict[str, Any]], job: Job) -> None:
    heads = ("GPUs", "MTBF", "interval", "spares", "formula", "simulated", "± s.e.", "Kokolis", "per reserved")
    cells = [
        (
            *(f"{row['gpus']:,}", _time(row["mtbf_s"]), _time(row["interval_s"]), row["spare_nodes"]),
            *(f"{row['goodput_formula']:.2%}", f"{row['goodput_simulated']:.2%}", f"{row['standard_error']:.2%}"),
            *(f"{row['kokolis_ettr']:.2%}", f"{row['goodput_per_reserved_gpu']:.2%}"),
        )
        for row in rows
    ]
    show_table("By size", heads, cells)
    unsettled = [f"{row['gpus']:,}" for row in rows if not row["settled"]]
    if unsettled:
        say(f"{', '.join(unsettled)} GPUs: {UNSETTLED}")


def _print_worth(gains: list[Worth], step_s: float) -> None:
    title = f"Restart from checkpoints against elastic recovery, which loses at most a step of {step_s:g} s"
    elastic = [f"elastic {seconds:g} s" for seconds in RECOVERIES_S]
    heads = ("GPUs", "restart", *elastic, *(f"{name} simulated" for name in elastic), "GPUs won")
    rows = []
    for gain in gains:
        shares = (gain.restart, *gain.elastic, *gain.simulated)
        rows.append((f"{gain.gpus:,}", *(f"{share:.2%}" for share in shares), f"{gain.gpus_won:,.1f}"))
    show_table(title, heads, rows)
    say(
        f"Elastic: state copied after every step without stopping, {RECOVERIES_S[0]:g} or {RECOVERIES_S[1]:g} s from"
        " the failure until training goes on, lost nodes replaced in both columns; these are assumptions of the"
        " comparison, not measured on GPUs. GPUs won: training of so many GPUs more, by the slower recovery."
    )


def _time(seconds: float) -> str:
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.3g} s"


def _write(request: GoodputRequest, rows: list[dict[str, Any]], source: str) -> None:
    from llm_parallel.goodput.plots import draw

    result = {"request": asdict(request), "failure_rate_source": source, "rows": rows}
    try:
        with atomic_write(f"{request.out}.json") as handle:
            json.dump(result, handle, indent=1)
        picture = draw(rows, f"{request.out}.png", f"policy {request.policy}; rate: {source}")
    except OSError as error:
        raise UserError(f"--out {request.out} cannot be written ({error.strerror})") from None
    say(f"written: {request.out}.json, {picture}")
