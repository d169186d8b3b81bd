"""What each step's time was spent on, by the names that pictures and tables show."""

from __future__ import annotations

import numpy as np

from llm_parallel.metrics.history import History

BY_AXIS = {
    "compute": "compute",
    "tensor parallel": "tp",
    "context parallel": "cp",
    "data parallel": "dp",
    "pipeline sends": "pp",
    "pipeline bubble": "bubble",
    "optimizer": "optimizer",
    "waiting for data": "data",
    "other": "other",
}
"""Parts of a step that a run with log.comm_time records, and their names in the metrics, as in ``time/tp_s``."""
TIME_PARTS = ("forward and backward", "exposed communication", *BY_AXIS)
PART_COLOURS = dict(
    zip(
        TIME_PARTS,
        ("#56B4E9", "#CC79A7", "#56B4E9", "#0072B2", "#009E73", "#CC79A7", "#F0E442", "#882255", "#E69F00", "#D55E00",
         "#BBBBBB"),
        strict=True,
    )
)  # fmt: skip
"""Colour-blind people can distinguish those that occur together."""


def split_by_step(history: History) -> dict[str, np.ndarray]:
    """Seconds of every step by part, float64 [number of steps] each, of parts that are not always 0.

    They are means over all processes if the run recorded those, else of rank 0. A run without log.comm_time has
    forward and backward as one part, and the communication in it if that was measured.
    """
    whole = np.nan_to_num(history.column("perf/step_time"))
    parts = {}
    if np.nansum(history.column("time/compute_s")) > 0.0:
        means = np.nan_to_num(history.column("time/compute_mean_s")) > 0.0
        for part, name in BY_AXIS.items():
            own, mean = (np.nan_to_num(history.column(f"time/{name}{kind}")) for kind in ("_s", "_mean_s"))
            parts[part] = np.maximum(np.where(means, mean, own), 0.0)
    else:
        both, exposed, optimizer, data = (
            np.nan_to_num(history.column(f"perf/{name}_time"))
            for name in ("forward_backward", "communication", "optimizer", "data")
        )
        exposed = np.minimum(exposed, both)
        parts = {"forward and backward": both - exposed, "exposed communication": exposed}
        parts |= {"optimizer": optimizer, "waiting for data": data}
        parts["other"] = np.maximum(0.0, whole - sum(parts.values()))
    least = 1e-3 * whole.sum()
    return {part: seconds for part, seconds in parts.items() if seconds.sum() >= least}
