"""Adapters in checkpoints and in copies in memory, on the base that they were trained on. That their gradients are
those of one process in every layout is an axis of ``covering.py``; that these are PEFT's is in
``tests/parity/test_peft.py``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from tests.distributed import test_memory_checkpoint as memory
from tests.distributed.test_checkpoint import _p
from tests.support.ckpt_jobs import History, load_job, open_store, save_job
from tests.support.harness import run_ranks
from tests.support.job import base_config, changed, open_engine, train_steps

pytestmark = pytest.mark.gloo

SOME = {"adapter.rank": 4, "adapter.targets": ("q", "v", "o", "gate", "down")}
ON_VOCABULARY = {"adapter.targets": (*SOME["adapter.targets"], "embed_tokens"), "adapter.modules_to_save": ("lm_head",)}
"""An adapter on the embedding, and the output projection trained whole."""
OTHERS = [
    ("one process", {}, 1),
    ("TP4, 2 groups", _p(tp=4), 4),
    ("DP2 overlap", _p(dp=2, overlap=True, bucket_size=500), 2),
    ("PP2 VPP2", _p(pp=2, vpp=2), 2),
    ("CP2, TP2 without SP", _p(cp=2, tp=2, sequence_parallel=False), 4),
]


def worst(undisturbed: History, resumed: History) -> float:
    assert len(undisturbed) == len(resumed) > 0
    return max(abs(a - b) for (a, _), (b, _) in zip(undisturbed, resumed))


def assert_goes_on(
    folder: Path, others: list[tuple[str, dict[str, Any], int]], more: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Saves in TP2 PP2, which goes on bit for bit, and loads in the other layouts."""
    some = SOME | dict(more)
    layout = _p(tp=2, pp=2) | some
    undisturbed = run_ranks(save_job, 4, layout, str(folder), 2, 3)[0]
    assert run_ranks(load_job, 4, layout, str(folder), 3)[0] == undisturbed
    for name, other, ranks in others:
        difference = worst(undisturbed, run_ranks(load_job, ranks, other | some, str(folder), 3)[0])
        print(f"| TP2 PP2 -> {name} | {difference:.1e} |")
        assert difference <= 1e-6, name


def test_a_checkpoint_holds_adapters_alone_and_goes_on_in_another_layout(tmp_path: Path) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    assert_goes_on(tmp_path, OTHERS[:1], ON_VOCABULARY)
    stored = FileSystemReader(str(tmp_path / "iter_0000002")).read_metadata().state_dict_metadata
    of_model = [key for key in stored if key.startswith(("decoder.", "embedding", "output"))]
    in_layers = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    linears = (*(f"decoder.layers.{linear}" for linear in in_layers), "embedding")
    expected = [f"{linear}.adapter.{factor}" for linear in linears for factor in "ab"]
    assert sorted(of_model) == sorted([*expected, "output_layer.weight"])
    assert all(".adapter." in key for key in stored if "layers" in key)


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"adapter.dora": True}, ON_VOCABULARY], ids=["LoRA", "DoRA", "vocabulary"])
def test_a_checkpoint_of_adapters_goes_on_in_five_other_layouts(more: dict[str, Any], tmp_path: Path) -> None:
    assert_goes_on(tmp_path, OTHERS, more)


