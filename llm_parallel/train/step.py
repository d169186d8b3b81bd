"""One optimizer step, and one evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from llm_parallel.data.loader import Batch
from llm_parallel.parallel.layout import Layout
from llm_parallel.parallel.wrap import Engine


@dataclass(frozen=True)
class StepOutcome:
    """What one forward and backward over a global batch found, the same on every process.

    loss: nats per unmasked token; grad_norm: L2 norm of the whole gradient before clipping; tokens: unmasked tokens;
    stop: whether some process asked to stop; pause: whether one asked for all to leave after the step; seconds are wall
    time on this process; not_finite: replicas whose own loss is NaN or infinite.
    """

    loss: float
    grad_norm: float
    tokens: int
    stop: bool
    forward_backward_s: float
    not_finite: int = 0
    pause: bool = False


@dataclass(frozen=True)
class Wishes:
    """What one process has to say in a step's agreement. ``ready`` is called with its own sum of losses (0 where
    another reports it) when its gradient is done and no process can have finished the step."""

    stop: bool = False
    pause: bool = False
    ready: Callable[[float], None] = lambda own_loss: None


NO_WISHES = Wishes()


def context_shard(batch: Batch, layout: Layout, cp_rank: int) -> Batch:
    """The part of a micro batch that context-parallel rank ``cp_rank`` holds; document starts stay whole."""
    if layout.cp == 1:
        return batch
    ranges = layout.token_ranges(batch.tokens.shape[1], cp_rank)

    def take(x: Tensor) -> Tensor:
        return torch.cat([x[:, part.start : part.stop] for part in ranges], dim=1)

    return replace(batch, tokens=take(batch.tokens), labels=take(batch.labels), loss_mask=take(batch.loss_mask))


def _token_loss(loss_mask: Tensor, output: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of losses and count of tokens; megatron-core divides the gradient by the count of all processes. output: the
    losses, or their masked sum and they."""
    total = (output * loss_mask).sum() if isinstance(output, Tensor) else output[0]
    count = loss_mask.sum()
    return total, count.to(torch.int32), {"loss": torch.stack((total.detach(), count))}


def _forward(iterator: Iterator[Batch], chunk: Any) -> tuple[Tensor, Any]:
    batch = next(iterator)
    output = chunk(batch.tokens, labels=batch.labels, document_starts=batch.document_starts, loss_mask=batch.loss_mask)
    return output, partial(_token_loss, batch.loss_mask)


def _micro_batches(engine: Engine, batches: Sequence[Batch]) -> Iterator[Batch]:
    for batch in batches:
        for look in engine.before_micro_batch:
            look()
        yield batch


def run_schedule(
    engine: Engine, batches: Sequence[Batch], forward_only: bool, wishes: Wishes = NO_WISHES
) -> list[float]:
    """Runs all micro batches through the pipeline; gradients end up reduced and divided by the global token count.

    Returns [sum of losses, unmasked tokens, processes that wish to stop, that wish to pause, replicas whose own loss is
    not finite] over the whole job.
    """
    groups = engine.groups
    sharded = [context_shard(batch, groups.layout, groups.at.cp) for batch in batches]
    rows, tokens = batches[0].tokens.shape
    results = get_forward_backward_func()(
        forward_step_func=_forward,
        data_iterator=[_micro_batches(engine, sharded) for _ in engine.chunks],
        model=engine.chunks,
        num_microbatches=len(sharded),
        seq_length=tokens,
        micro_batch_size=rows,
        forward_only=forward_only,
    )
    sums = torch.zeros(2, dtype=torch.float64)
    if results and groups.reports_loss:
        sums = torch.stack([result["loss"] for result in results]).double().sum(0).cpu()
    own = sums.tolist()
    wishes.ready(own[0])
    return groups.sum_over_world(*own, float(wishes.stop), float(wishes.pause), float(not math.isfinite(own[0])))


def forward_backward(engine: Engine, batches: Sequence[Batch], wishes: Wishes = NO_WISHES) -> StepOutcome:
    """Loss and gradient of one global batch, of which ``batches`` are this replica's micro batches."""
    started = time.perf_counter()
    engine.zero_grad()
    loss_sum, tokens, stops, pauses, not_finite = run_schedule(engine, batches, forward_only=False, wishes=wishes)
    engine.optimizer.prepare_grads()
    grad_norm = float(engine.optimizer.get_grad_norm())
    seconds = time.perf_counter() - started
    loss = loss_sum / max(tokens, 1)
    return StepOutcome(loss, grad_norm, int(tokens), stops > 0, seconds, int(not_finite), pauses > 0)


def apply_gradient(engine: Engine, outcome: StepOutcome, lr: float, clip_grad: float) -> None:
    """Clips the gradient that ``forward_backward`` left and updates the weights."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    engine.step(clip_grad, outcome.grad_norm)


@torch.no_grad()
def evaluate(engine: Engine, batches: Sequence[Batch]) -> tuple[float, int]:
    """Loss in nats per token, and tokens, of held-out micro batches; weights and gradients stay as they are."""
    engine.set_training(False)
    loss_sum, tokens, *_ = run_schedule(engine, batches, forward_only=True)
    engine.set_training(True)
    return loss_sum / max(tokens, 1), int(tokens)
