"""What ``llm-parallel drill`` is asked; each field's docstring is the help of its option."""

from __future__ import annotations

from dataclasses import dataclass

from llm_parallel.options import argument


@dataclass(frozen=True)
class DrillRequest:
    """A run to break, and how."""

    run_file: str = argument()
    """YAML run file of a small model whose data is here."""
    folder: str = "runs/drill"
    """Where the runs go."""
    blame: int = 10
    """Short runs with one random fault each, whose culprit is known."""
    kinds: str = ""
    """Scenarios of the short runs, with commas between them, as "worker killed,silent partner"; empty: all."""
    soak_s: float = 0.0
    """Seconds of one run with faults all the time; 0: none."""
    every_s: float = 20.0
    """Mean seconds between the faults of the soak."""
    pair_ms: float = 0.0
    """Every fault of the soak is two within so many milliseconds; 0: most come alone."""
    seed: int = 0
    """Seed of what fails, where and when."""
