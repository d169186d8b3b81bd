"""Draws kernel measurements: bars by provider, and a roofline of our kernels."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from llm_parallel.files import atomic_write

_MODES = ("forward", "backward")
MOST_SHAPES = 8
"""Shapes of an operator that are drawn in one panel; the table has all."""


def _save(figure: Any, path: Path) -> None:
    with atomic_write(path, "wb") as handle:
        figure.savefig(handle, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)


def _title(result: dict[str, Any]) -> str:
    env = result["environment"]
    versions = [f"{name} {env['versions'].get(name, '?')}" for name in ("torch", "triton")]
    return ", ".join([env["chip"], *versions, env["date"]])


def plot_bars(result: dict[str, Any], path: Path) -> None:
    """A row of panels for each operator, forward and backward: the fraction of the GPU's measured limit that each
    provider reaches, for up to ``MOST_SHAPES`` shapes."""
    rows = [row for row in result["rows"] if row["median_ms"] is not None and row["mode"] in _MODES]
    operators = list(dict.fromkeys(row["operator"] for row in rows))
    shown = {
        operator: list(dict.fromkeys(row["shape"] for row in rows if row["operator"] == operator))[:MOST_SHAPES]
        for operator in operators
    }
    rows = [row for row in rows if row["shape"] in shown[row["operator"]]]
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    colors = {name: plt.get_cmap("tab20")(i % 20) for i, name in enumerate(providers)}
    figure, axes = plt.subplots(
        max(len(operators), 1), 2, figsize=(15, 3.2 * max(len(operators), 1)), squeeze=False, constrained_layout=True
    )
    for line, operator in zip(axes, operators):
        for axis, mode in zip(line, _MODES):
            of_panel = [r for r in rows if r["operator"] == operator and r["mode"] == mode]
            axis.set_visible(bool(of_panel))
            _bars(axis, of_panel, colors)
            axis.set_title(f"{operator}, {mode}", fontsize=10)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colors[name]) for name in providers]
    figure.legend(handles, providers, loc="outside lower center", ncols=min(len(providers), 8), fontsize=9)
    figure.suptitle(_title(result), fontsize=11)
    _save(figure, path)


def _bars(axis: Any, rows: list[dict[str, Any]], colors: dict[str, Any]) -> None:
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    width = 0.8 / max(len(providers), 1)
    for row in rows:
        offset = (providers.index(row["provider"]) - (len(providers) - 1) / 2) * width
        at = shapes.index(row["shape"]) + offset
        axis.bar(at, 100 * row["fraction"], width, color=colors[row["provider"]])
        spread = [100 * row["fraction"] * (row["median_ms"] / row[key]) for key in ("p80_ms", "p20_ms")]
        axis.plot([at, at], spread, color="black", linewidth=0.8)
    axis.axhline(100, color="gray", linewidth=0.8, linestyle="--")
    axis.set_xticks(range(len(shapes)), shapes, rotation=20, ha="right", fontsize=7)
    bound = rows[0]["bound"] if rows else "memory"
    axis.set_ylabel(f"% of measured {'copy bandwidth' if bound == 'memory' else 'matmul rate'}", fontsize=8)


def plot_roofline(result: dict[str, Any], path: Path) -> None:
    """Rates that our kernels reach at each shape, with the GPU's two measured limits.

    The left panel shows operators that memory bandwidth limits in GB/s, the right one those that compute limits in
    TFLOP/s."""
    ours = [r for r in result["rows"] if r["provider"].startswith("ours") and r["median_ms"] and r["mode"] in _MODES]
    sides = {"memory": "gb_per_s", "compute": "tflop_per_s"}
    most = {"memory": result["card"]["copy_bytes_per_s"] / 1e9, "compute": result["card"]["matmul_flops_per_s"] / 1e12}
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), constrained_layout=True)
    for axis, (bound, key) in zip(axes, sides.items()):
        groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        for row in ours:
            if row["bound"] == bound:
                groups[row["operator"], row["mode"]].append(row)
        for index, ((operator, mode), rows) in enumerate(groups.items()):
            axis.scatter(
                [row["median_ms"] for row in rows], [row[key] for row in rows], s=36,
                color=plt.get_cmap("tab20")(index % 20), marker="o" if mode == "forward" else "^",
                label=f"{operator} {mode}",
            )  # fmt: skip
        axis.axhline(most[bound], color="black", linewidth=1.0)
        unit = "GB/s, measured copy" if bound == "memory" else "TFLOP/s, measured bf16 matmul"
        axis.annotate(f"{most[bound]:.0f} {unit}", (0.02, most[bound]), xycoords=("axes fraction", "data"), va="bottom")
        axis.set_xscale("log")
        axis.set_ylim(0, 1.12 * most[bound])
        axis.set_xlabel("time of one call in ms")
        axis.set_ylabel("GB/s of minimal bytes" if bound == "memory" else "TFLOP/s")
        if groups:
            axis.legend(fontsize=7, loc="lower right")
    figure.suptitle(_title(result), fontsize=11)
    _save(figure, path)
