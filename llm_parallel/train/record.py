"""What is recorded of a step of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from llm_parallel.metrics.record import StepMeasurement, derive
from llm_parallel.parallel import comm_time
from llm_parallel.parallel.groups import Groups
from llm_parallel.train.guard import TooManySkips, not_finite
from llm_parallel.train.run import Run
from llm_parallel.train.step import StepOutcome

NO_OTHERS: Mapping[str, StepOutcome] = {}


@dataclass(frozen=True)
class StepTimes:
    """Wall seconds of one step on this process, and of its parts."""

    step_s: float
    data_s: float
    forward_backward_s: float
    optimizer_s: float


@dataclass(frozen=True)
class Step:
    """A step that was made: its outcome and times, samples, learning rate, and why it was skipped, if it was."""

    outcome: StepOutcome
    times: StepTimes
    size: int
    lr: float
    skip_reason: str | None


def is_logged(run: Run, step: int) -> bool:
    """Whether the numbers of a step are recorded."""
    return step % run.config.log.interval_steps == 0 or step == run.config.train.steps


def record_step(run: Run, step: Step, uneven: bool) -> None:
    """Logs a step that was counted, if it is one that is logged (``log.interval_steps``). Every process of a run calls
    this. ``uneven``: whether processes may be a step apart, so that they must not wait for each other here."""
    state, groups = run.state, run.groups
    outcome, times = step.outcome, step.times
    run.step_times_s.append(times.step_s)
    due = is_logged(run, state.step)
    split = run.comm.take(
        times.step_s,
        {
            comm_time.DATA: times.data_s,
            comm_time.FORWARD_BACKWARD: times.forward_backward_s,
            comm_time.OPTIMIZER: times.optimizer_s,
        },
    )
    if not due and step.skip_reason is None:
        return
    allocated, reserved = groups.platform.memory_gib()
    measured = StepMeasurement(
        step=state.step,
        consumed_samples=state.consumed_samples,
        global_batch_size=step.size,
        loss=outcome.loss,
        grad_norm=outcome.grad_norm,
        lr=step.lr,
        step_time_s=times.step_s,
        data_time_s=times.data_s,
        forward_backward_time_s=times.forward_backward_s,
        optimizer_time_s=times.optimizer_s,
        communication_time_s=max(0.0, times.forward_backward_s - split.compute - split.bubble) if split else None,
        split_s=named_split(split, groups, everywhere=not uneven) if split else {},
        memory_allocated_gib=allocated,
        memory_reserved_gib=reserved,
        skip_reason=step.skip_reason,
        num_skipped=state.num_skipped,
        tokens=run.feed.step_tokens,
        consumed_tokens=None if run.feed.has_whole_samples else state.consumed_tokens,
        statistics={**outcome.statistics, **run.feed.progress(state)},
    )
    run.metrics.step(derive(measured, run.basis, run.step_times_s))


def named_split(split: comm_time.TimeSplit, groups: Groups, everywhere: bool) -> dict[str, float]:
    """Seconds by name, and with ``everywhere`` their mean and largest over all processes, which then all call this.

    In an elastic run every process keeps its own numbers: if one died in this collective, others would be a step
    ahead."""
    own = asdict(split)
    if not everywhere or groups.mesh.world_size == 1:
        return own
    sums, largest = comm_time.sum_and_max(list(own.values()), groups.platform.device)
    means = {f"{name}_mean": total / groups.mesh.world_size for name, total in zip(own, sums)}
    return own | means | {f"{name}_max": seconds for name, seconds in zip(own, largest)}


def judge(run: Run, outcome: StepOutcome, size: int, others: Mapping[str, StepOutcome] = NO_OTHERS) -> str | None:
    """Why the step must not be applied, or None. ``others``: the outcomes of the other models that it trains. Records
    the samples of such a step, also of one that ends the run."""
    wrong = {name: not_finite(other.loss, other.grad_norm) for name, other in others.items()}
    besides = [f"{reason} of the {name}" for name, reason in wrong.items() if reason is not None]
    try:
        reason = run.guard.judge(outcome.loss, outcome.grad_norm, besides[0] if besides else None)
    except TooManySkips as error:
        name_skipped_batch(run, error.reason, size)
        raise
    if reason is not None:
        name_skipped_batch(run, reason, size)
    return reason


def name_skipped_batch(run: Run, reason: str, size: int) -> None:
    """Says which samples the present step holds, before it is counted."""
    step, first = run.state.step + 1, run.state.consumed_samples
    last = first + size - 1
    run.metrics.message(f"step {step} skipped: {reason}; samples {first} to {last}")
    run.metrics.event("skip", step=step, reason=reason, first_sample=first, last_sample=last)
