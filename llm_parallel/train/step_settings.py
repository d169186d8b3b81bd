"""Learning rate and global batch size as pure functions of the step and of the samples consumed."""

from __future__ import annotations

import math

from llm_parallel.config.tree import OptimConfig, TrainConfig


def learning_rate(optim: OptimConfig, total_steps: int, step: int) -> float:
    """Learning rate of optimizer step ``step``, counted from 1.

    Warm-up is linear and reaches the peak at its last step. Then cosine (Loshchilov and Hutter 2016, arXiv
    1608.03983) or linear decay to ``min_lr``, constant, or the peak with linear decay over the last steps (``wsd``).
    """
    warmup = optim.warmup(total_steps)
    if step <= warmup:
        return optim.lr * step / warmup
    if optim.schedule == "constant":
        return optim.lr
    if optim.schedule == "wsd":
        length = optim.decay_steps or max(1, total_steps // 10)
        done = (step - (total_steps - length)) / length
    else:
        end = optim.decay_steps or total_steps
        done = (step - warmup) / max(1, end - warmup)
    done = min(max(done, 0.0), 1.0)
    share = 0.5 * (1.0 + math.cos(math.pi * done)) if optim.schedule == "cosine" else 1.0 - done
    return optim.min_lr + (optim.lr - optim.min_lr) * share


def global_batch_size(train: TrainConfig, consumed_samples: int) -> int:
    """Samples of the step that begins after ``consumed_samples``, during ramp-up and after it."""
    ramp = train.rampup
    if ramp is None or consumed_samples >= ramp.samples:
        return train.global_batch_size
    stages = (train.global_batch_size - ramp.start) // ramp.increment
    stage = consumed_samples * stages // ramp.samples if stages else 0
    return ramp.start + stage * ramp.increment


def total_samples(train: TrainConfig) -> int:
    """Samples that the whole run consumes."""
    consumed = 0
    for step in range(train.steps):
        size = global_batch_size(train, consumed)
        if size == train.global_batch_size and train.rampup is None:
            return train.steps * size
        if train.rampup is not None and consumed >= train.rampup.samples:
            return consumed + (train.steps - step) * size
        consumed += size
    return consumed


def steps_for(train: TrainConfig, samples: float) -> int:
    """The fewest steps that consume at least ``samples`` samples."""
    steps = consumed = 0
    while train.rampup is not None and consumed < min(samples, train.rampup.samples):
        consumed += global_batch_size(train, consumed)
        steps += 1
    left = max(samples - consumed, 0)
    return max(1, steps + math.ceil(left / train.global_batch_size - 1e-9))
