"""The life of a pretraining run on one process: build, resume, step until done, save."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch.distributed as dist

from llm_parallel.checkpoint.load import load_checkpoint, refuse_damaged
from llm_parallel.checkpoint.state import TrainState
from llm_parallel.checkpoint.store import CheckpointStore
from llm_parallel.config.rules import check_config
from llm_parallel.config.tree import RunConfig
from llm_parallel.data.loader import Batch, MicroBatchLoader
from llm_parallel.errors import EXIT_STOPPED, UserError
from llm_parallel.metrics.peaks import Peak, find_peak
from llm_parallel.metrics.record import Basis, EvalRecord, StepMeasurement, derive
from llm_parallel.metrics.run import Metrics, World, open_metrics
from llm_parallel.model.flops import CONVENTIONS, flops_per_token, parameter_count
from llm_parallel.model.gpt import build_chunks
from llm_parallel.model.hf import is_hf_folder, load_hf_weights
from llm_parallel.model.mcore_config import compute_dtype, overlap_enabled
from llm_parallel.parallel import comm_time
from llm_parallel.parallel.groups import Groups, close_groups, open_groups
from llm_parallel.parallel.layout import Layout
from llm_parallel.parallel.platform import open_platform, set_deterministic
from llm_parallel.parallel.wrap import Engine, wrap
from llm_parallel.train.feed import evaluation_batches, open_training_data
from llm_parallel.train.guard import Guard, TooManySkips
from llm_parallel.train.step import StepOutcome, Wishes, apply_gradient, evaluate, forward_backward
from llm_parallel.train.step_settings import global_batch_size, learning_rate
from llm_parallel.train.watch import Resumed, Watch


@dataclass
class Run:
    """Everything that one process of a run holds."""

    config: RunConfig
    engine: Engine
    store: CheckpointStore
    state: TrainState
    guard: Guard
    loader: MicroBatchLoader
    held_out: list[Batch]
    metrics: Metrics
    basis: Basis
    asked_to_stop: Callable[[], bool]
    started_s: float
    watch: Watch
    comm: comm_time.Untimed
    step_times_s: deque[float] = field(default_factory=lambda: deque(maxlen=20))

    def wants_to_stop(self) -> bool:
        """Whether this process was asked to stop, or its time is up."""
        limit = self.config.train.time_limit_s
        return self.asked_to_stop() or (limit is not None and time.monotonic() - self.started_s > limit)


@dataclass(frozen=True)
class StepTimes:
    """Wall seconds of one step on this process, and of its parts."""

    step_s: float
    data_s: float
    forward_backward_s: float
    optimizer_s: float


@dataclass(frozen=True)
class Place:
    """Which process of a run this is. ``store``: where the processes meet, if not by env://; ``elapsed_s``: seconds
    that the run has had before this process began, which count towards its time limit."""

    rank: int
    world_size: int
    local_rank: int
    store: dist.Store | None = None
    elapsed_s: float = 0.0


def pretrain(
    config: RunConfig,
    place: Place,
    asked_to_stop: Callable[[], bool] = lambda: False,
    watch: Watch | None = None,
) -> TrainState:
    """Trains until ``train.steps``, the time limit, or until some process is asked to stop, and saves.

    Every process of the job calls this with its own place. Raises UserError for what the user can mend, TooManySkips if
    the guard gives up.
    """
    watch = watch or Watch()
    try:
        run = open_run(config, place, asked_to_stop, watch)
        try:
            with run.comm.recording():
                while run.state.step < config.train.steps:
                    outcome = train_step(run)
                    if outcome.stop:
                        run.metrics.message(stopping(run))
                        run.metrics.event("stop", step=run.state.step)
                        break
                    if outcome.pause:
                        return run.state
            with watch.long():
                finish(run)
            return run.state
        except TooManySkips:
            run.store.wait()  # all processes gave up at the same step, and a checkpoint of before it may be in flight
            raise
        finally:
            run.loader.close()
            run.metrics.close()
    finally:
        close_groups()


def stopping(run: Run) -> str:
    """What the console says when the run ends before its last step."""
    made, wanted = run.state.step, run.config.train.steps
    goes_on = f"the same command goes on (exit status {EXIT_STOPPED})" if made < wanted else "all steps are done"
    return f"stopping after step {made} of {wanted}: asked to, or out of time; saving; {goes_on}"


def open_run(config: RunConfig, place: Place, asked_to_stop: Callable[[], bool], watch: Watch) -> Run:
    """Builds model, optimizer, data and metrics, and resumes from the newest checkpoint if there is one."""
    started_s = time.monotonic() - place.elapsed_s  # building and loading count towards the time limit
    platform = open_platform(config.device, place.local_rank, config.train.threads_per_process)
    check_config(config, place.world_size, platform.kind, uneven=watch.uneven)  # type: ignore[arg-type]
    if config.train.deterministic:
        set_deterministic()
    layout = Layout.from_config(config, place.world_size)
    groups = open_groups(layout, place.rank, platform, config.seed, store=place.store)
    engine = wrap(build_chunks(config, groups), config, groups, overlap_enabled(config, platform))
    run_dir = Path(config.run_dir)
    store = CheckpointStore(run_dir / "checkpoints", config.checkpoint, config, groups)
    resumed = watch.restore(engine) or resume(config, engine, store)
    state = resumed.state
    guard = Guard(config.train.guard)
    guard.restore(state.guard, state.consecutive_skips)
    peak = find_peak(platform.device_name, config.log.peak_tflops)
    basis = Basis(
        world_size=place.world_size,
        seq_length=config.data.seq_length_tokens,
        flops_per_token=flops_per_token(config.model, config.data.seq_length_tokens),
        peak_tflops=peak.tflops,
        total_steps=config.train.steps,
    )
    world = World(place.world_size, layout.describe(), platform.device_name, platform.is_cuda)
    held_out = evaluation_batches(config, groups)
    with ExitStack() as opened:  # what runs in threads must end if the rest of this fails
        loader = opened.enter_context(open_training_data(config, groups, state.consumed_samples))
        metrics = open_metrics(
            place.rank, run_dir, config, world=world, resumed_step=state.step, total_steps=config.train.steps
        )
        opened.callback(metrics.close)
        metrics.start(describe(config, groups, resumed, peak))
        if resumed.changed:
            metrics.event("settings_changed", step=state.step, changed=resumed.changed)
        comm = open_comm_time(config, groups) if config.log.comm_time else comm_time.Untimed()
        run = Run(
            config, engine, store, state, guard, loader, held_out, metrics, basis, asked_to_stop, started_s, watch, comm
        )
        watch.opened(run)
        opened.pop_all()
    return run


def open_comm_time(config: RunConfig, groups: Groups) -> comm_time.CommTime:
    """Measures a message of the size that pipeline stages exchange; every process calls this."""
    shards = groups.layout.cp * (groups.layout.tp if groups.layout.sequence_parallel else 1)
    rows = config.train.micro_batch_size * config.data.seq_length_tokens // shards
    return comm_time.open_comm_time(groups, rows * config.model.hidden_size * compute_dtype(config).itemsize)


def resume(config: RunConfig, engine: Engine, store: CheckpointStore) -> Resumed:
    """Loads the run's newest checkpoint, else ``checkpoint.load`` (ours or a Hugging Face folder), else nothing."""
    latest, passed_over = store.latest()
    changed: list[str] = []
    if latest is not None:
        state = load_checkpoint(latest, engine, config, changed=changed.extend)
        return Resumed(state, "; ".join([f"resumed from {latest}", *passed_over]), changed)
    if config.checkpoint.load is None:
        return Resumed(TrainState(), "new run")
    if is_hf_folder(config.checkpoint.load):
        load_hf_weights(config.checkpoint.load, engine.models)
        engine.optimizer.reload_model_params()
        return Resumed(TrainState(), f"weights from Hugging Face folder {config.checkpoint.load}")
    with_optimizer = config.checkpoint.load_optimizer
    if config.checkpoint.verify:
        refuse_damaged(config.checkpoint.load, engine.groups)
    state = load_checkpoint(
        config.checkpoint.load, engine, config, load_optimizer=with_optimizer, changed=changed.extend
    )
    return Resumed(state, f"{'state' if with_optimizer else 'weights'} from {config.checkpoint.load}", changed)


