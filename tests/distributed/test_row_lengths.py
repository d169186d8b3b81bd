"""Rows without the padding that no row of a micro batch needs give the loss and gradients of whole rows, in layouts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.harness import run_ranks
from tests.support.job import SEQ, base_config, changed, gradients, make_batch, open_engine
from tests.support.preference_job import completed, objectives

pytestmark = pytest.mark.gloo
SCALING = {"kind": "dynamic", "factor": 2.0, "original_max_position": 8}
"""Angles that depend on the length of a sample, which must be the whole one."""
MODEL = {
    "model.rope_scaling": SCALING,
    "data.packing": "isolate",
    "train.micro_batch_size": 2,
    "chat.packing": "pad",
    "method.kind": "sft",
    "chat.neftune_alpha": 5.0,
}


def filled(number: int) -> int:
    """Tokens of a sample's text."""
    return 5 + number * 7 % 13


def padded(config: Any, numbers: range) -> Any:
    """Samples of two documents, then padding."""
    from llm_parallel.data.batch import Documents

    batch = make_batch(config, numbers)
    weights, starts = torch.ones_like(batch.weights), []
    for row, number in enumerate(numbers):
        end = filled(number)
        weights[row, end:] = 0.0
        weights[row, end // 2 - 1] = 0.0
        starts.append(torch.tensor([0, end // 2, end], dtype=torch.int32))
    return replace(batch, weights=weights, documents=Documents(tuple(starts)))


def compared(rank: int, world_size: int, changes: dict[str, Any]) -> dict[str, Any]:
    """By objective: losses of whole rows and of cut ones, and the largest difference of a gradient, relative to the
    largest number of that gradient."""
    from llm_parallel.data.row_lengths import RowLengths
    from llm_parallel.objectives.likelihood import Likelihood
    from llm_parallel.parallel.groups import close_groups
    from llm_parallel.parallel.layout import Layout
    from llm_parallel.train.step import forward_backward
    from llm_parallel.tune.score import log_probabilities

    class Packer:
        filled = staticmethod(filled)

    config = changed(base_config(), MODEL | changes)
    engine = open_engine(config, rank, world_size)
    layout = Layout.from_config(config, world_size)
    numbers = list(layout.micro_batches(0, config.train.global_batch_size, engine.groups.at.dp))
    others = [range(part.start + 8, part.stop + 8) for part in numbers]
    beside = [completed(padded(config, part), None, 128) for part in others]
    whole = [completed(padded(config, part), other, 128) for part, other in zip(numbers, beside)]
    lengths = RowLengths.of_run(config, layout, Packer(), "cpu")  # type: ignore[arg-type]
    assert lengths is not None
    lengths = replace(lengths, filled=lambda number: max(filled(number), filled(number + 8)))
    cut = lengths.cut(whole, numbers)
    found: dict[str, Any] = {"lengths": [batch.tokens.shape[1] for batch in cut]}
    for name, objective in {"likelihood": Likelihood(), "kto": objectives()["kto"]}.items():
        results = []
        for batches in (whole, cut):
            ready = objective.prepare({"policy": engine}, batches)
            outcome = forward_backward(engine, objective, ready, observes=name == "likelihood")
            statistics = [outcome.statistics[each] for each in sorted(outcome.statistics)]
            results.append(([outcome.loss, outcome.grad_norm, *statistics], gradients(engine)))
        (one, first), (two, second) = results
        worst = max(float((first[n] - second[n]).abs().max() / first[n].abs().max().clamp(min=1e-6)) for n in first)
        found[name] = one, two, worst
    for one, two in zip(*(log_probabilities(engine.network, batches) for batches in (whole, cut))):
        for values in (one, two):  # a process has those of its part of the sample
            torch.distributed.all_reduce(values, group=engine.groups.collection.cp)
        torch.testing.assert_close(two, one[:, : two.shape[1]], rtol=0, atol=2e-6)
    close_groups(world=False)
    return found


LAYOUTS: dict[str, tuple[int, dict[str, Any], int]] = {
    "one process": (1, {"kernels.output_loss": "fused"}, 1),
    "PP2": (2, {"parallel.pp": 2}, 1),
    "TP2 SP PP2": (4, {"parallel.tp": 2, "parallel.pp": 2}, 2),
    "CP2 TP2 SP DP2": (8, {"parallel.cp": 2, "parallel.tp": 2, "parallel.dp": 2, "train.micro_batch_size": 1}, 4),
}


@pytest.mark.parametrize(
    "name", ["PP2", *(pytest.param(name, marks=pytest.mark.slow) for name in sorted({*LAYOUTS} - {"PP2"}))]
)
def test_cut_rows_change_no_loss_and_no_gradient(name: str) -> None:
    processes, changes, unit = LAYOUTS[name]
    seen = set()
    for found in run_ranks(compared, processes, changes):
        lengths = found.pop("lengths")
        seen |= set(lengths)
        assert all(length % unit == 0 and length < SEQ for length in lengths)
        assert len(set(lengths)) == 1 or "PP" not in name, "stages of a pipeline exchange tensors of one shape"
        for objective, (whole, cut, worst) in found.items():
            np.testing.assert_allclose(cut, whole, rtol=1e-6, atol=1e-6, err_msg=objective)
            assert worst < 2e-5, objective
    assert len(seen) > 1 or "PP" in name, "micro batches have lengths of their own"
