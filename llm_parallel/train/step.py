"""One optimizer step, and one evaluation, of any objective."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from torch import Tensor

from llm_parallel.data.batch import Batch
from llm_parallel.model.observe import Seen
from llm_parallel.objectives.base import Objective, Output, reported
from llm_parallel.parallel.engine import Engine, Network
from llm_parallel.parallel.groups import Groups
from llm_parallel.parallel.stages import Stages


@dataclass(frozen=True)
class StepOutcome:
    """What one forward and backward over a global batch found, the same on every process.

    loss: mean over the objective's units, for tokens in nats; grad_norm: L2 norm of the whole gradient before clipping;
    count: units; statistics: the objective's, divided by the count; stop: whether some process asked to stop; pause:
    whether one asked for all to leave after the step; seconds are wall time on this process; not_finite: replicas whose
    own loss is NaN or infinite.
    """

    loss: float
    grad_norm: float
    count: int
    stop: bool
    forward_backward_s: float
    not_finite: int = 0
    pause: bool = False
    statistics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Wishes:
    """What one process adds to the sums on which all processes of a step agree: whether it asks to stop or to pause.
    ``ready`` is called with its own sum of losses (0 where another process reports it) when its gradient is computed
    and no process can have finished the step."""

    stop: bool = False
    pause: bool = False
    ready: Callable[[float], None] = lambda own_loss: None


NO_WISHES = Wishes()


@dataclass(frozen=True)
class Sums:
    """Sums over all processes: the objective's totals, counts and statistics; the number of processes that ask to stop
    and of those that ask to pause; the number of replicas whose own loss is not finite. ``observed`` holds means."""

    total: float
    count: float
    statistics: dict[str, float]
    observed: dict[str, float]
    stops: float
    pauses: float
    not_finite: float

    @property
    def mean(self) -> float:
        """Mean loss of a unit."""
        return self.total / max(self.count, 1)


OBSERVED = ("mean_token_accuracy", "entropy")
"""Statistics that are observed beside any objective, means over the labels whose weight is not 0, in TRL's names."""


def _terms(
    objective: Objective, groups: Groups, batch: Batch, seen: Seen | None, output: Output
) -> tuple[Tensor, Tensor, dict]:
    """What megatron-core's schedules expect of a loss: a sum, the count of all processes by which it divides the
    gradient, and what the schedule hands back."""
    found = objective(batch, groups, output)
    stats = [found.stats[name].detach() for name in objective.statistics]
    if seen is not None:
        assert seen.hits is not None and seen.entropies is not None
        counted = batch.weights != 0
        stats += [torch.where(counted, x, 0.0).sum() for x in (seen.hits, seen.entropies)]
        stats.append(counted.sum())
    sums = torch.stack([x.float() for x in (found.total.detach(), found.count, *stats)])
    return found.total, found.count.to(torch.int32), {"sums": sums}


def _forward(
    objective: Objective, groups: Groups, observes: bool, iterator: Iterator[Batch], chunk: Any
) -> tuple[Tensor, Any]:
    batch = next(iterator)
    seen = Seen() if observes else None
    weights = batch.weights if objective.weighted_in_model else None
    output = chunk(
        batch.tokens,
        labels=batch.labels,
        documents=batch.documents,
        weights=weights,
        loss_options=objective.loss_options,
        numbers=batch.numbers,
        **({"seen": seen} if observes else {}),
    )
    return output, partial(_terms, objective, groups, batch, seen)


def _micro_batches(network: Network, batches: Sequence[Batch]) -> Iterator[Batch]:
    for batch in batches:
        for look in network.before_micro_batch:
            look()
        yield batch


def schedule(stages: Stages) -> Any:
    """megatron-core's pipeline schedule for a model's stages."""
    if stages.pp == 1:
        return schedules.forward_backward_no_pipelining
    if stages.vpp == 1:
        return schedules.forward_backward_pipelining_without_interleaving
    return schedules.forward_backward_pipelining_with_interleaving


def run_schedule(
    network: Network,
    objective: Objective,
    batches: Sequence[Batch],
    forward_only: bool,
    wishes: Wishes = NO_WISHES,
    observes: bool = False,
) -> Sums:
    """Runs all micro batches through the pipeline; gradients end up reduced and divided by the global count.

    ``batches`` are whole samples; each process takes its context-parallel shard of them. ``observes``: with the
    statistics ``OBSERVED``, the same choice on every process.
    """
    groups = network.groups
    rows, tokens = batches[0].tokens.shape
    sharded = [batch.context_shard(groups.mesh, groups.at.cp) for batch in batches]
    results = schedule(network.stages)(
        forward_step_func=partial(_forward, objective, groups, observes),
        data_iterator=[_micro_batches(network, sharded) for _ in network.chunks],
        model=list(network.chunks),
        num_microbatches=len(sharded),
        seq_length=tokens,
        micro_batch_size=rows,
        forward_only=forward_only,
    )
    sums = torch.zeros(2 + len(objective.statistics) + 3 * observes, dtype=torch.float64)
    if results and groups.reports_loss:
        sums = torch.stack([result["sums"] for result in results]).double().sum(0).cpu()
    own = sums.tolist()
    wishes.ready(own[0])
    everywhere = groups.sum_over_world(*own, float(wishes.stop), float(wishes.pause), float(not math.isfinite(own[0])))
    total, count, *stats = everywhere[: len(own)]
    named = dict(zip(objective.statistics, stats))
    observed = {}
    if observes:
        *totals, labels = stats[len(named) :]
        observed = {name: value / max(labels, 1.0) for name, value in zip(OBSERVED, totals)}
    return Sums(total, count, named, observed, *everywhere[len(own) :])


def forward_backward(
    engine: Engine,
    objective: Objective,
    batches: Sequence[Batch],
    wishes: Wishes = NO_WISHES,
    observes: bool = False,
) -> StepOutcome:
    """Loss and gradient of one global batch, of which ``batches`` are this replica's micro batches. ``observes``: see
    ``run_schedule``."""
    started = time.perf_counter()
    engine.zero_grad()
    sums = run_schedule(engine.network, objective, batches, forward_only=False, wishes=wishes, observes=observes)
    engine.optimizer.prepare_grads()
    grad_norm = float(engine.optimizer.get_grad_norm())
    seconds = time.perf_counter() - started
    return StepOutcome(
        loss=sums.mean,
        grad_norm=grad_norm,
        count=int(sums.count),
        stop=sums.stops > 0,
        forward_backward_s=seconds,
        not_finite=int(sums.not_finite),
        pause=sums.pauses > 0,
        statistics=reported(objective, sums.statistics, sums.count) | sums.observed,
    )


def apply_gradient(engine: Engine, outcome: StepOutcome, lr: float, clip_grad: float) -> None:
    """Clips the gradient that ``forward_backward`` left and updates the weights."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    engine.step(clip_grad, outcome.grad_norm)


@torch.no_grad()
def evaluate(
    network: Network, objective: Objective, batches: Sequence[Batch], observes: bool = False
) -> tuple[float, int, dict[str, float]]:
    """Mean loss, count of the objective's units and its statistics over held-out micro batches; weights and gradients
    stay as they are."""
    network.set_training(False)
    sums = run_schedule(network, objective, batches, forward_only=True, observes=observes)
    network.set_training(True)
    return sums.mean, int(sums.count), reported(objective, sums.statistics, sums.count) | sums.observed
