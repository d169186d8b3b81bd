"""A training run on one process: makes its steps and saves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from llm_parallel.checkpoint.state import TrainState
from llm_parallel.config.tree import RunConfig
from llm_parallel.errors import EXIT_STOPPED, UserError
from llm_parallel.metrics.record import EvalRecord
from llm_parallel.parallel import comm_time
from llm_parallel.parallel.groups import close_groups, seed_step
from llm_parallel.train.guard import TooManySkips
from llm_parallel.train.open import PRETRAINING, Method, open_run
from llm_parallel.train.record import Step, StepTimes, is_logged, judge, record_step
from llm_parallel.train.run import Place, Run
from llm_parallel.train.scoring import make_up_scores, score_after_step
from llm_parallel.train.step import StepOutcome, Wishes, apply_gradient, evaluate, forward_backward
from llm_parallel.train.step_settings import global_batch_size, learning_rate
from llm_parallel.train.watch import Watch


def run_training(
    config: RunConfig,
    place: Place,
    asked_to_stop: Callable[[], bool] = lambda: False,
    watch: Watch | None = None,
    method: Method = PRETRAINING,
) -> TrainState:
    """Trains until ``train.steps``, the time limit, or until some process is asked to stop, and saves.

    Every process of the job calls this with its own place. Raises UserError for what the user can mend, TooManySkips if
    the guard gives up.
    """
    watch = watch or Watch()
    try:
        run = open_run(config, place, asked_to_stop, watch, method)
        try:
            if run.state.finished(config.train.steps):
                run.metrics.message(nothing_to_train(run))
            with watch.long():
                method.begin(run)
                run.scoring = method.scoring(run)
            make_up_evaluation(run, watch)
            if not run.state.finished(config.train.steps) and not make_up_scores(run, watch):
                say_stop(run)
                if not run.state.step:  # there is nothing to save
                    return run.state
            elif steps_until_pause(run, watch):
                return run.state
            finish(run, watch)
            return run.state
        except TooManySkips:
            run.store.wait()  # all processes stop at the same step, and an earlier checkpoint may be in flight
            raise
        finally:
            run.feed.close()
            run.metrics.close()
    finally:
        close_groups()


def steps_until_pause(run: Run, watch: Watch) -> bool:
    """Makes the steps that are left, until the run is to stop; whether it pauses instead."""
    with run.comm.recording():
        while not run.state.finished(run.config.train.steps):
            outcome = train_step(run, watch)
            if outcome.stop:
                say_stop(run)
                return False
            if outcome.pause:
                return True
    return False


def nothing_to_train(run: Run) -> str:
    """What the console says when the loaded state has made all steps already."""
    made, wanted = run.state.step, run.config.train.steps
    if run.state.stopped_early:
        return f"nothing to train: the run ended after step {made}, {early_stop(run)}"
    return f"nothing to train: the state is that of step {made}, and train.steps is {wanted}; raise it to go on"


def say_stop(run: Run) -> None:
    """Reports that the run ends before its last step."""
    run.metrics.message(stopping(run))
    run.metrics.event("stop", step=run.state.step)


def stopping(run: Run) -> str:
    """What the console says when the run ends before its last step."""
    made, wanted = run.state.step, run.config.train.steps
    goes_on = f"the same command goes on (exit status {EXIT_STOPPED})" if made < wanted else "all steps are done"
    return f"stopping after step {made} of {wanted}: asked to, or out of time; saving; {goes_on}"


def train_step(run: Run, watch: Watch) -> StepOutcome:
    """One step of the run: data, gradient, guard, update, records, evaluation and checkpoint where due."""
    config, state, engine = run.config, run.state, run.engine
    started = time.perf_counter()
    with run.comm.during(comm_time.DATA):
        watch.before_step(run)
        size = global_batch_size(config.train, state.consumed_samples)
        batches = run.objective.prepare(run.all_models, run.feed.step(state))
    data_s = time.perf_counter() - started
    losses = Losses(watch)
    wishes = Wishes(run.wants_to_stop(), watch.wants_to_pause(), losses.ready)
    if config.adapter is not None and config.adapter.dropout:
        seed_step(config.seed, state.step, run.groups)
    with run.comm.during(comm_time.FORWARD_BACKWARD):
        outcome = forward_backward(
            engine, run.objective, batches, wishes, run.observes and is_logged(run, state.step + 1)
        )
        others = {
            name: forward_backward(run.engines[name], one.objective, batches, Wishes(ready=losses.ready))
            for name, one in run.also.items()
        }
    outcome = together(outcome, others)
    watch.judged(run, outcome, size)
    lr = learning_rate(config.optim, config.train.steps, state.step + 1)
    reason = judge(run, outcome, size, others)
    applied = time.perf_counter()
    if reason is None:
        with run.comm.during(comm_time.OPTIMIZER):
            apply_gradient(engine, outcome, lr, config.optim.clip_grad)
            for name, other in others.items():
                apply_gradient(run.engines[name], other, lr * run.also[name].rate, config.optim.clip_grad)
            run.groups.platform.synchronize()
    times = StepTimes(time.perf_counter() - started, data_s, outcome.forward_backward_s, time.perf_counter() - applied)
    advance(run, size, outcome)
    record_step(run, Step(outcome, times, size, lr, reason), watch.uneven)
    watch.after_step(run)
    goes_on = after_step(run, watch, outcome)
    return outcome if goes_on else replace(outcome, stop=True)


@dataclass
class Losses:
    """Tells a watch the sum of this process's own losses of all models that a step trains, as each is computed."""

    watch: Watch
    own: float = 0.0

    def ready(self, own_loss: float) -> None:
        """See ``Wishes``."""
        self.own += own_loss
        self.watch.before_agreement(self.own)


