"""The stages of the GPU suite, the most valuable first, and what a stage receives."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUDGET_S = 540.0


@dataclass(frozen=True)
class Stage:
    """seconds: its share of a run of BUDGET_S, in proportion to all; what a stage leaves goes to those after it, so the
    shares of the first are ample. function: "module:name",
    which takes a Job and returns the stage's result: with ``left_out`` where it had no time for something, and with
    ``problem`` where what it found is wrong."""

    name: str
    seconds: float
    function: str
    what: str


def _stage(name: str, seconds: float, function: str, what: str) -> Stage:
    return Stage(name, seconds, f"benchmarks.gpu.{function}", what)


STAGES = (
    _stage("environment", 40, "environment:environment", "versions, chip, clocks, what the card does at most"),
    _stage("correctness", 60, "operators:correctness", "every operator once at a real size against fp64"),
    _stage("operators", 100, "operators:operators", "every operator beside its peers, Llama-3 8B and 70B at TP 8"),
    _stage("step", 75, "steps:step", "a training step: ours, ours on torch's operators, transformers"),
    _stage("pretrain", 75, "pretrain:pretrain", "20 steps of pretrain on the GPU held to the CPU's losses"),
    _stage("generation", 30, "generation:generation", "answers by our kernels held to those by torch's attention"),
    _stage("tests", 60, "kernel_tests:kernel_tests", "the kernels' own tests, small operators first"),
    _stage("counters", 40, "counters:counters", "Nsight Compute's view of the worst kernel"),
    _stage("gluon", 45, "operators:gluon", "proof of the Gluon attention, and its speed if it is right"),
    _stage("compiled", 40, "compiled:compiled", "torch.compile: operators, then the training step"),
    _stage("tuning", 30, "tuning:tuning", "other tiles and warps than the tables have"),
)
NAMES = tuple(stage.name for stage in STAGES)


@dataclass
class Job:
    """What a stage receives."""

    work: Path
    """Folder for its own files."""
    deadline: float
    """When it must end, by time.monotonic()."""
    rehearse: bool
    """Whether this is a rehearsal on a CPU."""
    save: Callable[[Mapping[str, Any]], None]
    """Keeps a result that is not complete, which is published if the stage is cut short."""
    previous: Mapping[str, Any] = field(default_factory=dict)
    """What an earlier try of this stage left."""
    results: Mapping[str, Any] = field(default_factory=dict)
    """Results of the other stages, by name."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the whole suite."""

    def left(self) -> float:
        """Seconds until the stage must end."""
        return self.deadline - time.monotonic()


class Lost(RuntimeError):
    """Raised where nothing more can be done in this process; the stage goes on from its saved result in a new one."""


def failure(error: BaseException) -> str:
    """An exception as text, for a row of the results."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
