"""Opening a run: models, data, state and metrics of one process, resumed from its nearest saved state."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from llm_parallel.checkpoint.base import load_adapters, load_base, load_trunk
from llm_parallel.checkpoint.folders import find_checkpoint
from llm_parallel.checkpoint.load import load_checkpoint, refuse_damaged
from llm_parallel.checkpoint.run_file import read_config
from llm_parallel.checkpoint.state import TrainState
from llm_parallel.checkpoint.store import CheckpointStore
from llm_parallel.config.rules import NO_BASE, check_config
from llm_parallel.config.tree import RunConfig
from llm_parallel.data.segments import Segment, tokens_read
from llm_parallel.errors import UserError
from llm_parallel.metrics.peaks import Peak, find_peak
from llm_parallel.metrics.record import Basis
from llm_parallel.metrics.run import World, open_metrics
from llm_parallel.model.flops import CONVENTIONS, adapter_parameters, flops_per_token, parameter_count
from llm_parallel.model.gpt import build_policy
from llm_parallel.model.hf import is_hf_folder, load_hf_weights
from llm_parallel.model.hf_config import hf_config_to_model
from llm_parallel.model.hf_files import is_peft_folder, read_hf_config
from llm_parallel.model.numerics import dtype_of
from llm_parallel.model.peft_files import PeftFolder
from llm_parallel.objectives.base import Objective
from llm_parallel.objectives.likelihood import Likelihood
from llm_parallel.parallel import comm_time
from llm_parallel.parallel.engine import POLICY, Engine, Models, build_engine, network_of
from llm_parallel.parallel.groups import Groups, open_groups
from llm_parallel.parallel.layout import Layout
from llm_parallel.parallel.platform import open_platform, set_deterministic
from llm_parallel.train.changes import (
    changed_fields,
    changed_model,
    changed_tokenizer,
    changed_without_effect,
)
from llm_parallel.train.feed import Feed, HeldOut, evaluation_batches, token_feed
from llm_parallel.train.guard import Guard
from llm_parallel.train.pinned import pinned
from llm_parallel.train.run import AlsoTrained, Place, Run, Scoring
from llm_parallel.train.watch import Resumed, Watch


def policy_engine(config: RunConfig, groups: Groups) -> Engine:
    """The model that a run configuration describes, with initial weights, and its optimizer."""
    return build_engine(build_policy(config, groups), config.optim, config.parallel)


def policy_alone(config: RunConfig, groups: Groups) -> Models:
    """The models of a run that has only one."""
    return {POLICY: policy_engine(config, groups)}


def likelihood(config: RunConfig) -> Objective:
    """Next-token prediction as a run configuration wants it."""
    return Likelihood(label_smoothing=config.train.label_smoothing, z_loss=config.train.z_loss)


def unweighted_likelihood(config: RunConfig) -> Objective:
    """Next-token prediction without the terms that only training has."""
    return Likelihood()


def nothing_also(config: RunConfig) -> Mapping[str, AlsoTrained]:
    """For methods that train one model."""
    return {}


def nothing_new(config: RunConfig, models: Models) -> list[str]:
    """For methods whose models all come from ``checkpoint.load``."""
    return []


def nothing_more(run: Run) -> None:
    """For methods that do nothing before the first step or after an evaluation."""


def nothing_scored(run: Run) -> Scoring | None:
    """For runs without ``evaluate.tasks``."""
    return None


@dataclass(frozen=True)
class Method:
    """What a run trains: what a step minimises, with which models, on what; what else of these it trains; ``initial``
    gives those models the weights that a run begins with which ``checkpoint.load`` does not hold, and returns what is
    to be said of them; which data are held out and how they are judged; ``begin`` is called when the run is open,
    before its first step, and may take long; ``evaluated`` is called after each evaluation. Every process calls both.
    ``observes``: with accuracy and entropy of the labels, at steps that are logged and in evaluations; ``scoring``
    makes what scores ``evaluate.tasks``, on every process of the open run."""

    objective: Callable[[RunConfig], Objective] = likelihood
    evaluation: Callable[[RunConfig], Objective] = unweighted_likelihood
    models: Callable[[RunConfig, Groups], Models] = policy_alone
    also: Callable[[RunConfig], Mapping[str, AlsoTrained]] = nothing_also
    initial: Callable[[RunConfig, Models], list[str]] = nothing_new
    feed: Callable[[RunConfig, Groups, TrainState], Feed] = token_feed
    held_out: Callable[[RunConfig, Groups, TrainState], HeldOut] = evaluation_batches
    begin: Callable[[Run], None] = nothing_more
    evaluated: Callable[[Run], None] = nothing_more
    scoring: Callable[[Run], Scoring | None] = nothing_scored
    observes: bool = False


PRETRAINING = Method()
DETERMINISTIC = (
    "kernels.deterministic: what a token gets depends on neither batch nor layout, to the last bit; a step takes up to "
    "1.3 times the processor time"
)


def open_run(
    config: RunConfig, place: Place, asked_to_stop: Callable[[], bool], watch: Watch, method: Method = PRETRAINING
) -> Run:
    """Builds models, optimizer, data and metrics, and resumes from the nearest state if there is one."""
    started_s = time.monotonic() - place.elapsed_s  # building and loading count towards the time limit
    platform = open_platform(config.device, place.local_rank, config.train.threads_per_process)
    check_config(config, place.world_size, platform.kind, uneven=watch.uneven)  # type: ignore[arg-type]
    if config.train.deterministic:
        set_deterministic()
    layout = Layout.from_config(config, place.world_size)
    groups = open_groups(layout, place.rank, platform, config.seed, store=place.store)
    config, replaced = pinned(config, groups)
    models = method.models(config, groups)
    run_dir = Path(config.run_dir)
    store = CheckpointStore(run_dir / "checkpoints", config.checkpoint, config, groups)
    resumed = restored(config, models, store, watch, replaced)
    state = resumed.state
    if not state.step:  # before a first step, whatever was restored is what the run begins with
        resumed.changed.extend(method.initial(config, models))
    guard = Guard(config.train.guard)
    guard.restore(state.guard, state.consecutive_skips)
    peak = find_peak(platform.device_name, config.log.peak_tflops)
    basis = basis_of(config, place, state, peak)
    world = World(place.world_size, layout.describe(), platform.device_name, platform.is_cuda)
    held_out = method.held_out(config, groups, state)
    with ExitStack() as opened:  # background threads must end if the rest of this fails
        feed = open_feed(config, groups, resumed, method)
        opened.callback(feed.close)
        objective, also = method.objective(config), method.also(config)
        check_feed([objective, *(one.objective for one in also.values())], feed)
        metrics = open_metrics(
            place.rank, run_dir, config, world=world, resumed_step=state.step, total_steps=config.train.steps
        )
        opened.callback(metrics.close)
        metrics.start(describe(config, layout, groups, resumed, peak))
        if resumed.changed:
            metrics.event("settings_changed", step=state.step, changed=resumed.changed)
        run = Run(
            config=config,
            layout=layout,
            models=models,
            also=also,
            objective=objective,
            evaluation=method.evaluation(config),
            evaluated=method.evaluated,
            long=watch.long,
            observes=method.observes,
            feed=feed,
            held_out=held_out,
            store=store,
            state=state,
            guard=guard,
            metrics=metrics,
            basis=basis,
            comm=open_comm_time(config, groups) if config.log.comm_time else comm_time.Untimed(),
            asked_to_stop=asked_to_stop,
            started_s=started_s,
        )
        watch.opened(run)
        opened.pop_all()
    return run


def basis_of(config: RunConfig, place: Place, state: TrainState, peak: Peak) -> Basis:
    """What the rates of a run that goes on from ``state`` are computed from."""
    length = config.data.seq_length_tokens
    read = tokens_read(state.segments, state.consumed_samples) if state.segments else 0
    return Basis(
        world_size=place.world_size,
        seq_length=length,
        flops_per_token=flops_per_token(config.model, length, adapter=config.adapter),
        peak_tflops=peak.tflops,
        total_steps=config.train.steps,
        other_tokens=read - state.consumed_samples * length if read else 0,
    )


def open_feed(config: RunConfig, groups: Groups, resumed: Resumed, method: Method) -> Feed:
    """The method's feed; what it says about the data joins ``resumed.changed``."""
    feed = method.feed(config, groups, resumed.state)
    resumed.changed.extend(feed.notices)
    return feed


