"""Goodput: closed forms against brute force, limits and published arithmetic; simulation against closed form."""

from __future__ import annotations

import json
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from llm_parallel.errors import UserError
from llm_parallel.goodput import claims, closed_form, elastic_gain, published_checks, rates
from llm_parallel.goodput.command import goodput_command, validate_command
from llm_parallel.goodput.rates import HOUR_S, Job
from llm_parallel.goodput.request import GoodputRequest
from llm_parallel.goodput.simulate import simulate
from tests.support.in_process import in_process

JOB = Job(16384, 0.0144, hardware_share=0.78, spare_nodes=4, replica_nodes=16, repair_s=6 * HOUR_S)


@pytest.mark.parametrize("mtbf_h", [0.5, 3.0, 24.0, 700.0])
@pytest.mark.parametrize("write_s", [0.05, 30.0, 600.0])
def test_best_interval_is_where_brute_force_finds_it(mtbf_h: float, write_s: float) -> None:
    """A grid of 200,000 intervals finds none better than the root by more than the grid's own error."""
    mtbf_s = mtbf_h * HOUR_S
    best = closed_form.best_interval_s(mtbf_s, write_s)
    at_best = closed_form.exact_ettr(mtbf_s, 100.0, best, write_s)
    grid = [0.3 * best * (1 + index / 20_000) for index in range(200_000)]
    found = max(grid, key=lambda interval: closed_form.exact_ettr(mtbf_s, 100.0, interval, write_s))
    assert found == pytest.approx(best, rel=2e-3)
    assert at_best >= closed_form.exact_ettr(mtbf_s, 100.0, found, write_s) * (1 - 1e-12)


@given(mtbf_h=st.floats(1, 1e4), write_share=st.floats(1e-9, 1e-4))
def test_best_interval_tends_to_youngs(mtbf_h: float, write_share: float) -> None:
    """With cheap checkpoints the exact optimum is sqrt(2 w M) less about w (Daly's first terms)."""
    mtbf_s, write_s = mtbf_h * HOUR_S, mtbf_h * HOUR_S * write_share
    young = closed_form.young_interval_s(mtbf_s, write_s)
    assert closed_form.best_interval_s(mtbf_s, write_s) == pytest.approx(young - 2 / 3 * write_s, rel=2e-3)


