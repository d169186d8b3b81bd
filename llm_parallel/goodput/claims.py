"""Recomputes well-known claims about failing GPUs and speed-up, and says which hold."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llm_parallel.goodput.rates import DAY_S, HOUR_S, MONTH_S, YEAR_S, profiles

DECK_RATE = 0.08
DECK_GPUS = 2000
LLAMA2_70B_HOURS = 1_720_320
"""GPU-hours of Llama 2 70B (arXiv 2307.09288, Table 2)."""
LLAMA2_ALL_HOURS = 3_311_616
"""The four models of that table together."""


@dataclass(frozen=True)
class Claim:
    """A claim, and what its arithmetic gives."""

    claim: str
    verdict: str
    sentence: str
    value: float
    """The computed number: a share, or years."""


def deck_claims() -> list[Claim]:
    """All claims, each with the computed number. In them a month has 30 days."""
    return [_year(), _day(), _realistic(), _speedup(), _years()]


def _year() -> Claim:
    share = 1.0 - (1.0 - DECK_RATE) ** 12
    needed = 1.0 - (1.0 / 3.0) ** (1.0 / 12.0)
    return Claim(
        "8 % of A100s fail in a month, so that two thirds break within a year",
        "holds, rounded up",
        f"1 - 0.92^12 = {share:.1%} break within a year; two thirds would need {needed:.2%} a month.",
        share,
    )


def _day() -> Claim:
    daily = DECK_RATE / 30
    share = 1.0 - (1.0 - daily) ** DECK_GPUS
    hours_to_95 = math.log(0.05) / math.log(1.0 - daily) / DECK_GPUS * 24
    gpus_for_95 = math.ceil(math.log(0.05) / math.log(1.0 - daily))
    rate_for_95 = 30 * (1.0 - 0.05 ** (1.0 / DECK_GPUS))
    return Claim(
        "among 2,000 A100s at least one breaks on a day with 95 % probability",
        "the direction holds; the number does not follow from 8 % a month",
        f"1 - (1 - 0.08/30)^2000 = {share:.1%}, for {DECK_GPUS * daily:.1f} failures a day or one in"
        f" {24 / (DECK_GPUS * daily):.1f} hours; 95 % are reached after {hours_to_95:.1f} hours, or with"
        f" {gpus_for_95:,} GPUs, or at {rate_for_95:.1%} a month.",
        share,
    )


def _realistic() -> Claim:
    rates = {name: profile.rate_per_gpu_month for name, profile in profiles().items() if name != "deck"}
    llama_daily = DECK_GPUS * rates["llama3"] / MONTH_S * DAY_S
    modern = [rate for name, rate in rates.items() if name != "opt175b"]
    return Claim(
        "8 % a month is what A100s do",
        "pessimistic for fleets of today, near an early cluster",
        "published failures of all causes per GPU and month: "
        + ", ".join(f"{name} {rate:.1%}" for name, rate in rates.items())
        + f"; 8 % is {DECK_RATE / max(modern):.0f} to {DECK_RATE / min(modern):.0f} times the fleets after OPT-175B's."
        f" At llama3's rate {DECK_GPUS:,} GPUs fail {llama_daily:.2f} times a day, and a day sees one with"
        f" {-math.expm1(-llama_daily):.0%} probability.",
        -math.expm1(-llama_daily),
    )


def _speedup() -> Claim:
    return Claim(
        "a speed-up of 1000 on 2,000 GPUs is really good",
        "depends on the baseline, which the claim does not name",
        "it is 50 % parallel efficiency. Against one GPU, Megatron-LM published 72.7 % on 1,024 A100 (2020), and 89.6 %"
        " strong scaling from 96 to 4,608 H100, so that 50 % is low; as 1000 GPUs' worth of peak (50 % MFU) it equals"
        " the best public BF16 runs (41 to 55 %).",
        0.5,
    )


def _years() -> Claim:
    years = LLAMA2_70B_HOURS * HOUR_S / YEAR_S
    return Claim(
        "Llama 2's 1,720,320 GPU-hours are 196 years on one A100",
        "the arithmetic holds; the meaning needs a footnote",
        f"1,720,320 h / 8,766 h = {years:.1f} years, for the 70B alone (all four models:"
        f" {LLAMA2_ALL_HOURS * HOUR_S / YEAR_S:.1f}); it is time on a cluster at that cluster's efficiency, and one"
        f" A100 cannot hold the 70B's training state; 2,000 GPUs would take {LLAMA2_70B_HOURS / 2000 / 24:.1f} days.",
        years,
    )