def check_feed(objectives: Sequence[Objective], feed: Feed) -> None:
    """Raises UserError if the data lacks a column or a fact that one of the objectives reads."""
    missing = [name for objective in objectives for name in objective.reads if name not in feed.offers]
    if missing:
        offered = ", ".join(feed.offers) or "none"
        raise UserError(f"the data has no column {missing[0]!r}, which the objective reads; it has {offered}")


def open_comm_time(config: RunConfig, groups: Groups) -> comm_time.CommTime:
    """Measures a message of the size that pipeline stages exchange; every process calls this."""
    shards = groups.mesh.cp * (groups.mesh.tp if groups.mesh.sequence_parallel else 1)
    rows = config.train.micro_batch_size * config.data.seq_length_tokens // shards
    return comm_time.open_comm_time(groups, rows * config.model.hidden_size * dtype_of(config.train.precision).itemsize)


def new_adapters(config: RunConfig, models: Models) -> Resumed:
    """Where a run of adapters begins: at random ones, or at those in ``adapter.load``."""
    engine, path = models[POLICY], config.adapter.load if config.adapter is not None else None
    origin = f"adapters of the model in {config.checkpoint.load}"
    said: list[str] = []
    assert isinstance(engine, Engine)
    if path is not None:
        load_adapters(path, engine.network)
        said = made_for_another(path, str(config.checkpoint.load))
    engine.optimizer.reload_model_params()  # of adapters, and of weights that are trained whole
    return Resumed(TrainState(), origin + (f", from {path}" if path else ""), said)


