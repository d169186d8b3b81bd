"""Accuracy and entropy of the labels, which are recorded beside the loss, against plain torch in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.harness import run_ranks
from tests.support.job import base_config, changed, open_engine, own_batches

MODEL = {"model.vocab_size": 127, "model.output_softcap": 2.0, "model.init_std": 0.5, "data.packing": "isolate"}
"""A vocabulary that tensor parallelism pads."""
LOSSES = ("separate", "fused", "fused-recompute")


def observed(rank: int, world_size: int, changes: dict[str, Any]) -> dict[str, Any]:
    """What a step and an evaluation observe with each way to the loss, and the loss of a step that does not."""
    from llm_parallel.objectives.likelihood import Likelihood
    from llm_parallel.parallel.groups import close_groups
    from llm_parallel.train.step import evaluate, forward_backward

    found = {}
    for kind in LOSSES:
        config = changed(base_config(), MODEL | changes | {"kernels.output_loss": kind})
        engine = open_engine(config, rank, world_size)
        batches = own_batches(config, engine.groups)
        plain = forward_backward(engine, Likelihood(), batches)
        seen = forward_backward(engine, Likelihood(), batches, observes=True)
        assert (plain.loss, plain.grad_norm, plain.statistics) == (seen.loss, seen.grad_norm, {}), kind
        held_out = evaluate(engine.network, Likelihood(), batches, observes=True)
        assert held_out[2] == pytest.approx(seen.statistics, rel=1e-6)
        found[kind] = dict(seen.statistics)
        close_groups(world=False)
    return found


def by_torch(rank: int, world_size: int) -> dict[str, float]:
    """The same from the logits of one process."""
    config = changed(base_config(), MODEL)
    engine = open_engine(config, rank, world_size)
    hits = entropy = count = 0.0
    for batch in own_batches(config, engine.groups):
        with torch.no_grad():
            logits = engine.models[0](batch.tokens, documents=batch.documents)[..., :127].double()
        counted = batch.weights != 0
        logs = logits.log_softmax(-1)
        hits += float((logits.argmax(-1) == batch.labels)[counted].sum())
        entropy += float(-(logs.exp() * logs).sum(-1)[counted].sum())
        count += float(counted.sum())
    return {"mean_token_accuracy": hits / count, "entropy": entropy / count}


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("world", "changes"),
    [(1, {}), (4, {"parallel.tp": 2, "parallel.pp": 2})],
    ids=["one process", "TP2 PP2"],
)
def test_accuracy_and_entropy_are_those_of_the_whole_distribution(world: int, changes: dict[str, Any]) -> None:
    wanted = run_ranks(by_torch, 1)[0]
    assert 0.0 < wanted["mean_token_accuracy"] < 1.0 and wanted["entropy"] > 1.0
    for found in run_ranks(observed, world, changes):
        for kind in LOSSES:
            assert found[kind] == pytest.approx(wanted, rel=2e-6), kind


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_any_division_of_rows_and_vocabulary_gives_the_same(
    ranks: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last rank has columns of padding alone; ties go to the first token, as in one process."""
    from llm_parallel.model import observe as module

    monkeypatch.setattr(module, "BLOCK_NUMBERS", rows * 48 // ranks)
    logits = torch.randn(7, 48, generator=torch.Generator().manual_seed(1)).bfloat16() * 8
    logits[2, 5] = logits[2, 30] = 90.0
    labels, valid = torch.tensor([[0, 1, 5, 3, 4, 40, 6]]), 36
    labels[0, 3] = logits[3, :valid].argmax()
    if ranks == 1:
        seen = module.observe(lambda rows: logits[rows], labels.t(), 48, valid)
        assert seen.hits is not None and seen.entropies is not None
        hits, entropies = seen.hits[0], seen.entropies[0]
    else:
        shards = [logits[:, first : first + 12] for first in range(0, 48, 12)]
        parts = [module.sums_of_columns(x, min(12, max(0, valid - 12 * n)), 0.0, 12 * n) for n, x in enumerate(shards)]
        _, token, total, moment = module.joined(torch.stack(parts))
        hits, entropies = (token == labels[0].float()).float(), total.log() - moment / total
    logs = logits[:, :valid].double().log_softmax(-1)
    assert hits.tolist() == [float(row[:valid].argmax() == label) for row, label in zip(logits.float(), labels[0])]
    assert hits[2] == 1.0 and hits[3] == 1.0
    torch.testing.assert_close(entropies.double(), -(logs.exp() * logs).sum(-1), rtol=1e-5, atol=1e-6)
