"""Rules about the model, the layout and the number of processes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from llm_parallel.config.problem import WORLD_SIZE, Case, Problem, divisors, multiple, nearest
from llm_parallel.config.tree import RunConfig


def check_heads(case: Case) -> Iterator[Problem]:
    """Heads divide the width, groups divide the heads, and a head has pairs of channels."""
    model = case.config.model
    heads, groups = model.num_attention_heads, model.num_query_groups
    if heads % groups:
        closest = nearest(groups, divisors(heads))
        yield Problem(
            ("model.num_query_groups", "model.num_attention_heads"),
            f"model.num_query_groups = {groups} does not divide model.num_attention_heads = {heads}",
            {"model.num_query_groups": closest},
        )
    if model.head_dim is None and model.hidden_size % heads:
        yield Problem(
            ("model.hidden_size", "model.num_attention_heads"),
            f"model.hidden_size = {model.hidden_size} is not divisible by model.num_attention_heads = {heads}",
            {"model.hidden_size": multiple(model.hidden_size, 2 * heads)},
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
            f" model.num_attention_heads = {heads}), and rotary embedding rotates pairs of channels",
            fix,
        )


def check_layer_options(case: Case) -> Iterator[Problem]:
    """One kind of query and key norms, and layers without rotary embedding that the model has."""
    model = case.config.model
    if model.qk_norm and model.qk_norm_over_heads:
        statement = "model.qk_norm and model.qk_norm_over_heads are both true, and a model has one of them"
        yield Problem(("model.qk_norm", "model.qk_norm_over_heads"), statement, {"model.qk_norm_over_heads": False})
    layers = model.layers_without_rope
    fitting = tuple(sorted({layer for layer in layers if layer < model.num_layers}))
    if layers != fitting:
        yield Problem(
            ("model.layers_without_rope", "model.num_layers"),
            f"model.layers_without_rope = {list(layers)} must be rising numbers of layers from 0 to"
            f" {model.num_layers - 1}, since model.num_layers = {model.num_layers}",
            {"model.layers_without_rope": list(fitting)},
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
    if model.qk_norm_over_heads and tp > groups:
        obstacles["model.qk_norm_over_heads"] = (
            f"is over model.num_query_groups = {groups}, and model.qk_norm_over_heads needs each group on one process"
        )
    if not obstacles and 2 * groups * model.kv_channels % tp:  # keys and values of one matrix, cut by column
        obstacles["model.head_dim"] = (
            f"does not divide the {2 * groups * model.kv_channels} key and value channels of model.num_query_groups ="
            f" {groups} and model.head_dim = {model.kv_channels}"
        )
    return obstacles


def check_tensor_parallel(case: Case) -> Iterator[Problem]:
    """The tensor-parallel size divides all that it cuts; key and value heads may be replicated instead."""
    config, parallel = case.config, case.config.parallel
    obstacles = _tp_obstacles(config, parallel.tp)
    if obstacles:
        heads = config.model.num_attention_heads
        working = [tp for tp in divisors(heads) if not _tp_obstacles(config, tp)]
        rest = parallel.pp * parallel.cp
        fitting = [tp for tp in working if case.world_size and case.world_size % (tp * rest) == 0]
        tp = nearest(parallel.tp, fitting or working)
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


def check_pipeline(case: Case) -> Iterator[Problem]:
    """Every model chunk has layers, and every layer one chunk."""
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
    pp = max(size for size in divisors(parallel.pp) if size <= layers)
    vpp = min(parallel.vpp, layers // pp) if pp > 1 else 1
    stage_layers = None if layers % (pp * vpp) == 0 else _balanced(layers, pp * vpp)
    wanted = {"parallel.pp": pp, "parallel.vpp": vpp, "parallel.stage_layers": stage_layers}
    return {name: value for name, value in wanted.items() if value != getattr(parallel, name.partition(".")[2])}


def check_recompute(case: Case) -> Iterator[Problem]:
    """Uniform recompute takes whole groups of a chunk's layers."""
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
            f" (model.num_layers = {layers}, parallel.pp = {parallel.pp}, parallel.vpp = {parallel.vpp},"
            f" parallel.stage_layers = {list(stages)})",
            {"parallel.recompute_num_layers": nearest(group, divisors(math.gcd(*stages)))},
        )


def check_sequence(case: Case) -> Iterator[Problem]:
    """Context and sequence parallelism cut a sample evenly, and it is no longer than the model is meant for."""
    parallel, unit = case.config.parallel, case.config.parallel.sequence_unit
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


def check_processes(case: Case) -> Iterator[Problem]:
    """The layout takes all processes."""
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


def _balanced(layers: int, chunks: int) -> list[int]:
    """Layers of each chunk, as even as possible. Where some must have fewer, these are the last chunk and then the
    first, since they also hold the output projection and the embedding."""
    order = [*range(1, chunks - 1), 0, chunks - 1]
    sizes = [layers // chunks] * chunks
    for index in order[: layers % chunks]:
        sizes[index] += 1
    return sizes


def check_rope(case: Case) -> Iterator[Problem]:
    """Rotary frequencies: a base over 1, and scaling whose numbers fit the heads and each other."""
    model = case.config.model
    scaling, head = model.rope_scaling, model.kv_channels
    if model.rope_base <= 1.0:
        statement = (
            f"model.rope_base = {model.rope_base:g} is not over 1, so that no pair would turn slower than another"
        )
        yield Problem(("model.rope_base",), statement, {"model.rope_base": 10000.0})
    if scaling is None:
        return
    named, none = f"model.rope_scaling.kind = {scaling.kind}", {"model.rope_scaling": None}
    if scaling.factor < 1.0:
        statement = f"model.rope_scaling.factor = {scaling.factor:g} shortens the context, and must be at least 1"
        yield Problem(("model.rope_scaling.factor",), statement, {"model.rope_scaling.factor": 1.0})
    if scaling.kind == "llama3" and scaling.low_freq_factor >= scaling.high_freq_factor:
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        statement = f"model.rope_scaling.low_freq_factor = {low:g} is not below high_freq_factor = {high:g}"
        yield Problem(("model.rope_scaling.low_freq_factor",), statement, none)
    if scaling.kind == "yarn" and scaling.beta_slow >= scaling.beta_fast:
        statement = (
            f"model.rope_scaling.beta_slow = {scaling.beta_slow:g} is not below beta_fast = {scaling.beta_fast:g}"
        )
        yield Problem(("model.rope_scaling.beta_slow",), statement, none)
    if scaling.kind == "dynamic" and head <= 2:
        yield Problem(("model.head_dim",), f"{named} needs heads of over 2 channels, and these have {head}", none)
    for name in ("short_factors", "long_factors") if scaling.kind == "longrope" else ():
        factors = getattr(scaling, name)
        if factors is None or len(factors) != head // 2:
            held = "is not given" if factors is None else f"has {len(factors)} numbers"
            statement = (
                f"model.rope_scaling.{name} {held}, and longrope needs one for each of the {head // 2} pairs of a head"
            )
            yield Problem((f"model.rope_scaling.{name}",), statement, none)
