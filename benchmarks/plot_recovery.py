"""Draws what `benchmarks/recovery.py` measured: seconds from a fault to the next optimizer step, ours beside torchrun.

    python benchmarks/plot_recovery.py benchmarks/results/recovery_cpu_2026-11-29.json [--out PICTURE.png]

The picture lies beside the results if `--out` is not given. Bars are medians, whiskers reach from the fastest to the
slowest round. torchrun's bar is hatched where it did not train again within the benchmark's limit.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from llm_parallel.files import atomic_write

FAULTS = {
    "kill": "worker killed",
    "stop": "worker stopped (SIGSTOP)",
    "agent": "agent killed",
    "node": "node killed",
    "store": "node of rank 0 killed",
}
COLORS = {"DP 4": "#1b6ca8", "PP 2 x DP 2": "#5fa8d3", "TP 2 x DP 2": "#a9d0e6"}
TORCHRUN_COLOR = "#d98324"
BAR = 0.2
TORCHRUN_LIMIT_S = 60.0
"""How long `recovery.py` waited for torchrun."""


def bar(axis: Any, y: float, seconds: Sequence[float | None], color: str, label: str | None) -> None:
    """One bar with its whisker and figure; ``seconds`` of the rounds, None where a round ended at the limit."""
    known = [value for value in seconds if value is not None]
    if not known:
        axis.barh(y, TORCHRUN_LIMIT_S, BAR, color="white", edgecolor=color, hatch="////", label=label)
        text, end = f"not within {TORCHRUN_LIMIT_S:.0f} s", TORCHRUN_LIMIT_S
    else:
        median, end = statistics.median(known), max(known)
        axis.barh(y, median, BAR, color=color, label=label)
        axis.plot([min(known), end], [y, y], color="black", linewidth=0.8)
        text = f"{median:.2f} s" if median < 10 else f"{median:.1f} s"
    axis.text(end * 1.06, y, text, va="center", fontsize=8)


def draw(result: dict[str, Any], path: Path) -> None:
    """Writes the picture of ``result`` to ``path``."""
    figure, axis = plt.subplots(figsize=(9, 5.2), constrained_layout=True)
    torchrun = result["results"]["DP 4"]["torchrun_s"]
    for row, kind in enumerate(FAULTS):
        series = [(name, COLORS[name], rounds(result, name, kind)) for name in COLORS if name in result["results"]]
        middle = len(series) / 2
        if kind in torchrun:
            series.append(("torchrun, DP 4, tuned", TORCHRUN_COLOR, torchrun[kind]))
        else:
            axis.text(
                0.21, row + middle * BAR, "not tried with torchrun", va="center", fontsize=8, color=TORCHRUN_COLOR
            )
        for place, (name, color, seconds) in enumerate(series):
            label = name if name.startswith("torchrun") else f"LLM Parallel, {name}"
            bar(axis, row + (place - middle) * BAR, seconds, color, label if row == 0 else None)
    axis.set_yticks(range(len(FAULTS)), list(FAULTS.values()))
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlim(0.2, 300)
    ticks = [0.2, 0.5, 1, 2, 5, 10, 20, 60]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("seconds from the fault to the next optimizer step (logarithmic)")
    axis.set_title(
        f"Recovery of a run of 4 processes; {result['cores']} cores of an {result['chip']}, {result['date']}"
    )
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.legend(loc="lower right", fontsize=8)
    with atomic_write(path, "wb") as handle:
        figure.savefig(handle, format="png", dpi=110)
    plt.close(figure)


def rounds(result: dict[str, Any], layout: str, kind: str) -> list[float]:
    """Seconds of every round of a fault in a layout."""
    return [fault["next_step_s"] for fault in result["results"][layout]["faults"][kind]]


def main() -> None:
    """Reads the arguments and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON that recovery.py wrote with --torchrun --save")
    parser.add_argument("--out", type=Path, help="picture to write; beside the results if not given")
    arguments = parser.parse_args()
    out = arguments.out or arguments.results.with_suffix(".png")
    draw(json.loads(arguments.results.read_text()), out)
    print(out)


if __name__ == "__main__":
    main()
