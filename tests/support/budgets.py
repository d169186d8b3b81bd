"""The committed processor time of each test file: reading, writing and judging, without pytest."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).resolve().parents[1] / "budgets.txt"
LIMIT = 1.5
FLOOR_S = 20.0
"""A file that takes less than this is never refused: a first import takes 10 s where libraries lie on a cold disk."""

HEADING = """\
# Processor-seconds of each test file, with those of the processes that it starts; "slow" is what only `make test-all`
# runs. A file that takes more than 1.5 times its budget fails `make test`. Renew one that has a reason to grow:
#   .venv/bin/pytest FILE -m "not slow" --write-budgets
# calibration: seconds that the loop in tests/support/budgets.py took where these were measured; times measured on
# another machine, or on a busy one, are divided by the ratio of its own.
"""


@dataclass(frozen=True, order=True)
class Part:
    """The tests of one file that are marked slow, or those that are not."""

    file: str
    slow: bool = False

    def __str__(self) -> str:
        return f"{self.file} slow" if self.slow else self.file


@dataclass(frozen=True)
class Budgets:
    """What budgets.txt holds."""

    calibration_s: float | None
    seconds: Mapping[Part, float]


def parse(text: str) -> Budgets:
    """Reads what ``render`` wrote; raises ValueError with the line that it does not understand."""
    calibration, seconds = None, {}
    for line in text.splitlines():
        words = line.split()
        if not words or line.startswith("#"):
            continue
        if words[0] == "calibration" and len(words) == 2:
            calibration = float(words[1])
        elif len(words) == 2 or (len(words) == 3 and words[1] == "slow"):
            seconds[Part(words[0], len(words) == 3)] = float(words[-1])
        else:
            raise ValueError(f"budgets.txt has a line that is neither a budget nor the calibration: {line!r}")
    return Budgets(calibration, seconds)


def render(budgets: Budgets) -> str:
    """The text of budgets.txt."""
    lines = [f"calibration {budgets.calibration_s:.5f}"]
    lines += [f"{part} {seconds:.1f}" for part, seconds in sorted(budgets.seconds.items())]
    return HEADING + "\n".join(lines) + "\n"


def renewed(budgets: Budgets, measured: Mapping[Part, float], calibration_s: float) -> Budgets:
    """``budgets`` with the parts that were measured replaced, at the speed of the machine that it was written on."""
    reference = budgets.calibration_s or calibration_s
    found = {part: seconds * reference / calibration_s for part, seconds in measured.items()}
    return Budgets(reference, {**budgets.seconds, **found})


def complaints(budgets: Budgets, measured: Mapping[Part, float], calibration_s: float) -> list[str]:
    """One sentence for each measured part that is over its budget, or has none and is not small.

    Slow parts without a budget are not held: no default run pays for them.
    """
    speed = (budgets.calibration_s or calibration_s) / calibration_s
    said = []
    for part, raw in sorted(measured.items()):
        seconds, budget = raw * speed, budgets.seconds.get(part)
        renew = f"pytest {part.file} -m '{'slow' if part.slow else 'not slow'}' --write-budgets"
        if seconds <= FLOOR_S or (budget is None and part.slow):
            continue
        if budget is None:
            said.append(f"{part} took {seconds:.1f} s of processor time and has no budget; give it one with: {renew}")
        elif seconds > LIMIT * budget:
            said.append(
                f"{part} took {seconds:.1f} s of processor time, over {LIMIT} times its budget of {budget:.1f} s;"
                f" make it cheaper, or renew the budget with: {renew}"
            )
    return said


def calibrate() -> float:
    """Processor-seconds of a fixed piece of interpreted work, about a hundredth of a second: this machine's speed now,
    with whatever else runs on its cores."""
    start = time.thread_time()
    counts: dict[int, int] = {}
    for number in range(60_000):
        key = number * 7919 % 1009
        counts[key] = counts.get(key, 0) + number
    sorted(counts.items(), key=lambda pair: pair[1])
    return time.thread_time() - start


def whole(ran: Mapping[Part, int], collected: Mapping[Part, int], arguments: Iterable[str]) -> set[Part]:
    """Parts all of whose tests were run: nothing was deselected, and no argument names single tests of the file."""
    named = {argument.split("::")[0].removeprefix("./") for argument in arguments if "::" in argument}
    return {part for part, count in ran.items() if count == collected.get(part) and part.file not in named}