def together(outcome: StepOutcome, others: Mapping[str, StepOutcome]) -> StepOutcome:
    """The policy's outcome with what is recorded of the other models that the step trains."""
    if not others:
        return outcome
    statistics = dict(outcome.statistics)
    for name, other in others.items():
        statistics |= {**other.statistics, f"{name}/grad_norm": other.grad_norm}
    return replace(
        outcome,
        forward_backward_s=outcome.forward_backward_s + sum(other.forward_backward_s for other in others.values()),
        not_finite=max(outcome.not_finite, *(other.not_finite for other in others.values())),
        statistics=statistics,
    )


def advance(run: Run, size: int, outcome: StepOutcome) -> None:
    """Counts a step that is over, applied or skipped."""
    state = run.state
    state.step += 1
    state.consumed_samples += size
    state.consumed_tokens += outcome.count if run.objective.unit == "token" else 0
    state.num_skipped += int(run.guard.consecutive_skips > 0)
    state.consecutive_skips = run.guard.consecutive_skips
    state.guard = run.guard.state()


def after_step(run: Run, watch: Watch, outcome: StepOutcome) -> bool:
    """Makes the evaluation, the checkpoint and the scores of tasks that are due after this step; ``finish`` makes the
    last ones. False if scoring was given up, since the run is to stop."""
    step, last = run.state.step, run.state.step >= run.config.train.steps
    with going_on(run, watch):
        run.store.poll()
    if last or outcome.stop:
        return True
    if evaluation_is_due(run):
        evaluate_within(run, watch)
        if run.state.stopped_early:
            return True
    interval = run.config.checkpoint.interval_steps
    if interval and step % interval == 0:
        with watch.long(), going_on(run, watch):
            run.store.save(run.models, run.state)
            run.metrics.event("save", step=step)
            say_what_is_missing(run)
    return outcome.pause or score_after_step(run, watch)  # those who go on after a pause make up what is missing


def say_what_is_missing(run: Run) -> None:
    """Reports a checkpoint without the tokenizer or the chat template that the run began with."""
    if run.store.missing is not None:
        run.metrics.message(f"the checkpoint of step {run.state.step}: {run.store.missing}")
        run.metrics.event("save_incomplete", step=run.state.step, cause=run.store.missing)


@contextmanager
def going_on(run: Run, watch: Watch) -> Iterator[None]:
    """A checkpoint that could not be saved ends a run that has no other copy of its state. A run that has one reports
    the failure and goes on; its next checkpoint is tried as usual."""
    try:
        yield
    except UserError as error:  # raised on every process, since they agree about the failure
        if not watch.survives_failed_saves:
            raise
        run.metrics.message(f"step {run.state.step}: {error}; training goes on, the state is copied in memory")
        run.metrics.event("save_failed", step=run.state.step, cause=str(error))


def evaluation_is_due(run: Run) -> bool:
    """Whether held-out data is judged after the present step."""
    interval = run.config.train.eval_interval_steps
    return interval is not None and run.state.step % interval == 0


def make_up_evaluation(run: Run, watch: Watch) -> None:
    """Makes the evaluation on which an early stop depends, if the state was saved before it was made."""
    state, steps = run.state, run.config.train.steps
    missed = state.step > 0 and not state.finished(steps) and state.evaluated_step < state.step
    if run.config.train.early_stop_evaluations is not None and missed and evaluation_is_due(run):
        evaluate_within(run, watch)


def evaluate_within(run: Run, watch: Watch) -> None:
    """An evaluation between two steps, and what follows from it."""
    with watch.long():
        run_evaluation(run)
    if run.state.stopped_early:
        step = run.state.step
        run.metrics.message(f"the run ends after step {step} of {run.config.train.steps}, {early_stop(run)}")
        run.metrics.event("early_stop", step=step)


def early_stop(run: Run) -> str:
    """Why a run ended before its last step."""
    return (
        f"since {run.state.evaluations_since_best} evaluations in a row have found no held-out loss below "
        f"{run.state.best_eval_loss:.4f} (train.early_stop_evaluations)"
    )


def run_evaluation(run: Run) -> float:
    """Held-out loss, for tokens in nats, recorded; NaN if nothing is held out."""
    if not run.held_out.batches:
        return math.nan
    batches = run.evaluation.prepare(run.all_models, run.held_out.batches)
    loss, units, statistics = evaluate(run.engine.network, run.evaluation, batches, run.observes)
    unit, samples = run.evaluation.unit, run.held_out.samples
    run.metrics.eval(EvalRecord.from_loss(run.state.step, loss, samples, units, statistics, unit))
    run.evaluated(run)
    run.state.evaluated(loss, run.config.train.early_stop_evaluations)
    return loss


def finish(run: Run, watch: Watch) -> None:
    """Last evaluation (of a run that is complete) and checkpoint, and when it is on disk the last scores of tasks."""
    with watch.long():
        if run.state.step >= run.config.train.steps:
            run_evaluation(run)
        save_last(run)
    if run.state.finished(run.config.train.steps):
        make_up_scores(run, watch)
    run.metrics.event("end", step=run.state.step)


def save_last(run: Run) -> None:
    """The last checkpoint; waits until it is on disk."""
    try:
        run.store.wait()
    except UserError as error:  # of an earlier checkpoint; whether this one succeeds is what counts
        run.metrics.event("save_failed", step=run.state.step, cause=str(error))
    run.store.save(run.models, run.state, blocking=True)
    say_what_is_missing(run)
    run.store.wait()
