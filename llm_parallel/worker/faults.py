"""Faults that a drill causes inside a worker (``llm-parallel drill``; only with ``elastic.drills``)."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterable
from typing import Any

import torch

from llm_parallel.model.tensors import is_matrix_of_layer
from llm_parallel.parallel.mcore_optimizer import distributed_parts, shards_of
from llm_parallel.train.run import Run

KINDS = ("raise", "flip", "nan", "stall", "hold")
"""Faults that a process causes in itself; all others come from outside."""


STALL_S = 3600
"""Longer than any run waits for a process."""


class DrillError(RuntimeError):
    """The exception that a drill raises."""


@torch.no_grad()
def before_step(faults: Iterable[dict[str, Any]], run: Run) -> None:
    """Causes the faults that are due. ``{"kind": "nan"|"flip"|"raise"|…, "left": times}``; a persistent fault has no
    end."""
    for fault in faults:
        if fault.get("left", 1) <= 0 or run.state.step < fault.get("from_step", 0):
            continue
        if fault["kind"] == "raise":
            raise DrillError("the same mistake in every process")
        if fault["kind"] in ("stall", "hold"):
            fault["left"] -= 1
            _stand_still(holding=fault["kind"] == "hold")
        elif fault["kind"] in ("nan", "flip") and (weight := _other_share(run)) is not None:
            if "left" in fault:
                fault["left"] -= 1
            (_poison if fault["kind"] == "nan" else _flip)(weight)


def _stand_still(holding: bool) -> None:
    """The program waits for something that has nothing to do with its device; ``holding`` the interpreter's lock, as an
    extension may, so that no thread of the process goes on."""
    if holding:
        ctypes.PyDLL(None).sleep(STALL_S)
    else:
        time.sleep(STALL_S)


def _poison(weight: torch.Tensor) -> None:
    """Sets a weight that only this process uses to NaN, as a broken device would."""
    weight.fill_(float("nan"))


def _flip(weight: torch.Tensor) -> None:
    """Flips the lowest bit of a weight's exponent, in this replica only."""
    integers = weight.view(torch.int16 if weight.element_size() == 2 else torch.int32)
    integers ^= 1 << (7 if weight.element_size() == 2 else 23)


def _other_share(run: Run) -> torch.Tensor | None:
    """One weight of a matrix inside the layers whose optimizer state another replica holds, so that a change to it
    stays on this process until the step's end. None while there is no other replica: the fault waits for one."""
    own: dict[int, tuple[int, int]] = {}
    if distributed_parts(run.engine.optimizer):
        own = {id(shard.parameter): (shard.start, shard.stop) for shard in shards_of(run.engine.optimizer)}
    for model in run.engine.models:
        for name, parameter in model.named_parameters():
            start, stop = own.get(id(parameter), (0, 0))
            flat = parameter.detach().view(-1)
            if is_matrix_of_layer(name) and (start > 0 or stop < flat.numel()):
                return flat[:1] if start > 0 or stop == 0 else flat[-1:]
    return None