def made_for_another(path: str, base: str) -> list[str]:
    """What is to be said of adapters in a PEFT folder whose file names another model than the one that they are put on.
    The name may be that of the same model elsewhere, so it is no mistake for sure."""
    named = PeftFolder(path).base if is_peft_folder(path) else None
    if named is None or Path(named).resolve() == Path(base).resolve():
        return []
    return [f"adapter.load = {path} names the model {named}, and checkpoint.load is {base}"]


def restored(
    config: RunConfig, models: Models, store: CheckpointStore, watch: Watch, said: Sequence[str] = ()
) -> Resumed:
    """Restores the nearest state, on the frozen weights if adapters are trained. said: what else has changed."""
    of_base = load_frozen(config, models)
    found = watch.restore(models) or resume(config, models, store)
    return replace(found, changed=[*found.changed, *of_base, *said])


def load_frozen(config: RunConfig, models: Models) -> list[str]:
    """Loads the weights under the policy's adapters, if it has any, from ``checkpoint.load``. Returns what is to be
    said of them."""
    network, path = network_of(models[POLICY]), config.checkpoint.load
    if network.base is None:
        return []
    if path is None:
        raise UserError(NO_BASE)
    if is_hf_folder(path):
        unused = load_base(path, network)
        said = changed_model(hf_config_to_model(read_hf_config(path)), config.model)
        return said + unused
    if config.checkpoint.verify:
        refuse_damaged(path, network.groups)
    load_base(path, network)
    return changed_model(read_config(find_checkpoint(path)).model, config.model)


def resume(config: RunConfig, models: Models, store: CheckpointStore) -> Resumed:
    """Loads the run's newest checkpoint, else ``checkpoint.load`` (ours or a Hugging Face folder), else nothing."""
    latest, passed_over = store.latest()
    changed: list[str] = []
    if latest is not None:
        state = load_checkpoint(latest, models, changed=changed.extend)
        saved = read_config(latest)
        changed += changed_since(saved, config, state)
        if state.step:
            changed += changed_without_effect(saved, config)
        return Resumed(state, "; ".join([f"resumed from {latest}", *passed_over]), changed)
    if config.checkpoint.load is None:
        return Resumed(TrainState(), "new run")
    if config.adapter is not None:
        return new_adapters(config, models)
    if is_hf_folder(config.checkpoint.load):
        engine = models[POLICY]
        said = load_hf_weights(config.checkpoint.load, engine.models)
        assert isinstance(engine, Engine)
        engine.optimizer.reload_model_params()
        changed += changed_model(hf_config_to_model(read_hf_config(config.checkpoint.load)), config.model)
        changed += said
        return Resumed(TrainState(), f"weights from Hugging Face folder {config.checkpoint.load}", changed)
    saved = read_config(find_checkpoint(config.checkpoint.load))
    if config.model.value_head and not saved.model.value_head:
        engine = models[POLICY]
        assert isinstance(engine, Engine)
        if config.checkpoint.verify:
            refuse_damaged(config.checkpoint.load, store.groups)
        load_trunk(config.checkpoint.load, engine.network)
        engine.optimizer.reload_model_params()
        changed += changed_model(saved.model, config.model)
        return Resumed(TrainState(), f"weights from {config.checkpoint.load} under a new value head", changed)
    with_optimizer = config.checkpoint.load_optimizer
    if config.checkpoint.verify:
        refuse_damaged(config.checkpoint.load, store.groups)
    state = load_checkpoint(config.checkpoint.load, models, load_optimizer=with_optimizer, changed=changed.extend)
    changed += changed_since(saved, config, state) if state.step else changed_model(saved.model, config.model)
    return Resumed(state, f"{'state' if with_optimizer else 'weights'} from {config.checkpoint.load}", changed)


def changed_since(saved: RunConfig, config: RunConfig, state: TrainState) -> list[str]:
    """What differs from the run that saved ``state``, which learns how samples were drawn if it does not say so."""
    if not state.segments and saved.data.train:
        state.segments = (Segment.of(saved.data, saved.seed),)
    return changed_fields(saved, config, state.step) + changed_tokenizer(saved, config)


def describe(config: RunConfig, layout: Layout, groups: Groups, resumed: Resumed, peak: Peak) -> list[str]:
    """What the console says before the first step."""
    differs = [f"changed since the state was saved: {change}" for change in resumed.changed]
    count = parameter_count(config.model)
    platform, train = groups.platform, config.train
    trained = ""
    if config.adapter is not None:
        trained = f" frozen and {adapter_parameters(config.model, config.adapter) / 1e6:,.2f} M in adapters"
    tokens = train.global_batch_size * config.data.seq_length_tokens
    return [
        f"{layout.world_size} x {platform.device_name} ({platform.backend}), {layout.describe()}",
        f"{count.total / 1e6:,.1f} M parameters{trained}, {train.precision}, vocabulary {config.model.vocab_size}",
        f"global batch {train.global_batch_size} samples = {tokens:,} tokens, {train.steps:,} steps; {resumed.origin}",
        *differs,
        *([DETERMINISTIC] if config.kernels.deterministic else []),
        f"run folder {config.run_dir}; MFU ({CONVENTIONS['model']}): {peak.describe()}",
    ]
