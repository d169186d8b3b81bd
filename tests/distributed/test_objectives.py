"""An objective other than the likelihood, and several models in one process, in every kind of layout."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.test_layouts import worst_gradient
from tests.support.ckpt_jobs import open_store
from tests.support.harness import run_ranks
from tests.support.job import base_config, changed, gradients, open_engine, own_batches, sample, with_reference

pytestmark = pytest.mark.gloo
SECRET = "of this test"
ISOLATED = {"data.packing": "isolate"}


def dpo_job(rank: int, world_size: int, changes: dict[str, Any], steps: int = 3) -> dict[str, Any]:
    """First gradients, and loss, norm and accuracy of all steps."""
    from llm_parallel.objectives.dpo import DPO
    from llm_parallel.parallel.groups import close_groups
    from llm_parallel.train.step import apply_gradient, forward_backward

    config = changed(base_config(), ISOLATED | changes)
    engine = open_engine(config, rank, world_size)
    first, history = {}, []
    for step in range(steps):
        outcome = forward_backward(engine, DPO(0.5), with_reference(own_batches(config, engine.groups, 8 * step)))
        if not step:
            first = {name: gradient.numpy() for name, gradient in gradients(engine).items()}
            # Gathering the gradient for the comparison leaves the distributed optimizer's own part as it was.
        apply_gradient(engine, outcome, config.optim.lr, config.optim.clip_grad)
        history.append((outcome.loss, outcome.grad_norm, outcome.statistics["rewards/accuracies"], outcome.count))
    mesh, at = engine.groups.mesh, engine.groups.at
    close_groups(world=False)
    return {"gradients": first, "history": history, "tp": mesh.tp, "tp_rank": at.tp}


@cache
def dpo_reference() -> dict[str, Any]:
    return run_ranks(dpo_job, 1, {})[0]


def pairs_of_samples(numbers: range) -> int:
    """Samples whose first two documents both have a label that counts."""
    config = changed(base_config(), ISOLATED)
    found = 0
    for number in numbers:
        _, mask, starts = sample(config, number)
        _, second, third = starts.tolist()
        found += bool(mask[:second].any() and mask[second:third].any())
    return found


DPO_LAYOUTS = {
    "TP2 SP PP2": (4, {"parallel.tp": 2, "parallel.pp": 2}),
    "CP2 DP2, fused loss": (4, {"parallel.cp": 2, "parallel.dp": 2, "kernels.output_loss": "fused"}),
    "PP2 VPP2": (2, {"parallel.pp": 2, "parallel.vpp": 2}),
    "TP2 PP2 CP2 full recompute": (
        8,
        {"parallel.tp": 2, "parallel.pp": 2, "parallel.cp": 2, "parallel.recompute": "full"},
    ),
}


def layouts_of(names: Iterable[str], quick: set[str]) -> list[Any]:
    """Parameters, of which all but the ``quick`` ones are slow: the covering array has the objective as an axis."""
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in names]


@pytest.mark.parametrize("name", layouts_of(DPO_LAYOUTS, {"CP2 DP2, fused loss"}))
def test_dpo_in_every_layout_equals_one_process(name: str) -> None:
    processes, changes = DPO_LAYOUTS[name]
    expected = dpo_reference()
    ranks = run_ranks(dpo_job, processes, changes)
    wanted = np.array(expected["history"])
    assert wanted[0, 3] == pairs_of_samples(range(8)), "a pair is counted once, whatever ranks share its documents"
    for found in ranks:
        history = np.array(found["history"])
        np.testing.assert_allclose(history[:, :2], wanted[:, :2], rtol=2e-5, atol=1e-5)
        np.testing.assert_array_equal(history[:, 2:], wanted[:, 2:])
    gradient, tensor = worst_gradient(expected["gradients"], ranks)
    print(f"| {name} | {gradient:.1e} | {tensor} |")
    assert gradient <= 1e-5


def open_models(config: Any, rank: int, world_size: int) -> dict[str, Any]:
    """A policy of four layers, a critic of two that is trained too, and a reference of six that is not."""
    from llm_parallel.model.gpt import build_network
    from llm_parallel.model.numerics import Numerics
    from llm_parallel.parallel.engine import build_engine
    from llm_parallel.parallel.stages import Stages

    policy = open_engine(config, rank, world_size)
    groups, numerics = policy.groups, Numerics.from_config(config)

    def network(layers: int, seed: int) -> Any:
        model = config.model.model_copy(update={"num_layers": layers, "tie_embeddings": True})
        return build_network(model, numerics, groups, Stages.even(layers, groups.mesh.pp), seed)

    critic = build_engine(network(2, 5), config.optim, config.parallel)
    return {"policy": policy, "critic": critic, "reference": network(6, 6)}


def steps_of_all(models: dict[str, Any], config: Any, first: int, steps: int) -> list[tuple[float, float, float]]:
    """Trains policy and critic on the same samples; their losses and the reference's."""
    from llm_parallel.objectives.likelihood import Likelihood
    from llm_parallel.train.step import apply_gradient, evaluate, forward_backward

    history = []
    for step in range(first, first + steps):
        batches = own_batches(config, models["policy"].groups, 8 * step)
        losses = []
        for name in ("policy", "critic"):
            outcome = forward_backward(models[name], Likelihood(), batches)
            apply_gradient(models[name], outcome, config.optim.lr, config.optim.clip_grad)
            losses.append(outcome.loss)
        losses.append(evaluate(models["reference"], Likelihood(), batches)[0])
        history.append((losses[0], losses[1], losses[2]))
    return history


