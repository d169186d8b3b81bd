"""DPO and KTO beside TRL's own functions: the same answers have the same loss, gradient and metrics."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.harness import run_ranks

pytestmark = pytest.mark.gloo
BETA, ROWS, TOKENS = 0.3, 6, 12
PAIRS: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "robust": {"loss": "robust", "label_smoothing": 0.2},
    "hinge": {"loss": "hinge"},
    "ipo": {"loss": "ipo"},
    "sigmoid_norm": {"length_normalised": True},
}


class Accelerator:
    """The part of accelerate's that TRL's losses use, in one process."""

    device = "cpu"

    def gather(self, x: Any) -> Any:
        return x

    gather_for_metrics = gather


def answers(seed: int) -> Any:
    """Lengths of prompts and of whole answers, each answer in a row of its own; log-probabilities [rows, tokens - 1] of
    a model and of a reference."""
    import torch

    random = torch.Generator().manual_seed(seed)
    prompts = torch.randint(1, 4, (ROWS,), generator=random)
    lengths = torch.randint(6, TOKENS + 1, (ROWS,), generator=random)
    logps, reference = (-torch.rand(ROWS, TOKENS - 1, generator=random, dtype=torch.float64) * 3 for _ in range(2))
    return prompts, lengths, logps, reference


def trl_trainer(**more: Any) -> Any:
    """What TRL's loss functions read of their trainer."""
    metrics: Any = defaultdict(lambda: defaultdict(list))
    return SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=Accelerator(), beta=BETA, aux_loss_enabled=False,
        precompute_ref_logps=True, _metrics=metrics, _total_train_tokens=0, _tp_size=1, args=SimpleNamespace(), **more,
    )  # fmt: skip


def trl_model(logps: Any) -> Any:
    """A model whose log-probabilities are given, 0 where labels do not count."""
    import torch

    def forward(labels: Any, **_: Any) -> Any:
        found = logps.masked_fill(labels[:, 1:] == -100, 0.0)
        zeros = torch.zeros_like(found)
        return SimpleNamespace(log_probs=found, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    return forward


def compare(rank: int, world_size: int) -> dict[str, Any]:
    """For each loss its value by TRL and by us, the largest difference of a gradient, and both metrics."""
    import torch
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.kto_trainer import KTOTrainer

    from llm_parallel.data.batch import Batch, Documents
    from llm_parallel.objectives.base import reported
    from llm_parallel.objectives.dpo import DPO
    from llm_parallel.objectives.kto import KTO
    from llm_parallel.parallel.mesh import Coordinates, Mesh

    alone: Any = SimpleNamespace(mesh=Mesh(), at=Coordinates(0, 0, 0, 0), collection=None)
    prompts, lengths, logps, reference = answers(1)
    places = torch.arange(TOKENS)
    completion = ((places >= prompts[:, None]) & (places < lengths[:, None])).long()
    inputs = {"input_ids": torch.ones(ROWS, TOKENS, dtype=torch.int64), "completion_mask": completion}
    inputs["attention_mask"] = (places < lengths[:, None]).long()
    used = completion[:, 1:].double()
    sums = (reference * used).sum(1)

    def ours(objective: Any, row_length: int, **facts: Any) -> Any:
        """Loss, gradient and metrics of answers that share rows, ``row_length`` in each."""
        leaf = (-logps).clone().requires_grad_()
        shape = (ROWS // row_length, row_length * (TOKENS - 1))
        starts = torch.arange(row_length, dtype=torch.int32) * (TOKENS - 1)
        numbers = torch.zeros(shape, dtype=torch.int64)
        batch = Batch(
            numbers, numbers, used.reshape(shape), Documents((starts,) * shape[0]),
            {"reference": reference.reshape(shape)}, {name: x.reshape(shape[0], -1) for name, x in facts.items()},
        )  # fmt: skip
        (batch,) = objective.prepare({}, [batch])
        found = objective(batch, alone, leaf.reshape(shape))
        (found.total / found.count).backward()
        said = reported(objective, {name: float(x) for name, x in found.stats.items()}, float(found.count))
        return float(found.total.detach() / found.count), -leaf.grad, said

    def theirs(function: Any, trainer: Any, inputs: Any) -> Any:
        leaf = logps.clone().requires_grad_()
        loss = function(trainer, trl_model(leaf), inputs, False)
        loss.backward()
        return float(loss.detach()), leaf.grad, {name: x[-1] for name, x in trainer._metrics["train"].items()}

    found = {}
    order = [*range(0, ROWS, 2), *range(1, ROWS, 2)]  # TRL has all chosen answers before all rejected ones
    back = torch.tensor(order).argsort()
    for name, options in PAIRS.items():
        trainer = trl_trainer(
            ld_alpha=None, f_divergence_type="reverse_kl", loss_types=[name], loss_weights=[1.0], use_weighting=False,
            label_smoothing=options.get("label_smoothing", 0.0),
        )  # fmt: skip
        pairs = {key: x[order] for key, x in inputs.items()}
        pairs |= {"ref_chosen_logps": sums[0::2], "ref_rejected_logps": sums[1::2]}
        kept, logps = logps, logps[order]
        loss, gradient, metrics = theirs(DPOTrainer._compute_loss, trainer, pairs)
        logps = kept
        mine = ours(DPO(BETA, **options), 2)
        found[name] = (loss, mine[0], float((gradient[back] - mine[1]).abs().max()), metrics, mine[2])
    liked = torch.tensor([True, False, False, True, True, False])
    gap = torch.tensor(1.2)
    trainer = trl_trainer(loss_type="kto", calculate_KL=True, desirable_weight=1.3, undesirable_weight=0.9)
    trainer._compute_kl_logps = lambda model, batch: sums + gap
    kto = {**inputs, "label": liked, "ref_logps": sums, "ref_KL_logps": sums}
    loss, gradient, metrics = theirs(KTOTrainer._compute_loss, trainer, kto)
    mine = ours(KTO(lambda models, batches: float(gap), BETA, 1.3, 0.9), 3, score=liked.double())
    found["kto"] = (loss, mine[0], float((gradient - mine[1]).abs().max()), metrics, mine[2])
    return found


def test_dpo_and_kto_are_those_of_trl() -> None:
    found = run_ranks(compare, 1)[0]
    assert set(found) == {*PAIRS, "kto"}
    for name, (theirs, ours, gradient, metrics, said) in found.items():
        assert ours == pytest.approx(theirs, rel=1e-6), name
        assert gradient <= 1e-7, name
        shared = metrics.keys() & said.keys()
        wanted = {"rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"}
        assert shared >= wanted | ({"kl"} if name == "kto" else {"rewards/accuracies", "rewards/margins"})
        for metric in shared:
            assert said[metric] == pytest.approx(metrics[metric], rel=1e-5), (name, metric)
