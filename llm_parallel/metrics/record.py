"""What is recorded of a step and of an evaluation, and its computation from what was measured. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median


@dataclass(frozen=True)
class StepMeasurement:
    """One optimizer step as the training loop saw it. Times are wall seconds of this step on rank 0."""

    step: int
    """Number of the step, from 1."""
    consumed_samples: int
    """Samples of the run up to and including this step, over all replicas."""
    global_batch_size: int
    """Samples of this step."""
    loss: float
    """Mean loss of the step's unmasked tokens, in nats."""
    grad_norm: float
    """Global gradient norm before clipping."""
    lr: float
    """Learning rate that the step was taken with."""
    step_time_s: float
    """From the end of the previous step to the end of this one, without evaluation and checkpoints."""
    data_time_s: float
    """Waiting for data."""
    forward_backward_time_s: float
    """Forward and backward of all micro batches, with the communication in them."""
    optimizer_time_s: float
    """Gradient reduction that is left after backward, clipping, update, and parameter gathering."""
    communication_time_s: float | None = None
    """Communication in forward and backward that compute does not hide, if it was measured."""
    split_s: Mapping[str, float] = field(default_factory=dict)
    """Seconds of the step by ``tp``, ``cp``, … (``parallel.comm_time.TimeSplit``), if they were measured; names that
    end in ``_mean`` and ``_max`` are over all processes."""
    memory_allocated_gib: float = 0.0
    """Peak memory in tensors, in GiB; on CPU the resident set of the process."""
    memory_reserved_gib: float = 0.0
    """Peak memory taken from the device, in GiB."""
    skip_reason: str | None = None
    """Why the update was not applied; None if it was."""
    num_skipped: int = 0
    """Steps of the run that were skipped so far."""
    tokens: int | None = None
    """Tokens that the step computed, where its rows were not all of ``Basis.seq_length``."""
    consumed_tokens: int | None = None
    """Tokens trained on so far, where samples do not have so many."""
    statistics: Mapping[str, float] = field(default_factory=dict)
    """The objective's own numbers by name, as ``accuracy``, logged as ``train/accuracy``."""


@dataclass(frozen=True)
class Basis:
    """What a run's rates are computed from; the same for all of its steps."""

    world_size: int
    """Processes (GPUs) of the run."""
    seq_length: int
    """Tokens of a sample."""
    flops_per_token: int
    """Training FLOPs of a token (``model.flops.flops_per_token``)."""
    peak_tflops: float | None
    """Dense peak of one device that MFU divides by; None if it is not known."""
    total_steps: int
    """Steps of the whole run."""
    other_tokens: int = 0
    """Tokens that samples had, before this start, more than ``seq_length``."""


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step as it is logged: the measurement and what follows from it."""

    step: int
    consumed_samples: int
    consumed_tokens: int
    loss: float
    grad_norm: float
    lr: float
    global_batch_size: int
    step_time_s: float
    data_time_s: float
    forward_backward_time_s: float
    optimizer_time_s: float
    communication_time_s: float | None
    split_s: Mapping[str, float]
    tokens_per_s: float
    tokens_per_s_per_gpu: float
    tflops_per_gpu: float
    mfu: float | None
    memory_allocated_gib: float
    memory_reserved_gib: float
    skipped: bool
    skip_reason: str | None
    num_skipped: int
    eta_s: float
    statistics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalRecord:
    """An evaluation on held-out data after ``step`` steps; ``loss``: mean over the objective's units, of which there
    are ``units``, named ``unit``; ``perplexity`` where these are tokens and the loss is in nats, else None;
    ``statistics``: the objective's own numbers by name, logged as ``eval/name``."""

    step: int
    loss: float
    perplexity: float | None
    samples: int
    units: int
    statistics: Mapping[str, float] = field(default_factory=dict)
    unit: str = "token"

    @classmethod
    def from_loss(
        cls,
        step: int,
        loss: float,
        samples: int,
        units: int,
        statistics: Mapping[str, float] | None = None,
        unit: str = "token",
    ) -> EvalRecord:
        """An evaluation with its perplexity, which is infinite if it exceeds a double."""
        perplexity = None if unit != "token" else math.inf if loss > 700 else math.exp(loss)
        return cls(step, loss, perplexity, samples, units, statistics or {}, unit)


@dataclass(frozen=True)
class TaskScore:
    """A metric of a task, over ``documents`` of its documents. ``error``: its standard error if it has one. ``metric``
    has the name of the answers' filter behind a stroke where there are several, as ``exact_match/strict-match``."""

    task: str
    metric: str
    value: float
    error: float | None
    documents: int


@dataclass(frozen=True)
class TaskRecord:
    """Scores of ``evaluate.tasks`` after ``step`` steps; ``seconds``: wall time that scoring took."""

    step: int
    scores: tuple[TaskScore, ...]
    seconds: float


@dataclass(frozen=True)
class AnswerRecord:
    """What the model answered to a prompt after ``step`` steps; ``stopped``: whether it ended the answer itself."""

    step: int
    prompt: str
    answer: str
    stopped: bool