def save_models_job(rank: int, world_size: int, changes: dict[str, Any], folder: str, victim: int | None) -> list[Any]:
    """Three steps, a checkpoint and a copy in memory of them, and two steps more; ``victim`` dies by SIGKILL after the
    copy, without a word."""
    from llm_parallel.checkpoint.copies import MemoryCopies
    from llm_parallel.checkpoint.state import TrainState

    config = changed(base_config(), changes)
    models = open_models(config, rank, world_size)
    steps_of_all(models, config, 0, 3)
    state = TrainState(step=3, consumed_samples=24)
    open_store(models["policy"], config, f"{folder}/checkpoints").save(models, state, blocking=True)
    copies = MemoryCopies(models, Path(f"{folder}-copies"), 1, None, SECRET)
    copies.start(state)
    copies.finish()
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    copies.close()
    return steps_of_all(models, config, 3, 2) if victim is None else []


def resume_models_job(rank: int, world_size: int, changes: dict[str, Any], folder: str, copies: int) -> list[Any]:
    """Two steps from the checkpoint, or from the copies of ``copies`` processes, into models with other weights."""
    import torch

    from llm_launch.copy_files import copy_name
    from llm_parallel.checkpoint.copies import LocalSource, restore
    from llm_parallel.checkpoint.load import load_checkpoint
    from llm_parallel.parallel.engine import network_of

    config = changed(base_config(), changes)
    models = open_models(config, rank, world_size)
    with torch.no_grad():
        for name, model in models.items():
            # A network that nothing trains is not copied in memory: it comes from where it came before.
            if not copies or name != "reference":
                for chunk in network_of(model).models:
                    for parameter in chunk.parameters():
                        parameter.add_(0.37)
    for name in ("policy", "critic"):
        models[name].optimizer.reload_model_params()
    if copies:
        paths = [Path(f"{folder}-copies") / "own" / copy_name(1, number) for number in range(copies)]
        state = restore(models, [partial(LocalSource, path, 3) for path in paths])
    else:
        state = load_checkpoint(f"{folder}/checkpoints", models)
    assert (state.step, state.consumed_samples) == (3, 24)
    return steps_of_all(models, config, state.step, 2)


def test_two_models_are_saved_resumed_under_another_layout_and_recovered_from_memory(tmp_path: Path) -> None:
    layout = {"parallel.tp": 2, "parallel.pp": 2}
    undisturbed = run_ranks(save_models_job, 4, layout, str(tmp_path / "whole"), None)[0]
    alone = run_ranks(save_models_job, 1, {}, str(tmp_path / "alone"), None)[0]
    np.testing.assert_allclose(undisturbed, alone, atol=1e-5)
    again = run_ranks(resume_models_job, 4, layout, str(tmp_path / "whole"), 0)[0]
    assert again == undisturbed, "the same layout goes on bit for bit"
    other = {"parallel.pp": 2, "parallel.vpp": 2}
    np.testing.assert_allclose(
        run_ranks(resume_models_job, 2, other, str(tmp_path / "whole"), 0)[0], undisturbed, atol=1e-5
    )
    with pytest.raises(AssertionError, match=r"died without an answer|Connection|closed"):
        run_ranks(save_models_job, 4, layout, str(tmp_path / "killed"), 3)
    found = run_ranks(resume_models_job, 2, {"parallel.tp": 2}, str(tmp_path / "killed"), 4)[0]
    np.testing.assert_allclose(found, undisturbed, atol=1e-5)


def open_models_again(config: Any, models: dict[str, Any]) -> Any:
    """Another network as the reference's."""
    from llm_parallel.model.gpt import build_network

    (model,) = models["reference"].models
    return build_network(model.model_config, model.numerics, model.groups, model.stages, 7)


def refused_models_job(rank: int, world_size: int, folder: str) -> list[str]:
    """What loading says of a checkpoint that lacks a model, that has another critic, and that has one more."""
    from llm_parallel.checkpoint.load import load_checkpoint
    from llm_parallel.checkpoint.state import TrainState
    from llm_parallel.errors import UserError
    from llm_parallel.parallel.engine import build_engine

    config = base_config()
    models = open_models(config, rank, world_size)
    policy = {"policy": models["policy"]}
    open_store(models["policy"], config, f"{folder}/one").save(policy, TrainState(step=1), blocking=True)
    open_store(models["policy"], config, f"{folder}/all").save(models, TrainState(step=1), blocking=True)
    six = build_engine(open_models_again(config, models), config.optim, config.parallel)
    mixed = {**policy, "critic": six}
    open_store(models["policy"], config, f"{folder}/mixed").save(mixed, TrainState(step=1), blocking=True)
    said: list[str] = []
    for wanted, where in ((models, "one"), ({**policy, "critic": models["reference"]}, "all"), (policy, "all")):
        try:
            load_checkpoint(f"{folder}/{where}", wanted, changed=said.extend)
        except UserError as error:
            said.append(str(error))
    # The critic's optimizer of the other kind, beside a policy's of the same kind as before.
    plain = config.parallel.model_copy(update={"distributed_optimizer": False})
    critic = build_engine(models["reference"], config.optim, plain)
    try:
        load_checkpoint(f"{folder}/mixed", {**policy, "critic": critic})
    except UserError as error:
        said.append(str(error))
    return said


def test_a_checkpoint_of_other_models_is_refused_or_said(tmp_path: Path) -> None:
    lacks, differs, *unused, kind = run_ranks(refused_models_job, 1, str(tmp_path))[0]
    assert "parallel.distributed_optimizer of the critic was true" in kind and "is false now" in kind
    assert "does not hold the critic" in lacks
    assert "num_layers is 2 there and 6 here" in differs
    assert unused == ["model critic saved → not used", "model reference saved → not used"]
