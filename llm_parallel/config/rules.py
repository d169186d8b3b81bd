"""Rules between fields of the configuration, checked before any process starts.

Every problem names the fields and their values and carries a fix, so that the message can say what to write. A fix may
make another rule fail; following the fixes always ends in a configuration that works.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from llm_parallel.config import rules_layout, rules_method, rules_rounds
from llm_parallel.config.problem import Case, Problem, divisors, nearest
from llm_parallel.config.tree import OptimConfig, RunConfig
from llm_parallel.errors import UserError

NO_BASE = (
    "adapter is given, and checkpoint.load, which names the model that adapters are trained for, is not; give it a "
    "Hugging Face folder or a checkpoint"
)


def num_processes(config: RunConfig) -> int:
    """Processes that a run of this configuration needs; one replica where ``parallel.dp`` is left open."""
    parallel = config.parallel
    return (parallel.dp or 1) * parallel.tp * parallel.pp * parallel.cp


def check_config(
    config: RunConfig, world_size: int | None, device: Literal["cpu", "cuda"], *, uneven: bool = False
) -> None:
    """Checks every rule; ``world_size`` is the number of processes if it is already known. ``uneven``: replicas may
    have different numbers of micro batches, as after the loss of some.

    Raises UserError with one sentence per broken rule, each naming the fields, their values and a value that works.
    """
    problems = find_problems(config, world_size, device, uneven=uneven)
    if problems:
        raise UserError("\n".join(problem.message for problem in problems))


def find_problems(
    config: RunConfig, world_size: int | None, device: Literal["cpu", "cuda"], *, uneven: bool = False
) -> list[Problem]:
    """All broken rules, in the order of ``RULES``."""
    case = Case(config, world_size, device)
    # The interleaved schedule runs whole groups of micro batches, so there is no uneven division for it.
    if uneven and config.parallel.vpp == 1:
        rules = [rule for rule in RULES if rule not in (_batch, _rampup)] + [_enough_batch]
    else:
        rules = list(RULES)
    return [problem for rule in rules for problem in rule(case)]


def check_model(config: RunConfig) -> None:
    """Checks the rules of the model alone, as for one that was read from a folder. Raises UserError."""
    case = Case(config, 1, "cpu")
    problems = [problem for rule in MODEL_RULES for problem in rule(case)]
    if problems:
        raise UserError("\n".join(problem.statement for problem in problems))


def check_layout(config: RunConfig, world_size: int) -> None:
    """Checks the rules of the model and of how ``world_size`` processes divide it, without those of training. Raises
    UserError."""
    case = Case(config, world_size, "cpu")
    problems = [problem for rule in LAYOUT_RULES for problem in rule(case)]
    if problems:
        raise UserError("\n".join(problem.message for problem in problems))


def _near(prefix: Path) -> str:
    """Token files beside a prefix that are called much as it is, as the end of a sentence."""
    found = get_close_matches(prefix.name, [path.stem for path in prefix.parent.glob("*.idx")], 1)
    return f", such as {prefix.parent / found[0]}" if found else ""


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
                        f" of a .bin/.idx pair{_near(Path(source.path))}"
                    )
                    break
    _refuse_missing(config, missing)


def check_chat_inputs(config: RunConfig) -> None:
    """Checks that the files of ``chat``, ``data.tokenizer`` and ``checkpoint.load``, and the other models of the run's
    method, are there.

    Raises UserError that names each field whose file is missing."""
    missing = []
    what, command = ("preferences", "prefer") if config.prefers else ("conversations", "sft")
    if config.collects:
        what, command = "prompts", "prefer"
    if not config.chat.train:
        missing.append(f"chat.train is empty; give at least one file of {what}")
    if config.data.train:
        missing.append(
            f"data.train names token files, which `llm-parallel {command}` does not read; give chat.train {what}, or "
            "use `llm-parallel pretrain`"
        )
    if (config.prefers or config.collects) and config.checkpoint.load is None:
        missing.append(
            "checkpoint.load, which names the model whose answers are to become better, is not given; give it a run "
            "of `llm-parallel sft` or a Hugging Face folder"
        )
    for split, sources in (("train", config.chat.train), ("eval", config.chat.eval)):
        for index, source in enumerate(sources):
            if not Path(source.path).exists():
                missing.append(
                    f"chat.{split}.{index}.path = {source.path} does not exist; give a file of {what}, or a folder of "
                    "such files"
                )
    if config.data.tokenizer is None:
        missing.append(
            "data.tokenizer is not given, and checkpoint.load names no folder that has one; give the tokenizer of the "
            "model"
        )
    _refuse_missing(config, missing)


def _refuse_missing(config: RunConfig, missing: list[str]) -> None:
    if config.adapter is not None and config.checkpoint.load is None:
        missing.append(NO_BASE)
    of_adapter = config.adapter.load if config.adapter is not None else None
    for name, path in (
        ("data.tokenizer", config.data.tokenizer),
        ("checkpoint.load", config.checkpoint.load),
        ("adapter.load", of_adapter),
        ("method.reference.load", config.method.reference.load),
        *rules_rounds.models_beside(config),
    ):
        if path is not None and not Path(path).exists():
            missing.append(f"{name} = {path} does not exist; give the path of one that does")
    if missing:
        raise UserError("\n".join(missing))


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


def _enough_batch(case: Case) -> Iterator[Problem]:
    train = case.config.train
    smallest = min(train.global_batch_size, train.rampup.start if train.rampup else train.global_batch_size)
    if train.global_batch_size % train.micro_batch_size:
        yield Problem(
            ("train.global_batch_size", "train.micro_batch_size"),
            f"train.global_batch_size = {train.global_batch_size} is not a multiple of train.micro_batch_size ="
            f" {train.micro_batch_size}",
            {"train.micro_batch_size": nearest(train.micro_batch_size, divisors(train.global_batch_size))},
        )
    elif smallest < train.micro_batch_size * case.dp:
        yield Problem(
            ("train.global_batch_size", "train.micro_batch_size", "parallel.dp"),
            f"a batch of {smallest} samples leaves some of parallel.dp = {case.dp} replicas without a micro batch",
            {"parallel.dp": max(1, smallest // train.micro_batch_size)},
        )


def _rampup(case: Case) -> Iterator[Problem]:
    train, unit = case.config.train, case.batch_unit
    ramp, end = train.rampup, train.global_batch_size
    if ramp is None or end % unit:
        return
    start = min(max(ramp.start // unit * unit, unit), end)
    steps = [unit * count for count in divisors((end - start) // unit)] if start < end else []
    increment = nearest(ramp.increment, steps) if steps else ramp.increment
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
    warmup, decay = optim.warmup(steps), optim.decay_steps
    if optim.min_lr > optim.lr and optim.schedule != "constant":
        statement = f"optim.min_lr = {optim.min_lr} is over optim.lr = {optim.lr}"
        yield Problem(("optim.min_lr", "optim.lr"), statement, {"optim.min_lr": float(f"{optim.lr / 10:.3g}")})
    if optim.warmup_fraction is not None:
        yield from _warmup_fraction(optim, steps)
        return
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


def _warmup_fraction(optim: OptimConfig, steps: int) -> Iterator[Problem]:
    fraction, warmup = optim.warmup_fraction, optim.warmup(steps)
    if optim.warmup_steps:
        statement = (
            f"optim.warmup_fraction = {fraction} and optim.warmup_steps = {optim.warmup_steps} both say how long"
        )
        fields = ("optim.warmup_fraction", "optim.warmup_steps")
        yield Problem(fields, f"{statement} warm-up is", {"optim.warmup_steps": 0})
    decay = optim.decay_steps or (max(1, steps // 10) if optim.schedule == "wsd" else steps)
    room = {"constant": steps, "wsd": steps - decay}.get(optim.schedule, decay - 1)
    if warmup > room:
        statement = f"optim.warmup_fraction = {fraction} makes {warmup} steps, which leave none to decay"
        fix = {"optim.warmup_fraction": 0.0}
        yield Problem(("optim.warmup_fraction", "optim.decay_steps", "train.steps"), statement, fix)


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
    yield from _evaluations(config)
    guard = config.train.guard
    if guard.spike_zscore is not None and guard.spike_min_steps > guard.spike_window_steps:
        yield Problem(
            ("train.guard.spike_min_steps", "train.guard.spike_window_steps"),
            f"train.guard.spike_min_steps = {guard.spike_min_steps} is over train.guard.spike_window_steps ="
            f" {guard.spike_window_steps}, so that spike detection would never begin",
            {"train.guard.spike_min_steps": guard.spike_window_steps},
        )


def _evaluations(config: RunConfig) -> Iterator[Problem]:
    interval, patience = config.train.eval_interval_steps, config.train.early_stop_evaluations
    name, held = ("chat", config.chat) if config.reads_chat else ("data", config.data)
    if interval and not held.eval and not held.eval_fraction:
        yield Problem(
            ("train.eval_interval_steps", f"{name}.eval", f"{name}.eval_fraction"),
            f"train.eval_interval_steps = {interval} has nothing to evaluate on: {name}.eval is empty and"
            f" {name}.eval_fraction = 0",
            {f"{name}.eval_fraction": 0.01},
        )
    if patience and not interval:
        yield Problem(
            ("train.early_stop_evaluations", "train.eval_interval_steps"),
            f"train.early_stop_evaluations = {patience} never ends a run whose only evaluation comes after its last"
            " step: train.eval_interval_steps is not given",
            {"train.eval_interval_steps": max(1, config.train.steps // 10)},
        )


def _machine(case: Case) -> Iterator[Problem]:
    config = case.config
    if config.device == "cuda" and case.device == "cpu":
        statement = "device = cuda, and no CUDA device is available here"
        yield Problem(("device",), statement, {"device": "auto"})
    if config.optim.implementation == "apex" and case.device == "cpu":
        statement = "optim.implementation = apex runs on CUDA only, and the run's device is cpu"
        yield Problem(("optim.implementation", "device"), statement, {"optim.implementation": "auto"})
    if config.optim.implementation in ("triton", "apex") and config.optim.moment_bits == 8:
        statement = f"optim.implementation = {config.optim.implementation} has no moments of optim.moment_bits = 8"
        yield Problem(("optim.implementation", "optim.moment_bits"), statement, {"optim.implementation": "auto"})
    if config.model.vocab_size is None and config.data.tokenizer is None:
        yield Problem(
            ("model.vocab_size", "data.tokenizer"),
            "neither data.tokenizer, whose tokens would be counted, nor model.vocab_size is given",
            {"model.vocab_size": 32000},
        )


def _gluon(case: Case) -> Iterator[Problem]:
    config, size = case.config, case.config.model.kv_channels
    if config.kernels.attention != "gluon":
        return
    fix = {"kernels.attention": "auto"}
    if case.device == "cpu":
        statement = "kernels.attention = gluon needs an H100 or H200, and the run's device is cpu"
        yield Problem(("kernels.attention",), statement, fix)
    if size not in (64, 128, 256):
        statement = f"kernels.attention = gluon has heads of 64, 128 and 256 channels, and model.head_dim = {size}"
        yield Problem(("kernels.attention", "model.head_dim"), statement, fix)
    if config.train.precision != "bf16":
        statement = f"kernels.attention = gluon is for bf16, and train.precision = {config.train.precision}"
        yield Problem(("kernels.attention", "train.precision"), statement, fix)
    for name in ("window_tokens", "attention_softcap"):
        if getattr(config.model, name):
            statement = f"kernels.attention = gluon does not support model.{name} = {getattr(config.model, name)}"
            yield Problem(("kernels.attention", f"model.{name}"), statement, fix)


def _deterministic(case: Case) -> Iterator[Problem]:
    config, kernels, name = case.config, case.config.kernels, "kernels.deterministic"
    if not kernels.deterministic:
        return
    if case.device == "cuda":
        statement = (
            f"{name} = true is for a CPU, whose products are known to round a row alike; the run's device is cuda"
        )
        yield Problem((name, "device"), statement, {name: False})
    for operator in ("rms_norm", "rope", "attention", "swiglu", "cross_entropy"):
        if (chosen := getattr(kernels, operator)) not in ("auto", "torch"):
            statement = f"{name} = true computes by torch, and kernels.{operator} = {chosen}"
            yield Problem((name, f"kernels.{operator}"), statement, {f"kernels.{operator}": "auto"})
    if kernels.output_loss != "separate":
        statement = f"{name} = true needs the logits of all tokens, and kernels.output_loss = {kernels.output_loss}"
        yield Problem((name, "kernels.output_loss"), statement, {"kernels.output_loss": "separate"})
    scaling = config.model.rope_scaling
    if scaling is not None and scaling.kind in ("dynamic", "longrope"):
        statement = (
            f"{name} = true, and model.rope_scaling.kind = {scaling.kind} turns keys by angles that depend on the "
            "length of the text, which training does not know token by token"
        )
        yield Problem((name, "model.rope_scaling.kind"), statement, {name: False})
    if math.gcd(config.parallel.tp, 16) > 8:
        statement = f"{name} = true has at most 8 shards of the vocabulary, and parallel.tp = {config.parallel.tp}"
        yield Problem((name, "parallel.tp"), statement, {name: False})


def _adapter(case: Case) -> Iterator[Problem]:
    adapter, model, tp = case.config.adapter, case.config.model, case.config.parallel.tp
    if adapter is not None and adapter.dora and adapter.dropout:
        statement = (
            f"adapter.dora = true multiplies whole rows, so that adapter.dropout = {adapter.dropout} has no place"
        )
        yield Problem(("adapter.dora", "adapter.dropout"), statement, {"adapter.dropout": 0.0})
    if adapter is not None and adapter.dora and case.config.kernels.deterministic:
        statement = "kernels.deterministic = true has no products with the magnitudes of adapter.dora = true"
        yield Problem(("adapter.dora", "kernels.deterministic"), statement, {"kernels.deterministic": False})
    if adapter is None or adapter.base != "nf4":
        return
    heads = model.num_attention_heads * model.kv_channels
    widths = {"model.hidden_size": model.hidden_size, "model.ffn_hidden_size": model.ffn_hidden_size // tp}
    widths["model.num_attention_heads times model.head_dim"] = heads // tp
    for name, width in widths.items():
        if width % 2:
            divided = "" if name == "model.hidden_size" else f" divided by parallel.tp = {tp}"
            yield Problem(
                ("adapter.base", "parallel.tp"),
                f"adapter.base = nf4 holds two numbers in a byte, and {name}{divided} is {width}, which is odd",
                {"adapter.base": "int8"},
            )


MODEL_RULES: tuple[Callable[[Case], Iterator[Problem]], ...] = (
    rules_layout.check_heads,
    rules_layout.check_layer_options,
    rules_layout.check_rope,
)
LAYOUT_RULES: tuple[Callable[[Case], Iterator[Problem]], ...] = (
    *MODEL_RULES,
    rules_layout.check_tensor_parallel,
    rules_layout.check_pipeline,
    rules_layout.check_processes,
)
RULES: tuple[Callable[[Case], Iterator[Problem]], ...] = (
    rules_layout.check_heads,
    rules_layout.check_layer_options,
    rules_layout.check_tensor_parallel,
    rules_layout.check_pipeline,
    rules_layout.check_recompute,
    rules_layout.check_sequence,
    rules_layout.check_processes,
    _batch,
    _rampup,
    _schedule,
    _intervals,
    _machine,
    rules_layout.check_rope,
    _gluon,
    _deterministic,
    _adapter,
    rules_method.check_method,
    rules_method.check_vocabulary_adapters,
    rules_rounds.check_rounds,
)


def _value(config: RunConfig, name: str) -> Any:
    node: Any = config
    for part in name.split("."):
        node = getattr(node, part)
    return node
