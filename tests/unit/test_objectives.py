"""Objectives against their formulas in fp64 numpy: value, count, statistics and the gradient of every label's loss."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_parallel.data.batch import Batch, Documents
from llm_parallel.errors import UserError
from llm_parallel.objectives.base import reported
from llm_parallel.objectives.by_source import by_source
from llm_parallel.objectives.dpo import DPO
from llm_parallel.objectives.likelihood import Likelihood
from llm_parallel.parallel.mesh import Coordinates, Mesh
from llm_parallel.train.open import check_feed

ALONE: Any = SimpleNamespace(mesh=Mesh(), at=Coordinates(0, 0, 0, 0), collection=None)


def batch_of(seed: int, lengths: list[list[int]], dtype: torch.dtype = torch.float64) -> tuple[Batch, torch.Tensor]:
    """Rows of documents of these lengths, with random weights of 0, 0.5 and 1, and random losses."""
    random = np.random.default_rng(seed)
    rows, tokens = len(lengths), sum(lengths[0])
    starts = tuple(torch.tensor([0, *np.cumsum(row)[:-1]], dtype=torch.int32) for row in lengths)
    weights = torch.tensor(random.choice([0.0, 0.5, 1.0], (rows, tokens)), dtype=dtype)
    reference = torch.tensor(-random.exponential(2.0, (rows, tokens)), dtype=dtype)
    numbers = torch.zeros(rows, tokens, dtype=torch.int64)
    losses = torch.tensor(random.exponential(2.0, (rows, tokens)), dtype=dtype, requires_grad=True)
    return Batch(numbers, numbers, weights, Documents(starts), {"reference": reference}), losses


@given(st.integers(0, 2**32 - 1))
def test_likelihood_is_the_weighted_sum_and_counts_weighted_labels(seed: int) -> None:
    batch, losses = batch_of(seed, [[5, 3], [1, 7]])
    found = Likelihood()(batch, ALONE, losses)
    weights, values = batch.weights.numpy(), losses.detach().numpy()
    assert found.total.item() == pytest.approx((weights * values).sum(), rel=1e-12)
    assert found.count.item() == (weights > 0).sum()
    found.total.backward()
    np.testing.assert_allclose(losses.grad, weights)


def test_likelihood_takes_the_sum_that_the_fused_output_loss_made() -> None:
    batch, losses = batch_of(0, [[4, 4]])
    total = (losses * batch.weights).sum()
    assert Likelihood()(batch, ALONE, (total, losses.detach())).total is total


@given(st.integers(0, 2**32 - 1))
def test_losses_by_source_are_means_over_the_labels_of_each_source(seed: int) -> None:
    batch, losses = batch_of(seed, [[5, 3], [1, 7]])
    source = torch.tensor(np.random.default_rng(seed).choice([0.0, 2.0], (2, 8)))
    batch = Batch(batch.tokens, batch.labels, batch.weights, batch.documents, {"source": source})
    objective = by_source(["web", "code", "chat"])
    for output in (losses, ((losses * batch.weights).sum(), losses.detach())):
        found = objective(batch, ALONE, output)
        assert torch.equal(found.total, Likelihood()(batch, ALONE, output).total)
        said = reported(objective, {name: float(x) for name, x in found.stats.items()}, float(found.count))
        weights, values = batch.weights.numpy(), losses.detach().numpy()
        for number, name in enumerate(("web", "code", "chat")):
            own = (source.numpy() == number) & (weights != 0)
            if own.any():
                assert said[f"loss/{name}"] == pytest.approx((weights * values)[own].sum() / own.sum(), rel=1e-12)
            else:
                assert f"loss/{name}" not in said
    assert len(said) <= 2 and type(by_source(["web"])) is Likelihood


def dpo_in_numpy(batch: Batch, losses: np.ndarray, beta: float) -> tuple[float, int, np.ndarray, float]:
    """Sum over pairs, pairs, gradient by label, pairs that the policy orders right, pair by pair."""
    assert batch.documents is not None
    weights, reference = batch.weights.numpy(), batch.columns["reference"].numpy()
    total, count, right, gradient = 0.0, 0, 0.0, np.zeros_like(losses)
    for row, starts in enumerate(batch.documents.starts):
        edges = [*starts.tolist(), losses.shape[1]]
        spans = [slice(a, b) for a, b in itertools.pairwise(edges)]
        for chosen, rejected in zip(spans[0::2], spans[1::2]):
            if not weights[row, chosen].any() or not weights[row, rejected].any():
                continue
            reward = [
                beta * (weights[row, span] * (-losses[row, span] - reference[row, span])).sum()
                for span in (chosen, rejected)
            ]
            margin = reward[0] - reward[1]
            total += np.log1p(np.exp(-margin)) if margin > 0 else np.log1p(np.exp(margin)) - margin
            count, right = count + 1, right + (margin > 0)
            slope = beta / (1 + np.exp(margin))
            gradient[row, chosen], gradient[row, rejected] = weights[row, chosen], -weights[row, rejected]
            gradient[row, chosen] *= slope
            gradient[row, rejected] *= slope
    return total, count, gradient, right


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.05, 0.5, 3.0]))
def test_dpo_is_its_formula(seed: int, beta: float) -> None:
    """Two pairs in one row, a pair and a document that is only padding in the other."""
    batch, losses = batch_of(seed, [[4, 3, 2, 3], [5, 4, 3]])
    found = DPO(beta)(batch, ALONE, losses)
    total, count, gradient, right = dpo_in_numpy(batch, losses.detach().numpy(), beta)
    assert found.total.item() == pytest.approx(total, rel=1e-10, abs=1e-12)
    assert found.count.item() == count
    assert found.stats["rewards/accuracies"].item() == right
    found.total.backward()
    np.testing.assert_allclose(losses.grad, gradient, rtol=1e-9, atol=1e-12)


def test_dpo_of_a_policy_that_is_its_reference_is_log_2() -> None:
    batch, _ = batch_of(1, [[6, 6]])
    losses = -batch.columns["reference"].clone()
    found = DPO()(batch, ALONE, losses)
    assert found.total.item() == pytest.approx(np.log(2), rel=1e-12)
    assert found.stats["rewards/chosen"].item() == found.stats["rewards/rejected"].item() == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_reference_of_a_label_that_does_not_count_does_not_count(bad: float) -> None:
    batch, losses = batch_of(4, [[4, 4]])
    batch.weights[:, 2], batch.weights[:, 5] = 0.0, 0.0
    expected = DPO()(batch, ALONE, losses).total.item()
    batch.columns["reference"][:, 2] = bad
    found = DPO()(batch, ALONE, losses)
    assert found.total.item() == expected
    found.total.backward()
    assert torch.isfinite(losses.grad).all()  # type: ignore[arg-type]


def test_data_without_what_an_objective_reads_is_refused() -> None:
    for offers, missing in (((), "documents"), (("documents",), "reference")):
        with pytest.raises(UserError, match=f"no column '{missing}'"):
            check_feed([DPO()], SimpleNamespace(offers=offers))  # type: ignore[arg-type]
    check_feed([Likelihood()], SimpleNamespace(offers=()))  # type: ignore[arg-type]


@pytest.mark.parametrize("starts", [[], [1, 4], [0, 3, 3], [0, 5, 2]])
def test_documents_begin_at_0_and_follow_each_other(starts: list[int]) -> None:
    with pytest.raises(AssertionError, match="documents begin at"):
        Documents((torch.tensor(starts, dtype=torch.int32),))


def test_padding_documents_are_no_pair() -> None:
    batch, losses = batch_of(2, [[3, 3, 3, 3]])
    batch.weights[:, :6], batch.weights[:, 6:] = 1.0, 0.0
    assert DPO()(batch, ALONE, losses).count.item() == 1


@pytest.mark.parametrize("objective", [Likelihood(), DPO(), by_source("ab")], ids=["likelihood", "dpo", "by source"])
def test_an_objective_names_its_statistics_beforehand(objective: Any) -> None:
    batch, losses = batch_of(3, [[4, 4]])
    batch = replace(batch, columns={**batch.columns, "source": torch.zeros(1, 8)})
    assert tuple(objective(batch, ALONE, losses).stats) == objective.statistics
    assert objective.prepare({}, [batch]) == [batch]