@pytest.mark.parametrize(
    ("saved", "processes", "other", "ranks"),
    [
        (_p(tp=2, dp=2), 4, _p(pp=2), 2),
        pytest.param(
            _p(tp=2, dp=2) | {"adapter.dora": True}, 4, _p(pp=2) | {"adapter.dora": True}, 2, marks=pytest.mark.slow
        ),
        pytest.param(
            _p(dp=2, distributed_optimizer=False),
            2,
            _p(tp=2, distributed_optimizer=False),
            2,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["TP2 DP2 to PP2", "DoRA, TP2 DP2 to PP2", "plain optimizer, DP2 to TP2"],
)
def test_adapters_go_on_from_memory(
    saved: dict[str, Any], processes: int, other: dict[str, Any], ranks: int, tmp_path: Path
) -> None:
    saved, other = ({**SOME, **({} if "adapter.dora" in one else ON_VOCABULARY), **one} for one in (saved, other))
    undisturbed = run_ranks(memory.save_job, processes, saved, str(tmp_path), None)[0]
    same = run_ranks(memory.load_job, processes, saved, processes, str(tmp_path), None)[0]
    assert same == undisturbed
    assert worst(undisturbed, run_ranks(memory.load_job, ranks, other, processes, str(tmp_path), None)[0]) <= 1e-6


def replicas(rank: int, world_size: int, changes: dict[str, Any]) -> tuple[History, dict[str, np.ndarray]]:
    """Losses, and the factors that this rank shares with the other tensor-parallel ranks, after three steps."""
    from llm_parallel.model.tensors import canonical_parameters, kind_of
    from llm_parallel.parallel.groups import seed_step

    config = changed(base_config(), changes)
    engine = open_engine(config, rank, world_size)
    history = []
    for step in range(3):
        seed_step(config.seed, step, engine.groups)
        history += train_steps(engine, config, step, 1)
    found = [pair for model in engine.models for pair in canonical_parameters(model) if pair[1].requires_grad]
    return history, {name: p.detach().numpy() for name, p in found if kind_of(name).sharded_dim is None}


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_dropout_keeps_replicated_factors_equal_and_repeats(sequence_parallel: bool) -> None:
    changes = SOME | _p(tp=2, sequence_parallel=sequence_parallel) | {"adapter.dropout": 0.3}
    (first, one), (_, other) = run_ranks(replicas, 2, changes)
    assert one.keys() == other.keys() and one
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    if sequence_parallel:
        return
    assert run_ranks(replicas, 2, changes)[0][0] == first
    plain = run_ranks(replicas, 2, changes | {"adapter.dropout": 0.0})[0][0]
    assert worst(first, plain) > 1e-4, "something was dropped"


def refusals(rank: int, world_size: int, folder: str) -> list[str]:
    """What is said of adapters' checkpoints that do not fit the run."""
    from llm_parallel.checkpoint.load import load_checkpoint
    from llm_parallel.checkpoint.state import TrainState
    from llm_parallel.errors import UserError
    from llm_parallel.parallel.groups import close_groups

    said = []
    for number, (saved, here) in enumerate(
        [
            (SOME, SOME | {"adapter.rank": 8}),
            (SOME, {"adapter.rank": 4, "adapter.targets": ("q",)}),
            (SOME, {}),
            ({}, SOME),
            (SOME, SOME),
        ]
    ):
        config = changed(base_config(), saved)
        engine = open_engine(config, rank, world_size)
        if saved:
            engine.network.base.path, engine.network.base.fingerprint = "/models/one", "1"
        store = open_store(engine, config, f"{folder}/{number}")
        store.save({"policy": engine}, TrainState(step=1), blocking=True)
        close_groups(world=False)
        other = open_engine(changed(base_config(), here), rank, world_size)
        if here:
            other.network.base.path, other.network.base.fingerprint = "/models/two", "2"
        try:
            load_checkpoint(f"{folder}/{number}", {"policy": other})
            said.append("loaded")
        except UserError as error:
            said.append(str(error))
        close_groups(world=False)
    return said


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    said = run_ranks(refusals, 1, str(tmp_path))[0]
    wanted = [
        r"adapter\.rank is 8, and .*iter_0000001 holds adapters with 4; make them the same",
        r"adapter\.targets is \['q'\], and .* holds adapters with \['q', 'v', 'o', 'gate', 'down'\]",
        r"holds adapters alone, and this run has none; give the adapter section of .*config\.yaml",
        r"holds whole weights, and this run trains adapters; give another run_dir",
        r"checkpoint\.load = /models/two is another model than /models/one, .* \(fingerprint 2 instead of 1\)",
    ]
    for sentence, pattern in zip(said, wanted, strict=True):
        assert re.search(pattern, sentence), sentence
        assert "\n" not in sentence


def fingerprints(rank: int, world_size: int, folder: str, changes: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The fingerprint of a base that was loaded, and this rank's weights."""
    from llm_parallel.checkpoint.base import load_base
    from llm_parallel.model.tensors import canonical_parameters

    engine = open_engine(changed(base_config(), changes | SOME), rank, world_size)
    load_base(folder, engine.network)
    found = [pair for model in engine.models for pair in canonical_parameters(model) if not pair[1].requires_grad]
    return engine.network.base.fingerprint, {name: p.float().numpy() for name, p in found}


def save_base(rank: int, world_size: int, folder: str, changes: dict[str, Any]) -> None:
    from llm_parallel.checkpoint.state import TrainState

    config = changed(base_config(), changes)
    engine = open_engine(config, rank, world_size)
    open_store(engine, config, folder).save({"policy": engine}, TrainState(), blocking=True)


def test_a_base_is_recognised_in_every_layout_and_as_a_folder_of_either_kind(tmp_path: Path) -> None:
    from llm_parallel.convert.export import export_to_hf

    tied = {"model.tie_embeddings": True, "model.vocab_size": 101}
    run_ranks(save_base, 2, str(tmp_path / "one"), _p(tp=2) | tied)
    run_ranks(save_base, 1, str(tmp_path / "two"), tied | {"model.init_std": 0.021})
    export_to_hf(tmp_path / "one", tmp_path / "hf")
    alone, weights = run_ranks(fingerprints, 1, str(tmp_path / "one"), tied)[0]
    assert re.fullmatch("[0-9a-f]{16}", alone)
    for folder, layout, ranks in (
        ("one", _p(tp=2, pp=2), 4),
        ("hf", _p(pp=2, vpp=2), 2),
        ("hf", {"train.precision": "bf16"}, 1),
    ):
        found = run_ranks(fingerprints, ranks, str(tmp_path / folder), layout | tied)
        assert {print_ for print_, _ in found} == {alone}, (folder, layout)
    assert run_ranks(fingerprints, 1, str(tmp_path / "two"), tied)[0][0] != alone
    again = run_ranks(fingerprints, 1, str(tmp_path / "hf"), tied)[0][1]
    for name in weights:
        np.testing.assert_array_equal(again[name], weights[name], err_msg=name)


def without(rank: int, world_size: int) -> tuple[float, float, float]:
    """Losses with adapters, without them, and with them again."""
    from llm_parallel.model.adapters import adapters_off
    from llm_parallel.objectives.likelihood import Likelihood
    from llm_parallel.train.step import evaluate
    from tests.support.job import own_batches

    config = changed(base_config(), SOME)
    engine = open_engine(config, rank, world_size)
    batches = own_batches(config, engine.groups)
    plain = open_engine_alone(engine)
    with_them = evaluate(engine.network, Likelihood(), batches)[0]
    with adapters_off(engine.network):
        off = evaluate(engine.network, Likelihood(), batches)[0]
    again = evaluate(engine.network, Likelihood(), batches)[0]
    assert again == with_them
    return with_them, off, evaluate(plain, Likelihood(), batches)[0]


def open_engine_alone(engine: Any) -> Any:
    """The network without adapters, on the same groups."""
    from llm_parallel.model.gpt import build_policy

    return build_policy(base_config(), engine.groups)


def test_adapters_can_be_switched_off() -> None:
    with_them, off, plain = run_ranks(without, 1)[0]
    assert off == plain
    assert abs(with_them - plain) > 1e-4


def held_bytes(rank: int, world_size: int, changes: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Bytes of weights, gradients and optimizer state that a rank holds, and the prediction for its stage."""
    from llm_parallel.checkpoint.optimizer import allocate_moments
    from llm_parallel.model.adapters import every_adapter
    from llm_parallel.parallel.mcore_optimizer import inner_optimizers
    from llm_parallel.planner.memory import memory_of_stage
    from llm_parallel.planner.shapes import shape_of, strategy_of

    config = changed(base_config(), {"model.hidden_size": 256, "model.ffn_hidden_size": 640} | changes)
    engine = open_engine(config, rank, world_size)
    allocate_moments(engine)
    parameters = [parameter for model in engine.models for parameter in model.parameters()]
    weights = [part for p in parameters for part in (p.stored.tensors if hasattr(p, "stored") else (p,))]
    weights += [adapter.meets for adapter in every_adapter(engine.models) if hasattr(adapter, "meets")]
    inner = inner_optimizers(engine.optimizer)
    mains = [p for one in inner for group in one.param_groups for p in group["params"]]
    moments = [one.state[p][name] for one in inner for p in one.state for name in ("exp_avg", "exp_avg_sq")]
    own = {p.untyped_storage().data_ptr() for p in parameters}
    copies = [p for p in mains if p.untyped_storage().data_ptr() not in own]
    measured = {
        "weights": sum(part.nbytes for part in weights),
        "gradients": sum(p.main_grad.nbytes for p in parameters if p.requires_grad),
        "optimizer": sum(part.nbytes for part in (*moments, *copies)),
    }
    predicted = memory_of_stage(shape_of(config.model), strategy_of(config, world_size), engine.groups.at.pp).by_kind()
    return {kind: (size, predicted[kind]) for kind, size in measured.items()}


@pytest.mark.parametrize("kind", ["full", "int8", "nf4"])
def test_bytes_that_are_held_are_those_predicted(kind: str) -> None:
    layout = {
        "full": _p(tp=2) | {"train.precision": "bf16"},
        "int8": _p(dp=2) | {"train.precision": "bf16"},
        "nf4": _p(tp=2, pp=2),
    }[kind]
    some = SOME if kind == "int8" else SOME | ON_VOCABULARY
    for rank in run_ranks(held_bytes, 4 if kind == "nf4" else 2, layout | some | {"adapter.base": kind}):
        for name, (measured, predicted) in rank.items():
            print(f"| {kind} | {name} | {measured:.0f} | {predicted:.0f} | {predicted / measured - 1:+.2%} |")
            assert abs(predicted / measured - 1) <= 0.05, (name, measured, predicted)