def derive(measured: StepMeasurement, basis: Basis, recent_step_times_s: Sequence[float] = ()) -> StepRecord:
    """The record of a step.

    ``mfu`` is a fraction of the peak. ``eta_s`` takes the median of ``recent_step_times_s`` (this step's time if empty)
    for each step to come, so that one slow step does not make the estimate jump.
    """
    tokens = measured.global_batch_size * basis.seq_length if measured.tokens is None else measured.tokens
    consumed = measured.consumed_samples * basis.seq_length + basis.other_tokens
    tokens_per_s = tokens / measured.step_time_s
    per_gpu = tokens_per_s / basis.world_size
    tflops = per_gpu * basis.flops_per_token / 1e12
    typical_s = median(recent_step_times_s) if recent_step_times_s else measured.step_time_s
    return StepRecord(
        step=measured.step,
        consumed_samples=measured.consumed_samples,
        consumed_tokens=consumed if measured.consumed_tokens is None else measured.consumed_tokens,
        loss=measured.loss,
        grad_norm=measured.grad_norm,
        lr=measured.lr,
        global_batch_size=measured.global_batch_size,
        step_time_s=measured.step_time_s,
        data_time_s=measured.data_time_s,
        forward_backward_time_s=measured.forward_backward_time_s,
        optimizer_time_s=measured.optimizer_time_s,
        communication_time_s=measured.communication_time_s,
        split_s=measured.split_s,
        tokens_per_s=tokens_per_s,
        tokens_per_s_per_gpu=per_gpu,
        tflops_per_gpu=tflops,
        mfu=tflops / basis.peak_tflops if basis.peak_tflops else None,
        memory_allocated_gib=measured.memory_allocated_gib,
        memory_reserved_gib=measured.memory_reserved_gib,
        skipped=measured.skip_reason is not None,
        skip_reason=measured.skip_reason,
        num_skipped=measured.num_skipped,
        eta_s=max(basis.total_steps - measured.step, 0) * typical_s,
        statistics=measured.statistics,
    )


STEP_NAMES = {
    "train/loss": "loss",
    "train/grad_norm": "grad_norm",
    "train/lr": "lr",
    "train/learning_rate": "lr",
    "train/tokens": "consumed_tokens",
    "train/samples": "consumed_samples",
    "train/global_batch_size": "global_batch_size",
    "train/skipped": "skipped",
    "train/num_skipped": "num_skipped",
    "perf/tokens_per_s": "tokens_per_s",
    "perf/tokens_per_s_per_gpu": "tokens_per_s_per_gpu",
    "perf/tflops": "tflops_per_gpu",
    "perf/mfu": "mfu",
    "perf/step_time": "step_time_s",
    "perf/data_time": "data_time_s",
    "perf/forward_backward_time": "forward_backward_time_s",
    "perf/optimizer_time": "optimizer_time_s",
    "perf/communication_time": "communication_time_s",
    "memory/allocated_gib": "memory_allocated_gib",
    "memory/reserved_gib": "memory_reserved_gib",
    "time/eta_s": "eta_s",
}
"""Name of a logged number → field of StepRecord. ``perf/mfu`` is a fraction, times are seconds. The parts of
``split_s`` are logged as ``time/tp_s``, ``time/bubble_max_s`` and so on."""

EVAL_NAMES = {"eval/loss": "loss", "eval/ppl": "perplexity", "eval/samples": "samples", "eval/tokens": "units"}
"""Name of a logged number → field of EvalRecord."""


ROUND_NAMES = ("round", "reward", "reward_std", "reward_best", "reward_median", "frac_reward_zero_std", "kept",
               "kl_to_reference")  # fmt: skip
ROUND_PREFIXES = ("completions/", "sampling/", "held_out/", "objective/", "val/")


def is_of_round(name: str) -> bool:
    """Whether a number that a step records is of the round that the step begins: most steps have none of these, so that
    they make no curve over steps."""
    bare = name.partition("/")[2]
    return name.startswith("train/") and (bare in ROUND_NAMES or bare.startswith(ROUND_PREFIXES))


TASKS = "tasks/"
"""How the names of tasks' numbers begin: ``tasks/TASK/METRIC``, ``tasks/TASK/METRIC_stderr``,
``tasks/TASK/documents``."""


def task_scalars(record: TaskRecord) -> dict[str, float]:
    """Logged numbers of ``record`` by name."""
    values: dict[str, float] = {}
    for one in record.scores:
        name = f"{TASKS}{one.task}/{one.metric}"
        values[name] = one.value
        if one.error is not None:
            values[f"{name}_stderr"] = one.error
        values[f"{TASKS}{one.task}/documents"] = one.documents
    return values


def scalars(record: StepRecord | EvalRecord | TaskRecord) -> dict[str, float]:
    """Logged numbers of ``record`` by name, without those that are not known. NaN and infinity stay as they are."""
    if isinstance(record, TaskRecord):
        return task_scalars(record)
    names = STEP_NAMES if isinstance(record, StepRecord) else EVAL_NAMES
    values = {name: getattr(record, attribute) for name, attribute in names.items()}
    if isinstance(record, StepRecord):
        values |= {f"time/{name}_s": seconds for name, seconds in record.split_s.items()}
    prefix = "train" if isinstance(record, StepRecord) else "eval"
    values |= {f"{prefix}/{name}": value for name, value in record.statistics.items()}
    if isinstance(record, EvalRecord) and record.unit != "token":
        values[f"eval/{record.unit}s"] = values.pop("eval/tokens")
    return {
        name: int(value) if isinstance(value, bool) else value for name, value in values.items() if value is not None
    }
