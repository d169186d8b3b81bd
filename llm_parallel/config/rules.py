"""What ties fields of the configuration together, checked before any process starts.

Every refusal names the fields and their values and carries a change that removes it, so that the message can say what
to write. A fix may uncover another rule's refusal; following the fixes always ends in a configuration that works.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from llm_parallel.config.tree import RunConfig
from llm_parallel.errors import UserError

WORLD_SIZE = "world_size"
"""Key of a fix that changes the number of processes instead of a field."""


@dataclass(frozen=True)
class Problem:
    """One refusal."""

    fields: tuple[str, ...]
    """Dotted names of the fields that do not fit together."""
    statement: str
    """What does not fit, with values; a clause without a full stop."""
    fix: dict[str, Any]
    """Values by dotted name (or ``WORLD_SIZE``) that remove the refusal."""

    @property
    def message(self) -> str:
        """The statement and the fix in one sentence."""
        return f"{self.statement}; use " + " and ".join(
            f"{value} processes" if name == WORLD_SIZE else f"{name}={_as_override(value)}"
            for name, value in self.fix.items()
        )


@dataclass(frozen=True)
class Case:
    """A configuration and where it is to run."""

    config: RunConfig
    world_size: int | None
    device: Literal["cpu", "cuda"]

    @property
    def model_size(self) -> int:
        """Processes of one replica of the model."""
        parallel = self.config.parallel
        return parallel.tp * parallel.pp * parallel.cp

    @property
    def dp(self) -> int:
        """Data-parallel replicas; at least 1, also where the number of processes does not fit."""
        return self.config.parallel.dp or max(1, (self.world_size or 0) // self.model_size)

    @property
    def sequence_parallel(self) -> bool:
        """Whether sequence parallelism is on, by the default too."""
        parallel = self.config.parallel
        return parallel.tp > 1 if parallel.sequence_parallel is None else parallel.sequence_parallel

    @property
    def sequence_unit(self) -> int:
        """Number that the tokens of a sample must be a multiple of."""
        tp, cp = self.config.parallel.tp, self.config.parallel.cp
        return math.lcm(2 * cp if cp > 1 else 1, cp * tp if self.sequence_parallel else 1)

    @property
    def batch_unit(self) -> int:
        """Number that every global batch size must be a multiple of."""
        parallel = self.config.parallel
        interleaved = parallel.pp if parallel.vpp > 1 else 1
        return self.config.train.micro_batch_size * self.dp * interleaved


def num_processes(config: RunConfig) -> int:
    """Processes that a run of this configuration needs; one replica where ``parallel.dp`` is left open."""
    parallel = config.parallel
    return (parallel.dp or 1) * parallel.tp * parallel.pp * parallel.cp


def check_config(config: RunConfig, world_size: int | None, device: Literal["cpu", "cuda"]) -> None:
    """Checks every rule; ``world_size`` is the number of processes if it is already known.

    Raises UserError with one sentence per broken rule, each naming the fields, their values and a value that works.
    """
    problems = find_problems(config, world_size, device)
    if problems:
        raise UserError("\n".join(problem.message for problem in problems))


def find_problems(config: RunConfig, world_size: int | None, device: Literal["cpu", "cuda"]) -> list[Problem]:
    """All broken rules, in the order of ``RULES``."""
    case = Case(config, world_size, device)
    return [problem for rule in RULES for problem in rule(case)]


def check_inputs(config: RunConfig) -> None:
    """Checks that the files of ``data`` and ``checkpoint.load`` are there.

    Raises UserError that names each field whose file is missing.
    """
    missing = []
    if not config.data.train:
        missing.append("data.train is empty; give the prefix of a .bin/.idx pair that `llm-parallel prepare` wrote")
    for split, sources in (("train", config.data.train), ("eval", config.data.eval)):
        for index, source in enumerate(sources):
            for ending in (".bin", ".idx"):
                if not Path(source.path + ending).is_file():
                    hint = "the prefix without .bin or .idx" if source.path.endswith((".bin", ".idx")) else "the prefix"
                    missing.append(
                        f"data.{split}.{index}.path = {source.path}: {source.path + ending} does not exist; give {hint}"
                        " of a .bin/.idx pair"
                    )
                    break
    for name, path in (("data.tokenizer", config.data.tokenizer), ("checkpoint.load", config.checkpoint.load)):
        if path is not None and not Path(path).exists():
            missing.append(f"{name} = {path} does not exist; give the path of one that does")
    if missing:
        raise UserError("\n".join(missing))


def _heads(case: Case) -> Iterator[Problem]:
    model = case.config.model
    heads, groups = model.num_attention_heads, model.num_query_groups
    if heads % groups:
        nearest = _nearest(groups, _divisors(heads))
        yield Problem(
            ("model.num_query_groups", "model.num_attention_heads"),
            f"model.num_query_groups = {groups} does not divide model.num_attention_heads = {heads}",
            {"model.num_query_groups": nearest},
        )
    if model.head_dim is None and model.hidden_size % heads:
        yield Problem(
            ("model.hidden_size", "model.num_attention_heads"),
            f"model.hidden_size = {model.hidden_size} is not divisible by model.num_attention_heads = {heads}",
            {"model.hidden_size": _multiple(model.hidden_size, 2 * heads)},
        )
    elif model.kv_channels % 2:
        fix = (
            {"model.head_dim": model.head_dim + 1}
            if model.head_dim
            else {"model.hidden_size": model.hidden_size + heads}
        )
        yield Problem(
            ("model.head_dim", "model.hidden_size", "model.num_attention_heads"),
            f"model.head_dim = {model.kv_channels} is odd (model.hidden_size = {model.hidden_size},"
            f" model.num_attention_heads = {heads}), and rotary positions turn pairs of channels",
            fix,
        )


def _tp_obstacles(config: RunConfig, tp: int) -> dict[str, str]:
    """Model fields that ``tp`` does not fit, with the clause that says so."""
    model = config.model
    heads, groups, ffn = model.num_attention_heads, model.num_query_groups, model.ffn_hidden_size
    obstacles = {}
    if heads % tp:
        obstacles["model.num_attention_heads"] = f"does not divide model.num_attention_heads = {heads}"
    if groups % tp and tp % groups:
        obstacles["model.num_query_groups"] = f"neither divides nor is a multiple of model.num_query_groups = {groups}"
    if ffn % tp:
        obstacles["model.ffn_hidden_size"] = f"does not divide model.ffn_hidden_size = {ffn}"
    if not obstacles and 2 * groups * model.kv_channels % tp:  # keys and values of one matrix, cut by column
        obstacles["model.head_dim"] = (
            f"does not divide the {2 * groups * model.kv_channels} key and value channels of model.num_query_groups ="
            f" {groups} and model.head_dim = {model.kv_channels}"
        )
    return obstacles


def _tensor_parallel(case: Case) -> Iterator[Problem]:
    config, parallel = case.config, case.config.parallel
    obstacles = _tp_obstacles(config, parallel.tp)
    if obstacles:
        heads = config.model.num_attention_heads
        working = [tp for tp in _divisors(heads) if not _tp_obstacles(config, tp)]
        rest = parallel.pp * parallel.cp
        fitting = [tp for tp in working if case.world_size and case.world_size % (tp * rest) == 0]
        tp = _nearest(parallel.tp, fitting or working)
        fix: dict[str, Any] = {"parallel.tp": tp}
        if tp == 1 and parallel.sequence_parallel:
            fix["parallel.sequence_parallel"] = None
        for name, clause in obstacles.items():
            yield Problem((name, "parallel.tp"), f"parallel.tp = {parallel.tp} {clause}", fix)
    if parallel.sequence_parallel and parallel.tp == 1:
        yield Problem(
            ("parallel.sequence_parallel", "parallel.tp"),
            "parallel.sequence_parallel = true divides the sequence over a tensor-parallel group, and parallel.tp = 1",
            {"parallel.sequence_parallel": None},
        )


def _pipeline(case: Case) -> Iterator[Problem]:
    parallel, layers = case.config.parallel, case.config.model.num_layers
    chunks = parallel.pp * parallel.vpp
    if parallel.vpp > 1 and parallel.pp == 1:
        fix: dict[str, Any] = {"parallel.vpp": 1} | ({"parallel.stage_layers": None} if parallel.stage_layers else {})
        statement = f"parallel.vpp = {parallel.vpp} interleaves the chunks of a pipeline, and parallel.pp = 1"
        yield Problem(("parallel.vpp", "parallel.pp"), statement, fix)
        return
    sizes = f"parallel.pp = {parallel.pp}" + (f" times parallel.vpp = {parallel.vpp}" if parallel.vpp > 1 else "")
    size_fields = ("parallel.pp", "parallel.vpp") if parallel.vpp > 1 else ("parallel.pp",)
    if layers < chunks:
        statement = f"model.num_layers = {layers} is less than {sizes} model chunks"
        yield Problem(("model.num_layers", *size_fields), statement, _smaller_pipeline(case))
    elif parallel.stage_layers is None:
        if layers % chunks:
            yield Problem(
                ("model.num_layers", *size_fields),
                f"model.num_layers = {layers} is not divisible by {sizes}",
                {"parallel.stage_layers": _balanced(layers, chunks)},
            )
    elif len(parallel.stage_layers) != chunks or sum(parallel.stage_layers) != layers:
        given = parallel.stage_layers
        even = layers % chunks == 0
        if len(given) != chunks:
            statement = f"parallel.stage_layers has {len(given)} entries, and {sizes} needs {chunks}"
            fields: tuple[str, ...] = ("parallel.stage_layers", *size_fields)
        else:
            statement = f"parallel.stage_layers adds up to {sum(given)} layers, and model.num_layers = {layers}"
            fields = ("parallel.stage_layers", "model.num_layers")
        yield Problem(fields, statement, {"parallel.stage_layers": None if even else _balanced(layers, chunks)})


def _smaller_pipeline(case: Case) -> dict[str, Any]:
    """The change of pp and vpp that leaves no more model chunks than layers."""
    parallel, layers = case.config.parallel, case.config.model.num_layers
    pp = max(size for size in _divisors(parallel.pp) if size <= layers)
    vpp = min(parallel.vpp, layers // pp) if pp > 1 else 1
    stage_layers = None if layers % (pp * vpp) == 0 else _balanced(layers, pp * vpp)
    wanted = {"parallel.pp": pp, "parallel.vpp": vpp, "parallel.stage_layers": stage_layers}
    return {name: value for name, value in wanted.items() if value != getattr(parallel, name.partition(".")[2])}


def _recompute(case: Case) -> Iterator[Problem]:
    parallel, layers = case.config.parallel, case.config.model.num_layers
    chunks = parallel.pp * parallel.vpp
    stages = parallel.stage_layers or (layers // chunks,) * chunks
    group = parallel.recompute_num_layers
    if parallel.recompute != "full" or parallel.recompute_method != "uniform" or sum(stages) != layers:
        return
    bad = [size for size in stages if size % group]
    if bad:
        yield Problem(
            ("parallel.recompute_num_layers", "parallel.stage_layers"),
            f"parallel.recompute_num_layers = {group} does not divide the {bad[0]} layers of a model chunk"
            f" (model.num_layers = {layers}, parallel.pp = {parallel.pp}, parallel.vpp = {parallel.vpp})",
            {"parallel.recompute_num_layers": _nearest(group, _divisors(math.gcd(*stages)))},
        )


def _sequence(case: Case) -> Iterator[Problem]:
    parallel, unit = case.config.parallel, case.sequence_unit
    seq, longest = case.config.data.seq_length_tokens, case.config.model.max_seq_length_tokens
    fits = seq % unit == 0
    if not fits:
        sharers = [f"parallel.cp = {parallel.cp}"] if parallel.cp > 1 else []
        sharers += [f"parallel.tp = {parallel.tp} with sequence parallelism"] if case.sequence_parallel else []
        up, down = -(-seq // unit) * unit, seq // unit * unit
        fix = {"data.seq_length_tokens": up if up <= longest or not down else down}
        if fix["data.seq_length_tokens"] > longest:
            fix["model.max_seq_length_tokens"] = fix["data.seq_length_tokens"]
        yield Problem(
            ("data.seq_length_tokens", "parallel.cp" if parallel.cp > 1 else "parallel.tp"),
            f"data.seq_length_tokens = {seq} is not a multiple of {unit}, which {' and '.join(sharers)} needs",
            fix,
        )
    if seq > longest:
        down = longest // unit * unit
        fix = {"data.seq_length_tokens": down} if down else {"model.max_seq_length_tokens": seq}
        yield Problem(
            ("data.seq_length_tokens", "model.max_seq_length_tokens"),
            f"data.seq_length_tokens = {seq} is over model.max_seq_length_tokens = {longest}",
            fix,
        )


def _processes(case: Case) -> Iterator[Problem]:
    parallel, world = case.config.parallel, case.world_size
    if world is None:
        return
    sizes = f"parallel.tp = {parallel.tp} times parallel.pp = {parallel.pp} times parallel.cp = {parallel.cp}"
    fields = ("parallel.tp", "parallel.pp", "parallel.cp")
    if parallel.dp and parallel.dp * case.model_size != world:
        fits = world % case.model_size == 0
        yield Problem(
            ("parallel.dp", *fields),
            f"parallel.dp = {parallel.dp} times {sizes} is {parallel.dp * case.model_size}, and there are"
            f" {world} processes",
            {"parallel.dp": world // case.model_size} if fits else {WORLD_SIZE: parallel.dp * case.model_size},
        )
    elif world % case.model_size:
        yield Problem(
            fields,
            f"{sizes} is {case.model_size}, which does not divide the {world} processes",
            {WORLD_SIZE: max(world // case.model_size, 1) * case.model_size},
        )


def _batch(case: Case) -> Iterator[Problem]:
    train, parallel = case.config.train, case.config.parallel
    samples = train.micro_batch_size * case.dp
    size = train.global_batch_size
    fix = {"train.global_batch_size": -(-size // case.batch_unit) * case.batch_unit}
    replicas = f"train.micro_batch_size = {train.micro_batch_size} times parallel.dp = {case.dp}"
    if size % samples:
        statement = f"train.global_batch_size = {size} is not divisible by {replicas}"
        yield Problem(("train.global_batch_size", "train.micro_batch_size", "parallel.dp"), statement, fix)
    elif size % case.batch_unit:  # megatron-core's interleaved schedule runs micro batches in groups of pp
        yield Problem(
            ("train.global_batch_size", "parallel.pp", "parallel.vpp"),
            f"train.global_batch_size = {size} makes {size // samples} micro batches ({replicas}), not a multiple of"
            f" parallel.pp = {parallel.pp} as parallel.vpp = {parallel.vpp} needs",
            fix,
        )


def _rampup(case: Case) -> Iterator[Problem]:
    train, unit = case.config.train, case.batch_unit
    ramp, end = train.rampup, train.global_batch_size
    if ramp is None or end % unit:
        return
    start = min(max(ramp.start // unit * unit, unit), end)
    steps = [unit * count for count in _divisors((end - start) // unit)] if start < end else []
    increment = _nearest(ramp.increment, steps) if steps else ramp.increment
    fix: dict[str, Any] = {"train.rampup.start": start, "train.rampup.increment": increment}
    if start == end != ramp.start:
        fix = {"train.rampup": None}
    fix = {name: value for name, value in fix.items() if value != _value(case.config, name)}
    if not fix:
        return
    if ramp.start > end:
        fields: tuple[str, ...] = ("train.rampup.start", "train.global_batch_size")
        statement = f"train.rampup.start = {ramp.start} is over train.global_batch_size = {end}"
    elif ramp.start % unit or (ramp.increment % unit and ramp.start < end):
        fields = ("train.rampup.start", "train.rampup.increment", "train.micro_batch_size", "parallel.dp")
        statement = (
            f"train.rampup.start = {ramp.start} and train.rampup.increment = {ramp.increment} are not both multiples of"
            f" {unit}, the smallest batch of train.micro_batch_size = {train.micro_batch_size}, parallel.dp = {case.dp}"
        )
        if case.config.parallel.vpp > 1:
            statement += f" and parallel.pp = {case.config.parallel.pp} with parallel.vpp"
    else:
        fields = ("train.rampup.increment", "train.rampup.start", "train.global_batch_size")
        statement = (
            f"train.rampup.increment = {ramp.increment} does not lead from train.rampup.start = {ramp.start} to"
            f" train.global_batch_size = {end} in whole steps"
        )
    yield Problem(fields, statement, fix)


def _schedule(case: Case) -> Iterator[Problem]:
    optim, steps = case.config.optim, case.config.train.steps
    warmup, decay = optim.warmup_steps, optim.decay_steps
    if optim.min_lr > optim.lr and optim.schedule != "constant":
        statement = f"optim.min_lr = {optim.min_lr} is over optim.lr = {optim.lr}"
        yield Problem(("optim.min_lr", "optim.lr"), statement, {"optim.min_lr": optim.lr / 10})
    if optim.schedule == "wsd":
        length = decay or max(1, steps // 10)
        if warmup + length > steps:
            given = f"optim.decay_steps = {length}" + ("" if decay else " (a tenth of the run)")
            working = {"optim.decay_steps": length if length <= steps else max(1, steps // 10)}
            working["optim.warmup_steps"] = min(warmup, steps - working["optim.decay_steps"])
            changed = {"optim.decay_steps": length, "optim.warmup_steps": warmup}
            yield Problem(
                ("optim.warmup_steps", "optim.decay_steps", "train.steps"),
                f"optim.warmup_steps = {warmup} and {given} do not fit into train.steps = {steps}",
                {name: value for name, value in working.items() if value != changed[name]},
            )
        return
    if warmup > steps:
        statement = f"optim.warmup_steps = {warmup} is over train.steps = {steps}"
        end = min(steps, decay or steps)
        yield Problem(("optim.warmup_steps", "train.steps"), statement, {"optim.warmup_steps": end // 10})
    elif optim.schedule != "constant" and warmup >= (decay or steps):
        name = "optim.decay_steps" if decay else "train.steps"
        statement = f"optim.warmup_steps = {warmup} leaves no step to decay before {name} = {decay or steps}"
        yield Problem(("optim.warmup_steps", name), statement, {"optim.warmup_steps": (decay or steps) // 10})


def _intervals(case: Case) -> Iterator[Problem]:
    config = case.config
    every, interval = config.checkpoint.keep_every_steps, config.checkpoint.interval_steps
    if every is not None and interval is None:
        yield Problem(
            ("checkpoint.keep_every_steps", "checkpoint.interval_steps"),
            f"checkpoint.keep_every_steps = {every} keeps nothing while checkpoint.interval_steps is not given",
            {"checkpoint.interval_steps": every},
        )
    elif every is not None and interval is not None and every % interval:
        yield Problem(
            ("checkpoint.keep_every_steps", "checkpoint.interval_steps"),
            f"checkpoint.keep_every_steps = {every} is not a multiple of checkpoint.interval_steps = {interval}",
            {"checkpoint.keep_every_steps": -(-every // interval) * interval},
        )
    if config.train.eval_interval_steps and not config.data.eval and not config.data.eval_fraction:
        yield Problem(
            ("train.eval_interval_steps", "data.eval", "data.eval_fraction"),
            f"train.eval_interval_steps = {config.train.eval_interval_steps} has nothing to evaluate on: data.eval is"
            " empty and data.eval_fraction = 0",
            {"data.eval_fraction": 0.01},
        )
    guard = config.train.guard
    if guard.spike_zscore is not None and guard.spike_min_steps > guard.spike_window_steps:
        yield Problem(
            ("train.guard.spike_min_steps", "train.guard.spike_window_steps"),
            f"train.guard.spike_min_steps = {guard.spike_min_steps} is over train.guard.spike_window_steps ="
            f" {guard.spike_window_steps}, so that spike detection would never begin",
            {"train.guard.spike_min_steps": guard.spike_window_steps},
        )


def _machine(case: Case) -> Iterator[Problem]:
    config = case.config
    if config.device == "cuda" and case.device == "cpu":
        statement = "device = cuda, and no CUDA device is available here"
        yield Problem(("device",), statement, {"device": "auto"})
    if config.optim.implementation == "apex" and case.device == "cpu":
        statement = "optim.implementation = apex runs on CUDA only, and the run's device is cpu"
        yield Problem(("optim.implementation", "device"), statement, {"optim.implementation": "auto"})
    if config.model.vocab_size is None and config.data.tokenizer is None:
        yield Problem(
            ("model.vocab_size", "data.tokenizer"),
            "neither data.tokenizer, whose words would be counted, nor model.vocab_size is given",
            {"model.vocab_size": 32000},
        )


RULES: tuple[Callable[[Case], Iterator[Problem]], ...] = (
    _heads,
    _tensor_parallel,
    _pipeline,
    _recompute,
    _sequence,
    _processes,
    _batch,
    _rampup,
    _schedule,
    _intervals,
    _machine,
)


def _divisors(number: int) -> list[int]:
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def _nearest(value: int, options: list[int]) -> int:
    """The option nearest to ``value``, the smaller of two."""
    return min(options, key=lambda option: (abs(option - value), option))


def _multiple(value: int, unit: int) -> int:
    """The positive multiple of ``unit`` nearest to ``value``."""
    return max(round(value / unit), 1) * unit


def _balanced(layers: int, chunks: int) -> list[int]:
    """Layers of each chunk, as even as can be; the last and then the first, which have the output projection and the
    embedding besides, get the fewer."""
    order = [*range(1, chunks - 1), 0, chunks - 1]
    sizes = [layers // chunks] * chunks
    for index in order[: layers % chunks]:
        sizes[index] += 1
    return sizes


def _value(config: RunConfig, name: str) -> Any:
    node: Any = config
    for part in name.split("."):
        node = getattr(node, part)
    return node


def _as_override(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).partition("\n")[0].replace(" ", "")
