"""The stages of the GPU suite, in order of worth, and what a stage is given."""

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
    _stage("operators", 110, "operators:operators", "every operator beside its peers, Llama-3 8B and 70B at TP 8"),
    _stage("step", 75, "steps:step", "a training step: ours, ours on torch's operators, transformers"),
    _stage("pretrain", 75, "pretrain:pretrain", "20 steps of pretrain on the GPU held to the CPU's losses"),
    _stage("tests", 80, "kernel_tests:kernel_tests", "the kernels' own tests, small operators first"),
    _stage("counters", 40, "counters:counters", "Nsight Compute's view of the worst kernel"),
    _stage("gluon", 45, "operators:gluon", "proof of the Gluon attention, and its speed if it is right"),
    _stage("compiled", 40, "compiled:compiled", "torch.compile: operators, then the training step"),
    _stage("tuning", 30, "tuning:tuning", "other tiles and warps than the tables have"),
)
NAMES = tuple(stage.name for stage in STAGES)


@dataclass
class Job:
    """What a stage works with. work: folder for files of its own; deadline: of time.monotonic(); options: of the whole
    suite; previous: what an earlier try of this stage left; results: of the other stages, by name; save: keeps a
    result that is not yet whole, from where a cut-off run is published."""

    work: Path
    deadline: float
    rehearse: bool
    save: Callable[[Mapping[str, Any]], None]
    previous: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def left(self) -> float:
        """Seconds until the stage has to be done."""
        return self.deadline - time.monotonic()


class Lost(RuntimeError):
    """Nothing more can be done in this process; the stage goes on in a new one, and its saved result says where."""


def failure(error: BaseException) -> str:
    """An exception as a row carries it."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
