"""Draws goodput by number of GPUs."""

from __future__ import annotations

from typing import Any

from llm_parallel.files import atomic_write


def draw(rows: list[dict[str, Any]], path: str, subtitle: str) -> str:
    """Draws goodput over the number of GPUs by formula, by simulation and per reserved GPU into a PNG file; returns its
    path."""
    from matplotlib.figure import Figure  # it costs 0.4 s to import

    figure = Figure(figsize=(8, 4.8), dpi=130, layout="constrained")
    axes = figure.subplots()
    gpus = [row["gpus"] for row in rows]
    axes.plot(gpus, [row["goodput_formula"] for row in rows], color="#0072B2", label="closed form")
    axes.errorbar(
        *(gpus, [row["goodput_simulated"] for row in rows], [2 * row["standard_error"] for row in rows]),
        fmt="o",
        color="#D55E00",
        markersize=4,
        label="simulated, ± 2 standard errors",
    )
    axes.plot(gpus, [row["kokolis_ettr"] for row in rows], ":", color="0.4", label="first order (Kokolis)")
    if any(row["spare_nodes"] for row in rows):
        per_gpu = [row["goodput_per_reserved_gpu"] for row in rows]
        axes.plot(gpus, per_gpu, "--", color="#009E73", label="per reserved GPU")
    axes.set_xscale("log", base=2)
    axes.set_xticks(gpus, [f"{number:,}" for number in gpus], rotation=45)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("goodput")
    axes.set_xlabel("GPUs")
    axes.set_title(subtitle, fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path, "wb") as handle:
        figure.savefig(handle, format="png")
    return path