def describe(config: RunConfig, groups: Groups, resumed: Resumed, peak: Peak) -> list[str]:
    """What the console says before the first step."""
    differs = [f"changed since the state was saved, as configured now: {', '.join(resumed.changed)}"]
    count = parameter_count(config.model)
    platform, train = groups.platform, config.train
    tokens = train.global_batch_size * config.data.seq_length_tokens
    return [
        f"{groups.layout.world_size} x {platform.device_name} ({platform.backend}), {groups.layout.describe()}",
        f"{count.total / 1e6:,.1f} M parameters, {train.precision}, vocabulary {config.model.vocab_size}",
        f"global batch {train.global_batch_size} samples = {tokens:,} tokens, {train.steps:,} steps; {resumed.origin}",
        *(differs if resumed.changed else []),
        f"run folder {config.run_dir}; MFU ({CONVENTIONS['model']}): {peak.describe()}",
    ]


def train_step(run: Run) -> StepOutcome:
    """One step of the run: data, gradient, guard, update, records, evaluation and checkpoint where due."""
    config, state, groups = run.config, run.state, run.engine.groups
    started = time.perf_counter()
    with run.comm.during(comm_time.DATA):
        run.watch.before_step(run)
        size = global_batch_size(config.train, state.consumed_samples)
        batches = [next(run.loader) for _ in range(groups.layout.num_micro_batches(size, groups.at.dp))]
    data_s = time.perf_counter() - started
    wishes = Wishes(run.wants_to_stop(), run.watch.wants_to_pause(), run.watch.before_agreement)
    with run.comm.during(comm_time.FORWARD_BACKWARD):
        outcome = forward_backward(run.engine, batches, wishes)
    run.watch.judged(run, outcome, size)
    lr = learning_rate(config.optim, config.train.steps, state.step + 1)
    reason = judge(run, outcome, size)
    applied = time.perf_counter()
    if reason is None:
        with run.comm.during(comm_time.OPTIMIZER):
            apply_gradient(run.engine, outcome, lr, config.optim.clip_grad)
            groups.platform.synchronize()
    times = StepTimes(time.perf_counter() - started, data_s, outcome.forward_backward_s, time.perf_counter() - applied)
    advance(run, size, outcome)
    record_step(run, outcome, times, size, lr, reason)
    run.watch.after_step(run)
    after_step(run, outcome.stop)
    return outcome


