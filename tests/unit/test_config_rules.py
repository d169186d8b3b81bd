"""Cross-field rules: each refuses what would break, accepts what works, and suggests what works."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from llm_parallel.config.load import load_config
from llm_parallel.config.problem import WORLD_SIZE, Problem
from llm_parallel.config.rules import check_config, check_inputs, find_problems, num_processes
from llm_parallel.config.tree import RunConfig
from llm_parallel.errors import UserError
from llm_parallel.parallel.layout import Layout
from llm_parallel.train.step_settings import global_batch_size, learning_rate

BASE = {"model": {"vocab_size": 100, "ffn_hidden_size": 192, "num_layers": 12, "num_attention_heads": 12}}


def config_of(**values: Any) -> RunConfig:
    """A configuration that keeps all rules, with ``section__field=value`` changed."""
    tree: dict[str, Any] = {"model": {**BASE["model"], "hidden_size": 192}}
    for name, value in values.items():
        section, _, field = name.partition("__")
        tree.setdefault(section, {})[field] = value
    return RunConfig.model_validate(tree)


def apply_fix(config: RunConfig, world_size: int | None, fix: dict[str, Any]) -> tuple[RunConfig, int | None]:
    tree = config.model_dump()
    for name, value in fix.items():
        if name == WORLD_SIZE:
            world_size = value
            continue
        node = tree
        *sections, field = name.split(".")
        for section in sections:
            node = node[section]
        assert field in node
        node[field] = value
    return RunConfig.model_validate(tree), world_size


small = st.integers(1, 12)
maybe = st.one_of(st.none(), small)


@st.composite
def configs(draw: st.DrawFn) -> RunConfig:
    schedule = draw(st.sampled_from(["cosine", "wsd", "linear", "constant"]))
    rampup = {"start": draw(st.integers(1, 40)), "increment": draw(small), "samples": draw(st.integers(1, 500))}
    return RunConfig.model_validate(
        {
            "device": draw(st.sampled_from(["auto", "cpu", "cuda"])),
            "model": {
                "num_layers": draw(small),
                "hidden_size": draw(st.integers(1, 100)),
                "ffn_hidden_size": draw(st.integers(1, 100)),
                "num_attention_heads": draw(small),
                "num_query_groups": draw(small),
                "head_dim": draw(maybe),
                "vocab_size": draw(st.sampled_from([None, 100])),
                "max_seq_length_tokens": draw(st.integers(1, 200)),
            },
            "data": {"seq_length_tokens": draw(st.integers(1, 300)), "eval_fraction": draw(st.sampled_from([0, 0.5]))},
            "parallel": {
                "dp": draw(maybe),
                "tp": draw(small),
                "pp": draw(st.integers(1, 6)),
                "vpp": draw(st.integers(1, 3)),
                "cp": draw(st.integers(1, 4)),
                "sequence_parallel": draw(st.sampled_from([None, True, False])),
                "stage_layers": draw(st.one_of(st.none(), st.lists(small, max_size=6))),
                "recompute": draw(st.sampled_from(["none", "selective", "full"])),
                "recompute_method": draw(st.sampled_from(["uniform", "block"])),
                "recompute_num_layers": draw(small),
            },
            "train": {
                "global_batch_size": draw(st.integers(1, 100)),
                "micro_batch_size": draw(st.integers(1, 5)),
                "steps": draw(st.integers(1, 60)),
                "eval_interval_steps": draw(maybe),
                "rampup": draw(st.sampled_from([None, rampup])),
                "guard": {"spike_window_steps": draw(small), "spike_min_steps": draw(small)},
            },
            "optim": {
                "lr": draw(st.sampled_from([1e-3, 1e-5])),
                "schedule": schedule,
                "warmup_steps": draw(st.integers(0, 80)),
                "decay_steps": draw(maybe),
                "implementation": draw(st.sampled_from(["auto", "torch", "apex"])),
                "moment_bits": draw(st.sampled_from([8, 32])),
            },
            "checkpoint": {"interval_steps": draw(maybe), "keep_every_steps": draw(maybe)},
            "kernels": {"attention": draw(st.sampled_from(["auto", "gluon"]))},
        }
    )


world_sizes = st.one_of(st.none(), st.integers(1, 64))
devices = st.sampled_from(["cpu", "cuda"])
quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@quick
@given(configs(), world_sizes, devices)
def test_each_suggestion_removes_its_refusal(config, world_size, device):
    for problem in find_problems(config, world_size, device):
        fixed, fixed_world = apply_fix(config, world_size, problem.fix)
        left = [other.fields for other in find_problems(fixed, fixed_world, device)]
        assert problem.fields not in left, problem


@quick
@given(configs(), world_sizes, devices)
def test_following_the_suggestions_ends_in_a_configuration_that_works(config, world_size, device):
    for _ in range(25):
        problems = find_problems(config, world_size, device)
        if not problems:
            return
        config, world_size = apply_fix(config, world_size, problems[0].fix)
    raise AssertionError(problems)


@quick
@given(configs(), world_sizes, devices)
def test_each_message_names_its_fields_their_values_and_the_fix_as_overrides(config, world_size, device):
    for problem in find_problems(config, world_size, device):
        for name in problem.fields:
            assert name in problem.message
        statement, _, advice = problem.message.partition("; use ")
        assert "\n" not in problem.message
        assert advice
        assert statement
        written = [part for part in advice.split(" and ") if not part.endswith(" processes")]
        changed = {name: value for name, value in problem.fix.items() if name != WORLD_SIZE}
        assert len(written) == len(changed)
        read = load_config(None, ["train.rampup={start: 1, increment: 1, samples: 1}", *written])
        for name, value in changed.items():
            node: Any = read
            for part in name.split("."):
                node = getattr(node, part)
            assert node == (tuple(value) if isinstance(value, list) else value)


def problems_of(config: RunConfig, world_size: int | None = None, device: Any = "cpu") -> list[Problem]:
    return find_problems(config, world_size, device)


@quick
@given(size=st.integers(1, 60), micro=st.integers(1, 5), dp=st.integers(1, 5), pp=st.sampled_from([1, 2, 3]))
def test_batch_rule_refuses_exactly_what_does_not_divide_into_micro_batches(size, micro, dp, pp):
    vpp = 2 if pp > 1 else 1
    config = config_of(
        train__global_batch_size=size,
        train__micro_batch_size=micro,
        parallel__dp=dp,
        parallel__pp=pp,
        parallel__vpp=vpp,
    )
    layout = Layout.from_config(config)
    samples = [n for rank in range(dp) for part in layout.micro_batches(0, size, rank) for n in part]
    # megatron-core's interleaved schedule takes micro batches in groups of pp and refuses a rest.
    counts = {layout.num_micro_batches(size, rank) for rank in range(dp)}
    whole = sorted(samples) == list(range(size))
    works = whole and len(counts) == 1 and (vpp == 1 or counts.pop() % pp == 0)
    assert (not problems_of(config)) == works
    # After a loss of replicas some may have more to do than others, but none nothing.
    uneven = works if vpp > 1 else whole and size >= micro * dp
    assert (not find_problems(config, None, "cpu", uneven=True)) == uneven


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
@pytest.mark.parametrize("cp", [1, 2, 3, 4])
@pytest.mark.parametrize("sp", [None, False])
def test_sequence_rule_refuses_exactly_what_does_not_divide(tp, cp, sp):
    verdicts = set()
    for seq in range(1, 4 * tp * cp + 1):
        config = config_of(
            data__seq_length_tokens=seq,
            parallel__tp=tp,
            parallel__cp=cp,
            parallel__sequence_parallel=sp,
            model__num_query_groups=12,
        )
        layout = Layout.from_config(config)
        held = [[n for part in layout.token_ranges(seq, rank) for n in part] for rank in range(cp)]
        works = sorted(n for tokens in held for n in tokens) == list(range(seq))
        if layout.sequence_parallel:
            works = works and all(len(tokens) % tp == 0 for tokens in held)
        assert (not problems_of(config)) == works, seq
        verdicts.add(works)
    assert True in verdicts


@quick
@given(
    layers=small,
    pp=st.integers(1, 4),
    vpp=st.integers(1, 3),
    stages=st.one_of(st.none(), st.lists(st.integers(1, 4), min_size=1, max_size=8)),
)
def test_pipeline_rule_refuses_exactly_what_leaves_layers_without_a_place(layers, pp, vpp, stages):
    config = config_of(
        model__num_layers=layers,
        parallel__pp=pp,
        parallel__vpp=vpp,
        parallel__stage_layers=stages,
        train__global_batch_size=12,
    )
    layout = Layout.from_config(config)
    works = len(layout.stage_layers) == pp * vpp and all(layout.stage_layers) and (vpp == 1 or pp > 1)
    if works:
        placed = [n for rank in range(pp) for stage in range(vpp) for n in layout.layers(rank, stage)]
        works = sorted(placed) == list(range(layers))
    assert (not problems_of(config)) == works


@quick
@given(
    end=st.integers(1, 64),
    start=st.integers(1, 70),
    increment=st.integers(1, 20),
    samples=st.integers(1, 900),
    micro=st.integers(1, 3),
    dp=st.integers(1, 3),
)
def test_rampup_rule_accepts_only_what_every_step_can_divide(end, start, increment, samples, micro, dp):
    assume(end % (micro * dp) == 0)
    ramp = {"start": start, "increment": increment, "samples": samples}
    config = config_of(train__global_batch_size=end, train__micro_batch_size=micro, parallel__dp=dp, train__rampup=ramp)
    planned = list(range(start, end + 1, increment))
    works = start <= end and planned[-1] == end and all(size % (micro * dp) == 0 for size in planned)
    assert (not problems_of(config)) == works
    if works:
        consumed, sizes = 0, []
        while consumed <= samples:
            sizes.append(global_batch_size(config.train, consumed))
            consumed += sizes[-1]
        assert set(sizes) <= set(planned)
        assert global_batch_size(config.train, consumed) == end


@quick
@given(
    schedule=st.sampled_from(["cosine", "wsd", "linear", "constant"]),
    warmup=st.integers(0, 40),
    decay=st.one_of(st.none(), st.integers(1, 40)),
    steps=st.integers(1, 40),
)
def test_accepted_schedules_rise_to_the_peak_and_fall_to_the_end(schedule, warmup, decay, steps):
    config = config_of(
        optim__schedule=schedule,
        optim__warmup_steps=warmup,
        optim__decay_steps=decay,
        optim__lr=1e-3,
        optim__min_lr=1e-4,
        train__steps=steps,
    )
    refused = bool(problems_of(config))
    assert refused == (
        warmup > steps
        or (schedule in ("cosine", "linear") and warmup >= (decay or steps))
        or (schedule == "wsd" and warmup + (decay or max(1, steps // 10)) > steps)
    )
    if refused:
        return
    rates = [learning_rate(config.optim, steps, step) for step in range(1, steps + 1)]
    assert all(0 < rate <= 1e-3 * (1 + 1e-12) for rate in rates)
    if warmup:
        assert rates[warmup - 1] == pytest.approx(1e-3)
    end = steps if schedule == "wsd" else decay or steps
    if schedule != "constant" and end <= steps:
        assert rates[end - 1] == pytest.approx(1e-4)


def test_heads_groups_and_tp_agree_with_megatron_core():
    from megatron.core.transformer import TransformerConfig

    def megatron_accepts(heads: int, groups: int, tp: int) -> bool:
        try:
            TransformerConfig(
                num_layers=2,
                hidden_size=12 * heads,
                num_attention_heads=heads,
                num_query_groups=groups,
                ffn_hidden_size=840,
                tensor_model_parallel_size=tp,
            )
        except ValueError:
            return False
        return True

    seen = set()
    for heads in (1, 2, 3, 4, 6, 8, 12):
        for groups in [size for size in range(1, heads + 1) if heads % size == 0]:
            for tp in range(1, 9):
                config = config_of(
                    model__num_attention_heads=heads,
                    model__num_query_groups=groups,
                    model__hidden_size=12 * heads,
                    model__ffn_hidden_size=840,
                    data__seq_length_tokens=840,
                    parallel__tp=tp,
                )
                accepted = not problems_of(config)
                assert accepted == megatron_accepts(heads, groups, tp), (heads, groups, tp)
                seen.add(accepted)
    assert seen == {True, False}


REFUSED: list[tuple[dict[str, Any], int | None, str, str]] = [
    # changes, processes, device, message
    (
        {"model__num_query_groups": 5},
        None,
        "cpu",
        "model.num_query_groups = 5 does not divide model.num_attention_heads = 12; use model.num_query_groups=4",
    ),
    (
        {"model__hidden_size": 200},
        None,
        "cpu",
        "model.hidden_size = 200 is not divisible by model.num_attention_heads = 12; use model.hidden_size=192",
    ),
    (
        {"model__head_dim": 15},
        None,
        "cpu",
        "model.head_dim = 15 is odd (model.hidden_size = 192, model.num_attention_heads = 12), and rotary embedding"
        " rotates pairs of channels; use model.head_dim=16",
    ),
    (
        {"parallel__tp": 5, "model__ffn_hidden_size": 200, "parallel__sequence_parallel": False},
        None,
        "cpu",
        "parallel.tp = 5 does not divide model.num_attention_heads = 12; use parallel.tp=4\n"
        "parallel.tp = 5 neither divides nor is a multiple of model.num_query_groups = 4; use parallel.tp=4",
    ),
    (
        {"parallel__tp": 3, "model__num_query_groups": 12, "model__ffn_hidden_size": 200, "data__seq_length_tokens": 6},
        None,
        "cpu",
        "parallel.tp = 3 does not divide model.ffn_hidden_size = 200; use parallel.tp=2",
    ),
    (
        {"parallel__sequence_parallel": True},
        None,
        "cpu",
        "parallel.sequence_parallel = true divides the sequence over a tensor-parallel group, and parallel.tp = 1;"
        " use parallel.sequence_parallel=null",
    ),
    (
        {"parallel__pp": 5},
        None,
        "cpu",
        "model.num_layers = 12 is not divisible by parallel.pp = 5; use parallel.stage_layers=[2,3,3,2,2]",
    ),
    (
        {"parallel__vpp": 2},
        None,
        "cpu",
        "parallel.vpp = 2 interleaves the chunks of a pipeline, and parallel.pp = 1; use parallel.vpp=1",
    ),
    (
        {"parallel__pp": 4, "parallel__vpp": 4},
        None,
        "cpu",
        "model.num_layers = 12 is less than parallel.pp = 4 times parallel.vpp = 4 model chunks; use parallel.vpp=3",
    ),
    (
        {"parallel__pp": 3, "parallel__vpp": 2, "model__num_layers": 2},
        None,
        "cpu",
        "model.num_layers = 2 is less than parallel.pp = 3 times parallel.vpp = 2 model chunks;"
        " use parallel.pp=1 and parallel.vpp=1\n"
        "train.global_batch_size = 8 makes 8 micro batches (train.micro_batch_size = 1 times parallel.dp = 1), not a"
        " multiple of parallel.pp = 3 as parallel.vpp = 2 needs; use train.global_batch_size=9",
    ),
    (
        {"parallel__pp": 2, "parallel__stage_layers": [4, 4, 4]},
        None,
        "cpu",
        "parallel.stage_layers has 3 entries, and parallel.pp = 2 needs 2; use parallel.stage_layers=null",
    ),
    (
        {"parallel__pp": 2, "parallel__stage_layers": [6, 7]},
        None,
        "cpu",
        "parallel.stage_layers adds up to 13 layers, and model.num_layers = 12; use parallel.stage_layers=null",
    ),
    (
        {"parallel__pp": 2, "parallel__recompute": "full", "parallel__recompute_num_layers": 5},
        None,
        "cpu",
        "parallel.recompute_num_layers = 5 does not divide the 6 layers of a model chunk (model.num_layers = 12,"
        " parallel.pp = 2, parallel.vpp = 1, parallel.stage_layers = [6, 6]); use parallel.recompute_num_layers=6",
    ),
    (
        {"parallel__cp": 2, "data__seq_length_tokens": 258},
        None,
        "cpu",
        "data.seq_length_tokens = 258 is not a multiple of 4, which parallel.cp = 2 needs;"
        " use data.seq_length_tokens=260",
    ),
    (
        {"data__seq_length_tokens": 5000},
        None,
        "cpu",
        "data.seq_length_tokens = 5000 is over model.max_seq_length_tokens = 4096; use data.seq_length_tokens=4096",
    ),
    (
        {"parallel__tp": 2, "parallel__pp": 2},
        6,
        "cpu",
        "parallel.tp = 2 times parallel.pp = 2 times parallel.cp = 1 is 4, which does not divide the 6 processes;"
        " use 4 processes",
    ),
    (
        {"parallel__tp": 2, "parallel__dp": 3, "train__global_batch_size": 12},
        4,
        "cpu",
        "parallel.dp = 3 times parallel.tp = 2 times parallel.pp = 1 times parallel.cp = 1 is 6, and there are"
        " 4 processes; use parallel.dp=2",
    ),
    (
        {"train__global_batch_size": 10, "train__micro_batch_size": 2},
        4,
        "cpu",
        "train.global_batch_size = 10 is not divisible by train.micro_batch_size = 2 times parallel.dp = 4;"
        " use train.global_batch_size=16",
    ),
    (
        {"parallel__pp": 3, "parallel__vpp": 2, "train__global_batch_size": 8},
        None,
        "cpu",
        "train.global_batch_size = 8 makes 8 micro batches (train.micro_batch_size = 1 times parallel.dp = 1), not a"
        " multiple of parallel.pp = 3 as parallel.vpp = 2 needs; use train.global_batch_size=9",
    ),
    (
        {"train__rampup": {"start": 9, "increment": 1, "samples": 10}},
        None,
        "cpu",
        "train.rampup.start = 9 is over train.global_batch_size = 8; use train.rampup=null",
    ),
    (
        {"train__rampup": {"start": 2, "increment": 4, "samples": 10}},
        None,
        "cpu",
        "train.rampup.increment = 4 does not lead from train.rampup.start = 2 to train.global_batch_size = 8 in whole"
        " steps; use train.rampup.increment=3",
    ),
    (
        {"optim__lr": 1e-5},
        None,
        "cpu",
        "optim.min_lr = 3e-05 is over optim.lr = 1e-05; use optim.min_lr=1.0e-06",
    ),
    (
        {"optim__warmup_steps": 200},
        None,
        "cpu",
        "optim.warmup_steps = 200 is over train.steps = 100; use optim.warmup_steps=10",
    ),
    (
        {"optim__warmup_fraction": 0.1, "optim__warmup_steps": 5},
        None,
        "cpu",
        "optim.warmup_fraction = 0.1 and optim.warmup_steps = 5 both say how long warm-up is; use optim.warmup_steps=0",
    ),
    (
        {"optim__warmup_fraction": 0.95, "optim__schedule": "wsd"},
        None,
        "cpu",
        "optim.warmup_fraction = 0.95 makes 95 steps, which leave none to decay; use optim.warmup_fraction=0.0",
    ),
    (
        {"checkpoint__keep_every_steps": 25, "checkpoint__interval_steps": 10},
        None,
        "cpu",
        "checkpoint.keep_every_steps = 25 is not a multiple of checkpoint.interval_steps = 10;"
        " use checkpoint.keep_every_steps=30",
    ),
    (
        {"train__eval_interval_steps": 10, "data__eval_fraction": 0.0},
        None,
        "cpu",
        "train.eval_interval_steps = 10 has nothing to evaluate on: data.eval is empty and data.eval_fraction = 0;"
        " use data.eval_fraction=0.01",
    ),
    (
        {"method__kind": "sft", "train__eval_interval_steps": 10, "chat__eval_fraction": 0.0},
        None,
        "cpu",
        "train.eval_interval_steps = 10 has nothing to evaluate on: chat.eval is empty and chat.eval_fraction = 0;"
        " use chat.eval_fraction=0.01",
    ),
    (
        {"train__early_stop_evaluations": 2, "train__steps": 60},
        None,
        "cpu",
        "train.early_stop_evaluations = 2 never ends a run whose only evaluation comes after its last step:"
        " train.eval_interval_steps is not given; use train.eval_interval_steps=6",
    ),
    (
        {"adapter__dora": True, "adapter__dropout": 0.1, "checkpoint__load": "base"},
        None,
        "cpu",
        "adapter.dora = true multiplies whole rows, so that adapter.dropout = 0.1 has no place;"
        " use adapter.dropout=0.0",
    ),
    (
        {"optim__implementation": "triton", "optim__moment_bits": 8},
        None,
        "cuda",
        "optim.implementation = triton has no moments of optim.moment_bits = 8; use optim.implementation=auto",
    ),
    (
        {"optim__implementation": "apex"},
        None,
        "cpu",
        "optim.implementation = apex runs on CUDA only, and the run's device is cpu; use optim.implementation=auto",
    ),
    (
        {"kernels__attention": "gluon", "model__head_dim": 128, "train__precision": "bf16"},
        None,
        "cpu",
        "kernels.attention = gluon needs an H100 or H200, and the run's device is cpu; use kernels.attention=auto",
    ),
    (
        {"kernels__attention": "gluon", "model__head_dim": 96},
        None,
        "cuda",
        "kernels.attention = gluon has heads of 64, 128 and 256 channels, and model.head_dim = 96;"
        " use kernels.attention=auto\n"
        "kernels.attention = gluon is for bf16, and train.precision = fp32; use kernels.attention=auto",
    ),
    (
        {"kernels__attention": "gluon", "model__head_dim": 64, "train__precision": "bf16", "model__window_tokens": 9},
        None,
        "cuda",
        "kernels.attention = gluon does not support model.window_tokens = 9; use kernels.attention=auto",
    ),
    (
        {"kernels__deterministic": True},
        None,
        "cuda",
        "kernels.deterministic = true is for a CPU, whose products are known to round a row alike; the run's device is "
        "cuda; use kernels.deterministic=false",
    ),
    (
        {
            "kernels__deterministic": True,
            "kernels__swiglu": "triton",
            "kernels__output_loss": "fused",
            "model__rope_scaling": {"kind": "dynamic", "factor": 2.0, "original_max_position": 64},
        },
        None,
        "cpu",
        "kernels.deterministic = true computes by torch, and kernels.swiglu = triton; use kernels.swiglu=auto\n"
        "kernels.deterministic = true needs the logits of all tokens, and kernels.output_loss = fused; use "
        "kernels.output_loss=separate\n"
        "kernels.deterministic = true, and model.rope_scaling.kind = dynamic turns keys by angles that depend on the "
        "length of the text, which training does not know token by token; use kernels.deterministic=false",
    ),
    (
        {"model__head_dim": 8, "model__rope_scaling": {"kind": "longrope", "short_factors": [1.0, 2.0, 3.0]}},
        None,
        "cpu",
        "model.rope_scaling.short_factors has 3 numbers, and longrope needs one for each of the 4 pairs of a head;"
        " use model.rope_scaling=null\n"
        "model.rope_scaling.long_factors is not given, and longrope needs one for each of the 4 pairs of a head;"
        " use model.rope_scaling=null",
    ),
    (
        {"model__rope_scaling": {"low_freq_factor": 8.0, "high_freq_factor": 4.0}},
        None,
        "cpu",
        "model.rope_scaling.low_freq_factor = 8 is not below high_freq_factor = 4; use model.rope_scaling=null",
    ),
    (
        {"model__rope_scaling": {"kind": "yarn", "factor": 0.5, "beta_slow": 40.0}, "model__rope_base": 1.0},
        None,
        "cpu",
        "model.rope_base = 1 is not over 1, so that no pair would turn slower than another;"
        " use model.rope_base=10000.0\n"
        "model.rope_scaling.factor = 0.5 shortens the context, and must be at least 1;"
        " use model.rope_scaling.factor=1.0\n"
        "model.rope_scaling.beta_slow = 40 is not below beta_fast = 32; use model.rope_scaling=null",
    ),
    (
        {"model__vocab_size": None},
        None,
        "cpu",
        "neither data.tokenizer, whose tokens would be counted, nor model.vocab_size is given;"
        " use model.vocab_size=32000",
    ),
]


@pytest.mark.parametrize(("changes", "world_size", "device", "message"), REFUSED, ids=lambda value: str(value)[:50])
def test_refusals_word_for_word(changes, world_size, device, message):
    with pytest.raises(UserError) as raised:
        check_config(config_of(**changes), world_size, device)
    assert str(raised.value) == message


ACCEPTED = [
    ({}, None),
    ({"parallel__tp": 3, "model__num_query_groups": 3, "data__seq_length_tokens": 240}, 3),
    ({"parallel__tp": 4, "model__num_query_groups": 2}, 4),  # key and value heads are replicated
    ({"parallel__pp": 5, "parallel__stage_layers": [2, 3, 3, 2, 2]}, 5),
    ({"parallel__pp": 2, "parallel__vpp": 3, "model__tie_embeddings": True}, 4),
    ({"parallel__cp": 2, "parallel__tp": 2, "parallel__pp": 2}, 16),
    ({"train__rampup": {"start": 2, "increment": 2, "samples": 100}}, 2),
    ({"parallel__recompute": "full", "parallel__recompute_method": "block", "parallel__recompute_num_layers": 50}, 1),
    ({"optim__implementation": "apex"}, None),
    ({"kernels__attention": "gluon", "model__head_dim": 128, "train__precision": "bf16"}, None),
]


@pytest.mark.parametrize(("changes", "world_size"), ACCEPTED, ids=lambda value: str(value)[:50])
def test_what_works_is_not_refused(changes, world_size):
    check_config(config_of(**changes), world_size, "cuda")


def test_number_of_processes():
    assert num_processes(config_of()) == 1
    assert num_processes(config_of(parallel__tp=2, parallel__pp=3, parallel__cp=2)) == 12
    assert num_processes(config_of(parallel__tp=2, parallel__dp=4)) == 8


def test_inputs_that_are_missing_are_named(tmp_path):
    for ending in (".bin", ".idx"):
        (tmp_path / f"good{ending}").touch()
    (tmp_path / "half.bin").touch()
    good, half = str(tmp_path / "good"), str(tmp_path / "half")
    check_inputs(config_of(data__train=[{"path": good}]))
    with pytest.raises(UserError) as raised:
        check_inputs(
            config_of(
                data__train=[{"path": good}, {"path": half}],
                data__eval=[{"path": good + ".bin"}],
                data__tokenizer=f"{tmp_path}/none.model",
                checkpoint__load=f"{tmp_path}/nothing",
            )
        )
    lines = str(raised.value).splitlines()
    assert [line.partition(" = ")[0] for line in lines] == [
        "data.train.1.path",
        "data.eval.0.path",
        "data.tokenizer",
        "checkpoint.load",
    ]
    assert f"{half}.idx does not exist" in lines[0]
    assert "without .bin or .idx" in lines[1]


def test_no_training_data_is_refused():
    with pytest.raises(UserError, match=r"data\.train is empty"):
        check_inputs(config_of())
