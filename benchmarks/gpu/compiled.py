"""Measures torch.compile, which takes longest to start: single operators, then the training step of the small model."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

from benchmarks.gpu.operators import in_turns, measured
from benchmarks.gpu.plan import Job
from benchmarks.gpu.steps import measured_steps

OPERATORS = ("rms_norm", "swiglu", "rope", "cross_entropy")
MODEL = "llama3-8b, 4 layers"
# Kept for the steps, whose figures are worth more than more shapes of operators.
STEPS_S = 30.0


def compiled(job: Job) -> dict[str, Any]:
    """Times compiled operators in turns with ours, then the compiled steps of plain torch and of transformers."""
    with _compiler(job.rehearse):
        reserve = 0.0 if job.rehearse else min(STEPS_S, job.left() / 2)
        wanted = ("ours", "torch.compile")
        found = measured(job, in_turns(OPERATORS, job.rehearse), lambda name: name in wanted, reserve)
        model = "debug" if job.rehearse else MODEL
        return measured_steps(job, [(model, "transformers.compile"), (model, "torch.compile")], found)


def _compiler(rehearse: bool) -> AbstractContextManager[Any]:
    """In a rehearsal torch.compile only traces and runs the traced graph, since inductor takes a minute on a CPU."""
    if not rehearse:
        return nullcontext()
    import torch

    return mock.patch.object(torch, "compile", partial(torch.compile, backend="eager"))