@given(
    gpus=st.integers(16, 131_072),
    rate=st.floats(0.002, 0.1),
    down_s=st.floats(5, 3000),
    write_s=st.floats(0.1, 300),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
def test_simulation_agrees_with_kokolis_where_its_assumptions_hold(
    gpus: int, rate: float, down_s: float, write_s: float, seed: int
) -> None:
    """Within 1 % wherever no more than a tenth of the time is lost to a failure's down time and half an interval."""
    job = Job(gpus, rate, detect_s=down_s / 3, restart_s=down_s * 2 / 3, write_s=write_s)
    job = replace(job, interval_s=closed_form.best_interval_s(job.mtbf_s, write_s))
    assume((down_s + job.interval_s / 2 + write_s) / job.mtbf_s < 0.1)
    kokolis = closed_form.kokolis_ettr(job.mtbf_s, down_s, job.interval_s, write_s)
    assert simulate(job, seed).goodput == pytest.approx(kokolis, rel=0.01)


@pytest.mark.parametrize("gpus", [16, 1024, 16384, 65536, 131072])
@pytest.mark.parametrize("rate", [0.005, 0.0144, 0.05])
def test_simulation_agrees_with_the_exact_form_everywhere(gpus: int, rate: float) -> None:
    """Also where half of all recoveries are hit by the next failure, which Kokolis's form does not count."""
    job = Job(gpus, rate, interval_s=600.0, detect_s=30.0, restart_s=120.0, write_s=20.0)
    exact = closed_form.exact_ettr(job.mtbf_s, 150.0, 600.0, 20.0)
    outcome = simulate(job, seed=gpus, relative_error=0.002)
    assert outcome.goodput == pytest.approx(exact, rel=0.01)
    assert outcome.goodput == pytest.approx(exact, abs=4.5 * outcome.standard_error + 1e-6)


@pytest.mark.parametrize("spares", [0, 1, 3, 8, 20])
def test_waiting_is_erlangs_loss(spares: int) -> None:
    """5 nodes are in repair on average: with few spares the job mostly waits, with 20 never."""
    job = replace(JOB, policy="wait", spare_nodes=spares, repair_s=20 * HOUR_S, interval_s=900.0)
    outcome = simulate(job, seed=spares)
    assert outcome.goodput == pytest.approx(closed_form.goodput(job), rel=0.01)


@pytest.mark.parametrize("gpus", [1024, 16384, 131072])
@pytest.mark.parametrize("replica_nodes", [1, 16])
@pytest.mark.parametrize("spares", [0, 8])
def test_shrinking_agrees(gpus: int, replica_nodes: int, spares: int) -> None:
    """Also on 131,072 GPUs, where a node comes back every half an hour and half the time is lost."""
    job = replace(JOB, num_gpus=gpus, policy="shrink", spare_nodes=spares, replica_nodes=replica_nodes)
    job = replace(job, interval_s=closed_form.best_interval_s(job.mtbf_s, job.write_s))
    outcome = simulate(job, seed=spares)
    assert outcome.goodput == pytest.approx(closed_form.goodput(job), rel=0.01)
    assert outcome.ledger.resizes > 0 or spares > 0


@pytest.mark.parametrize("policy", rates.POLICIES)
def test_the_ledger_adds_up(policy: str) -> None:
    ledger = simulate(replace(JOB, policy=policy, spare_nodes=1), seed=3).ledger
    parts = (ledger.useful_s, ledger.checkpoint_s, ledger.lost_s, ledger.down_s, ledger.waiting_s, ledger.shrunken_s)
    assert math.fsum(parts) == pytest.approx(ledger.elapsed_s, rel=1e-9)


def test_a_seed_gives_the_same_again() -> None:
    assert simulate(JOB, seed=7) == simulate(JOB, seed=7)
    assert simulate(JOB, seed=7).goodput != simulate(JOB, seed=8).goodput


@given(servers=st.integers(0, 12), load=st.floats(0.01, 20))
def test_erlang_b_is_its_definition(servers: int, load: float) -> None:
    terms = [load**k / math.factorial(k) for k in range(servers + 1)]
    assert closed_form.erlang_b(servers, load) == pytest.approx(terms[-1] / sum(terms), rel=1e-9)


def test_best_spares_is_the_best_of_all_tried() -> None:
    job = replace(JOB, policy="wait", repair_s=24 * HOUR_S)
    best = closed_form.best_spares(job)
    values = [closed_form.goodput_per_reserved_gpu(replace(job, spare_nodes=spares)) for spares in range(150)]
    assert values[best] == max(values)
    assert 6 < best < 25  # one failure in 3.1 h, 78 % of them for 24 h: 6 nodes are in repair on average
    assert closed_form.best_spares(replace(job, policy="restart")) == 0


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    """Jobs from anywhere in the ranges of their fields."""

    def number(field: str) -> float:
        _, least, most, _ = rates.RANGES[field]
        return min(most, max(least, 10 ** draw(st.floats(math.log10(least or 1e-6), math.log10(most)))))

    replica_nodes, replicas, per_node = (
        draw(st.integers(1, 64)),
        int(number("num_gpus") ** 0.5),
        draw(st.integers(1, 8)),
    )
    return Job(
        replica_nodes * replicas * per_node,
        *(number(name) for name in ("rate_per_gpu_month", "hardware_share", "detect_s", "restart_s", "write_s")),
        interval_s=number("interval_s"),
        policy=draw(st.sampled_from(rates.POLICIES)),
        spare_nodes=draw(st.integers(0, 100)),
        gpus_per_node=per_node,
        replica_nodes=replica_nodes,
        repair_s=number("repair_s"),
    )


@given(job=jobs())
@settings(max_examples=60, deadline=None)
def test_every_job_ends_after_a_bounded_number_of_events(job: Job) -> None:
    """Failures that come a thousand times an hour, or repairs of ten years: the count of events ends a simulation."""
    outcome = simulate(job, most_events=2000)
    assert outcome.ledger.failures + outcome.ledger.resizes <= 2000
    assert outcome.ledger.failures >= 20 and math.isfinite(outcome.standard_error)
    assert 0 <= outcome.goodput <= 1 and 0 <= closed_form.goodput(job) <= 1 + 1e-9


@pytest.mark.parametrize("rate", [1e-9, 0.0144, 0.3, 1e4])
@pytest.mark.parametrize("policy", ["wait", "shrink"])
def test_the_best_spares_are_found_in_a_hundred_trials(
    rate: float, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where hundreds, or billions, of nodes are in repair."""
    job = Job(131_072, rate, policy=policy, repair_s=1000 * HOUR_S)
    tried: list[int] = []
    monkeypatch.setattr(closed_form, "goodput_per_reserved_gpu", lambda one: tried.append(one.spare_nodes) or 0.5)
    assert 0 <= closed_form.best_spares(job) <= rates.RANGES["spare_nodes"][2]
    assert 0 < len(tried) <= 100


@pytest.mark.parametrize("policy", ["wait", "shrink"])
@pytest.mark.parametrize("repair_h", [100, 1000])
def test_the_best_of_many_spares_is_the_best_of_all(policy: str, repair_h: float) -> None:
    job = Job(131_072, 0.0144, hardware_share=0.78, policy=policy, repair_s=repair_h * HOUR_S, interval_s=300.0)
    best = closed_form.best_spares(job)
    assert best > 100
    values = {s: closed_form.goodput_per_reserved_gpu(replace(job, spare_nodes=s)) for s in range(0, 4000, 40)}
    assert closed_form.goodput_per_reserved_gpu(replace(job, spare_nodes=best)) >= max(values.values())


def test_a_repair_longer_than_a_batch_is_simulated_as_long_as_it_takes() -> None:
    """Nodes are away for four months: a simulation that begins with all nodes, and ends before the first is back, found
    98 % where the formula says 91 %."""
    job = Job(1024, 0.0144, hardware_share=0.78, policy="wait", repair_s=3000 * HOUR_S, spare_nodes=40, interval_s=3e3)
    short = statistics.fmean(simulate(job, seed, most_events=40).goodput for seed in range(60))
    assert short == pytest.approx(closed_form.goodput(job), abs=0.05), "98 % if all nodes were there at the beginning"
    outcome = simulate(job, seed=1, relative_error=0.003)
    assert outcome.settled and outcome.goodput == pytest.approx(closed_form.goodput(job), rel=0.01)


def test_profiles_are_the_published_rates() -> None:
    """Rates that anchors give by hand: % per GPU-month 1.44, 2.4, 0.9, 5.2, 8."""
    found = {name: 100 * profile.rate_per_gpu_month for name, profile in rates.profiles().items()}
    assert found == {
        "llama3": pytest.approx(1.44, abs=0.005),
        "rsc1": pytest.approx(2.47, abs=0.01),
        "rsc2": pytest.approx(0.89, abs=0.01),
        "opt175b": pytest.approx(5.29, abs=0.01),
        "deck": 8.0,
    }
    assert sum(count for _, count in rates.llama3_causes()) == 419


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_gpus": 0}, "--gpus 0 must be a number from 1 to 10,000,000"),
        ({"num_gpus": 10**400}, "--gpus 10,000,"),
        ({"rate_per_gpu_month": 1e300}, "--rate-per-gpu-month 1e+302 must be a number from 1e-07 to 1,000,000"),
        ({"rate_per_gpu_month": 1e-300}, "--rate-per-gpu-month 1e-298"),
        ({"rate_per_gpu_month": math.inf}, "--rate-per-gpu-month inf"),
        ({"repair_s": 1e9 * HOUR_S}, "--repair-h 1e+09 must be a number from 0.000277778 to 87,660"),
        ({"repair_s": math.inf}, "--repair-h inf"),
        ({"repair_s": math.nan}, "--repair-h nan"),
        ({"write_s": math.nan}, "--checkpoint-write-s nan"),
        ({"detect_s": 1e300}, "--detect-s 1e+300"),
        ({"interval_s": 1e-300}, "--interval 1e-300"),
        ({"hardware_share": math.nan}, "--hardware-share nan must be a number from 0 to 1"),
        ({"rate_per_gpu_month": 0.0}, "--rate-per-gpu-month 0"),
        ({"rate_per_gpu_month": math.nan}, "--rate-per-gpu-month nan"),
        ({"restart_s": -1.0}, "--restart-s -1"),
        ({"interval_s": 0.0}, "--interval 0"),
        ({"spare_nodes": -1}, "--spares -1"),
        ({"policy": "pray"}, "--policy pray"),
        ({"hardware_share": 1.5}, "--hardware-share 1.5"),
        ({"policy": "shrink", "num_gpus": 8}, "--replica-gpus 128"),
        ({"policy": "shrink", "num_gpus": 16384 - 64}, "--replica-gpus 128"),
    ],
)
def test_impossible_jobs_are_named(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        replace(JOB, **change)


def test_unknown_profile() -> None:
    with pytest.raises(UserError, match="llama3, rsc1"):
        rates.find_profile("rsc3")


def test_claims_give_the_arithmetic_of_the_anchors() -> None:
    """Literals worked out by hand, and the thresholds by trying the neighbours."""
    year, day, realistic, speedup, years = claims.deck_claims()
    assert year.value == pytest.approx(0.632, abs=5e-4) and "63.2%" in year.sentence and "8.75%" in year.sentence
    assert day.value == pytest.approx(0.995, abs=5e-4) and "99.5%" in day.sentence and "1,122 GPUs" in day.sentence
    assert 1 - (1 - 0.08 / 30) ** 1121 < 0.95 <= 1 - (1 - 0.08 / 30) ** 1122
    assert realistic.value == pytest.approx(0.61, abs=0.005) and "0.95 times a day" in realistic.sentence
    assert speedup.value == 0.5 and "72.7 %" in speedup.sentence
    assert years.value == pytest.approx(1_720_320 / 24 / 365.25) and "196.2 years" in years.sentence
    assert "377.8" in years.sentence and "35.8 days" in years.sentence


def test_published_figures_are_predicted_as_worked_out_by_hand() -> None:
    found = {(check.system, check.figure): (check.published, check.predicted) for check in published_checks.checks()}
    expected = {
        ("Meta RSC", "MTTF at 1,024 GPUs"): (7.9, 24 / (128 * 0.0065)),
        ("Meta RSC", "MTTF at 16,384 GPUs"): (1.8, 1.803),
        ("Meta RSC", "MTTF at 131,072 GPUs"): (0.23, 0.2254),
        ("Meta FT-HSDP", "MTBF at 98,000 GPUs"): (18, 51.1),
        ("Meta FT-HSDP", "effective training time sync"): (44, 100 * 8 / 18),
        ("Meta FT-HSDP", "effective training time elastic"): (80, 100 * 15 / 18),
        ("torchft", "run1 step efficiency"): (82.3, 83.39),
        ("torchft", "run1 training efficiency"): (81.2, 83.39 * 29.6 / 30),
        ("torchft", "run2 step efficiency"): (30.2, 35.67),
        ("torchft", "run2 training efficiency"): (13.4, 35.67 * 18.9 / 30 * 10.9 / 15.46),
    }
    assert found.keys() == expected.keys()
    for name, (published, predicted) in expected.items():
        assert found[name] == (published, pytest.approx(predicted, rel=1e-3)), name
    assert [line.split(",")[0] for line in published_checks.bounds()] == ["Llama 3 405B", "MegaScale"]
    assert any("ByteRobust" in line for line in published_checks.without_inputs())


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By formula and simulated alike in every row; the best interval is that of the formula."""
    status = goodput_command(GoodputRequest(gpus=1024, policy="wait", out=str(tmp_path / "good"), seed=5))
    assert status == 0
    printed = capsys.readouterr().out
    assert "1,024 GPUs" in printed and "131,072" in printed and "419" in printed
    rows = json.loads((tmp_path / "good.json").read_text())["rows"]
    assert [row["gpus"] for row in rows] == [2**exponent for exponent in range(4, 18)]
    for row in rows:
        assert row["goodput_simulated"] == pytest.approx(row["goodput_formula"], rel=0.015)
    assert (tmp_path / "good.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("request_", "sizes"),
    [
        (GoodputRequest(policy="shrink", gpus=512, replica_gpus=64, spares=1), 12),  # from 64 GPUs on
        (GoodputRequest(rate_per_gpu_month=2.0, interval="600", write_s=0.0), 14),
        (GoodputRequest(profile="rsc2", policy="wait", gpus=992, spares=30, repair_h=4.0), 14),
    ],
)
def test_formula_and_simulation_agree_in_every_row(request_: GoodputRequest, sizes: int, tmp_path: Path) -> None:
    assert goodput_command(replace(request_, out=str(tmp_path / "x"))) == 0
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert len(rows) == sizes
    for row in rows:
        assert row["goodput_simulated"] == pytest.approx(row["goodput_formula"], rel=0.015), row["gpus"]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (GoodputRequest(profile="rsc9"), "--profile rsc9"),
        (GoodputRequest(profile="rsc1", rate_per_gpu_month=1.0), "keep one"),
        (GoodputRequest(interval="often"), "--interval often"),
        (GoodputRequest(interval="-3"), "--interval -3"),
        (GoodputRequest(write_s=0.0), "--checkpoint-write-s 0"),
        (GoodputRequest(gpus=-8), "--gpus -8"),
        (GoodputRequest(step_s=0.0), "--step-s 0"),
        (GoodputRequest(step_s=math.inf), "--step-s inf"),
        (GoodputRequest(write_s=1e-300), "--interval auto has no answer with --checkpoint-write-s 1e-300"),
        (GoodputRequest(gpus=1024, repair_h=1e9, policy="shrink"), "--repair-h 1e+09"),
        (GoodputRequest(gpus_per_node=0), "--gpus-per-node 0"),
        (GoodputRequest(gpus=64, policy="shrink", replica_gpus=128), "--replica-gpus 128"),
    ],
)
def test_bad_requests_are_named(request_: GoodputRequest, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        goodput_command(request_)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("goodput", "--gpus", "0"), "--gpus 0"), (("report", "nowhere"), "nowhere"), (("report",), "needs a run folder")],
)
def test_the_command_line_says_it_in_one_sentence(arguments: tuple[str, ...], message: str) -> None:
    result = in_process(*arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and message in result.stderr


def test_the_standard_error_is_one() -> None:
    """Over 100 seeds the distance from the exact value, in standard errors, has mean 0 and deviation 1."""
    job = Job(16384, 0.0144, interval_s=800.0)
    outcomes = [simulate(job, seed) for seed in range(100)]
    scores = [(outcome.goodput - closed_form.goodput(job)) / outcome.standard_error for outcome in outcomes]
    assert abs(statistics.mean(scores)) < 0.35
    assert 0.75 < statistics.stdev(scores) < 1.3


def test_elastic_recovery_is_the_formula_by_hand() -> None:
    """131,072 GPUs at 1.44 % a month: MTBF 1393 s; a failure costs 3 s and half a step of 10 s, 8 in 1393 s, to first
    order, and restarts from checkpoints cost hundreds."""
    job = Job(131_072, 0.0144)
    job = replace(job, interval_s=closed_form.best_interval_s(job.mtbf_s, job.write_s))
    assert job.mtbf_s == pytest.approx(1393, abs=1)
    (gain,) = elastic_gain.worth([job], 10.0)
    assert gain.elastic[1] == pytest.approx(1 - 8 / 1393, abs=1e-4)
    assert gain.elastic[0] == pytest.approx(1 - 6 / 1393, abs=1e-4)
    assert gain.simulated == pytest.approx(gain.elastic, rel=0.01)
    assert gain.restart == pytest.approx(closed_form.exact_ettr(job.mtbf_s, 360.0, job.interval_s, 30.0))
    assert gain.gpus_won == pytest.approx(131_072 * (gain.elastic[1] - gain.restart)) and gain.gpus_won > 40_000


@given(gpus=st.integers(16, 131_072), step_s=st.floats(0.1, 120), recovery_s=st.floats(0.1, 60))
def test_elastic_never_loses_more_than_a_step_and_the_recovery(gpus: int, step_s: float, recovery_s: float) -> None:
    job = elastic_gain.elastic_job(Job(gpus, 0.0144), step_s, recovery_s)
    share = closed_form.goodput(job)
    assert 1 - (step_s + recovery_s) / job.mtbf_s <= share < 1 - 0.9 * recovery_s / (job.mtbf_s + recovery_s)


def test_formula_and_simulation_agree_within_one_per_cent() -> None:
    found = published_checks.agreements(seed=3)
    assert len(found) == 16 and {one.name.split(", ")[1] for one in found} == {"restart", "wait", "shrink", "elastic"}
    for one in found:
        assert abs(one.difference) < 0.01, one.name


@pytest.mark.parametrize(("simulated", "status", "verdict"), [(0.504, 0, " agree within 1%"), (0.51, 1, "DISAGREE")])
def test_validate_fails_where_they_differ(
    simulated: float, status: int, verdict: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [published_checks.Agreement("x", 0.5, simulated)]
    monkeypatch.setattr("llm_parallel.goodput.command.agreements", lambda: found)
    assert validate_command() == status
    assert verdict in capsys.readouterr().out


@pytest.mark.slow
def test_validate_of_the_simulations(capsys: pytest.CaptureFixture[str]) -> None:
    assert validate_command() == 0
    assert " agree within 1%" in capsys.readouterr().out