def record_step(run: Run, outcome: StepOutcome, times: StepTimes, size: int, lr: float, reason: str | None) -> None:
    """Logs a step that was counted, if its turn has come. Every process of a run calls this."""
    config, state, groups = run.config, run.state, run.engine.groups
    run.step_times_s.append(times.step_s)
    due = state.step % config.log.interval_steps == 0 or state.step == config.train.steps or reason is not None
    split = run.comm.take(
        times.step_s,
        {
            comm_time.DATA: times.data_s,
            comm_time.FORWARD_BACKWARD: times.forward_backward_s,
            comm_time.OPTIMIZER: times.optimizer_s,
        },
    )
    if not due:
        return
    allocated, reserved = groups.platform.memory_gib()
    measured = StepMeasurement(
        step=state.step,
        consumed_samples=state.consumed_samples,
        global_batch_size=size,
        loss=outcome.loss,
        grad_norm=outcome.grad_norm,
        lr=lr,
        step_time_s=times.step_s,
        data_time_s=times.data_s,
        forward_backward_time_s=times.forward_backward_s,
        optimizer_time_s=times.optimizer_s,
        communication_time_s=max(0.0, times.forward_backward_s - split.compute - split.bubble) if split else None,
        split_s=named_split(split, groups, everywhere=not run.watch.uneven) if split else {},
        memory_allocated_gib=allocated,
        memory_reserved_gib=reserved,
        skip_reason=reason,
        num_skipped=state.num_skipped,
    )
    run.metrics.step(derive(measured, run.basis, run.step_times_s))


def named_split(split: comm_time.TimeSplit, groups: Groups, everywhere: bool) -> dict[str, float]:
    """Seconds by name, and with ``everywhere`` their mean and largest over all processes, which then all call this.

    In an elastic run every process keeps its own: one that died here would leave others a step ahead."""
    own = asdict(split)
    if not everywhere or groups.layout.world_size == 1:
        return own
    sums, largest = comm_time.sum_and_max(list(own.values()), groups.platform.device)
    means = {f"{name}_mean": total / groups.layout.world_size for name, total in zip(own, sums)}
    return own | means | {f"{name}_max": seconds for name, seconds in zip(own, largest)}


def judge(run: Run, outcome: StepOutcome, size: int) -> str | None:
    """Why the step must not be applied, or None. Names the samples of a bad step, of one that ends the run too."""
    try:
        reason = run.guard.judge(outcome.loss, outcome.grad_norm)
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


def advance(run: Run, size: int, outcome: StepOutcome) -> None:
    """Counts a step that is over, applied or skipped."""
    state = run.state
    state.step += 1
    state.consumed_samples += size
    state.consumed_tokens += outcome.tokens
    state.num_skipped += int(run.guard.consecutive_skips > 0)
    state.consecutive_skips = run.guard.consecutive_skips
    state.guard = run.guard.state()


def after_step(run: Run, stopping: bool) -> None:
    """Evaluation and checkpoint that are due after this step; the last ones are ``finish``'s."""
    step, last = run.state.step, run.state.step >= run.config.train.steps
    with going_on(run):
        run.store.poll()
    if last or stopping:
        return
    interval = run.config.train.eval_interval_steps
    if interval and step % interval == 0:
        with run.watch.long():
            run_evaluation(run)
    interval = run.config.checkpoint.interval_steps
    if interval and step % interval == 0:
        with run.watch.long(), going_on(run):
            run.store.save(run.engine, run.state)
            run.metrics.event("save", step=step)


@contextmanager
def going_on(run: Run) -> Iterator[None]:
    """A checkpoint that could not be saved ends a run that has no other copy of its state, and is said in one that
    has; the next is tried as ever."""
    try:
        yield
    except UserError as error:  # every process has one: they agree about it
        if not run.watch.survives_failed_saves:
            raise
        run.metrics.message(f"step {run.state.step}: {error}; training goes on, the state is copied in memory")
        run.metrics.event("save_failed", step=run.state.step, cause=str(error))


def run_evaluation(run: Run) -> float:
    """Held-out loss in nats per token, recorded; NaN if nothing is held out."""
    if not run.held_out:
        return math.nan
    loss, tokens = evaluate(run.engine, run.held_out)
    run.metrics.eval(EvalRecord.from_loss(run.state.step, loss, run.config.train.eval_samples, tokens))
    return loss


def finish(run: Run) -> None:
    """Last evaluation (of a run that is complete) and checkpoint; waits until it is on disk."""
    if run.state.step >= run.config.train.steps:
        run_evaluation(run)
    run.store.save(run.engine, run.state, blocking=True)
    run.store.wait()
    run.metrics.event("end", step=run.state.step)
