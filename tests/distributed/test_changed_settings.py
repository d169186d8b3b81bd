"""A resumed run's optimizer does what the run file says now, not what it said when the state was saved."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_checkpoint import _p
from tests.support.ckpt_jobs import open_store
from tests.support.harness import run_ranks
from tests.support.job import base_config, changed, open_engine, own_batches, train_steps

pytestmark = pytest.mark.gloo

SECRET, STEPS = "of this test", 3
NEW = {"optim.weight_decay": 20.0, "optim.beta1": 0.8, "optim.beta2": 0.9, "optim.epsilon": 1e-3}
"""Far enough from the defaults (0.1, 0.9, 0.95, 1e-8) that each of them alone moves weights by more than the bound."""


def save_job(rank: int, world_size: int, changes: dict[str, Any], folder: str) -> None:
    """Three steps, and their state as a checkpoint and as copies in memory."""
    from llm_parallel.checkpoint.copies import MemoryCopies
    from llm_parallel.checkpoint.state import TrainState

    config = changed(base_config(), changes)
    engine = open_engine(config, rank, world_size)
    train_steps(engine, config, 0, STEPS)
    state = TrainState(step=STEPS, consumed_samples=8 * STEPS)
    store = open_store(engine, config, f"{folder}/checkpoints")
    store.save({"policy": engine}, state, blocking=True)
    store.wait()
    memory = MemoryCopies({"policy": engine}, Path(folder) / "node", 1, None, SECRET)
    memory.start(state)
    memory.finish()
    memory.close()


def shards(engine: Any) -> list[tuple[Any, Any, float]]:
    """Every fp32 weight tensor that this process updates, its AdamW state, and whether it decays (1 or 0), by the shape
    of the parameter that it is of."""
    from llm_parallel.parallel.mcore_optimizer import shards_of

    return [(s.main, s.inner.state[s.main], float(s.parameter.dim() > 1)) for s in shards_of(engine.optimizer)]


def resume_job(rank: int, world_size: int, changes: dict[str, Any], folder: str, where: str) -> tuple[float, list[str]]:
    """Largest difference, over three steps, from AdamW's formula in fp64 with the new settings; and what was said."""
    import torch

    from llm_launch.copy_files import copy_name
    from llm_parallel.checkpoint.copies import LocalSource, restore
    from llm_parallel.checkpoint.load import load_checkpoint
    from llm_parallel.objectives.likelihood import Likelihood
    from llm_parallel.train.step import forward_backward

    config = changed(base_config(), changes)
    engine = open_engine(config, rank, world_size)
    said: list[str] = []
    if where == "memory":
        paths = [Path(folder) / "node" / "own" / copy_name(1, saved) for saved in range(world_size)]
        restore({"policy": engine}, [partial(LocalSource, path, STEPS) for path in paths], said.extend)
    else:
        load_checkpoint(f"{folder}/checkpoints", {"policy": engine}, changed=said.extend)
    optim, worst = config.optim, 0.0
    held = shards(engine)
    assert {decays for _, _, decays in held} == {0.0, 1.0}
    expected = [
        [main.double().clone(), state["exp_avg"].double().clone(), state["exp_avg_sq"].double().clone()]
        for main, state, _ in held
    ]
    for step in range(STEPS, 2 * STEPS):
        outcome = forward_backward(engine, Likelihood(), own_batches(config, engine.groups, 8 * step))
        for group in engine.optimizer.param_groups:
            group["lr"] = optim.lr
        for (main, _, decays), (weight, first, second) in zip(held, expected):
            gradient = main.grad.double()
            first.mul_(optim.beta1).add_(gradient, alpha=1 - optim.beta1)
            second.mul_(optim.beta2).add_(gradient**2, alpha=1 - optim.beta2)
            unbiased = first / (1 - optim.beta1 ** (step + 1)), second / (1 - optim.beta2 ** (step + 1))
            weight.mul_(1 - optim.lr * optim.weight_decay * decays)
            weight.sub_(optim.lr * unbiased[0] / (unbiased[1].sqrt() + optim.epsilon))
        engine.step(0.0, outcome.grad_norm)
        for (main, _, _), (weight, _, _) in zip(held, expected):
            worst = max(worst, float((main.double() - weight).abs().max()))
            with torch.no_grad():
                weight.copy_(main)  # each step by itself: rounding does not add up
    return worst, said


LAYOUTS = {
    "plain": (_p(distributed_optimizer=False), 1),
    "plain bf16": ({**_p(distributed_optimizer=False), "train.precision": "bf16"}, 1),
    "distributed": (_p(dp=2), 2),
    "triton": ({**_p(dp=2), "optim.implementation": "triton"}, 2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_three_steps_follow_the_new_settings(name: str, tmp_path: Path) -> None:
    """All four together, from disk and from memory."""
    layout, processes = LAYOUTS[name]
    run_ranks(save_job, processes, layout, str(tmp_path))
    for where in ("disk", "memory"):
        for worst, said in run_ranks(resume_job, processes, layout | NEW, str(tmp_path), where):
            print(f"| {name} | {where} | {worst:.1e} |")
            assert worst <= 1e-6
            assert sorted(said) == [
                "optim.beta1 0.9 → 0.8",
                "optim.beta2 0.95 → 0.9",
                "optim.epsilon 1e-08 → 0.001",
                "optim.weight_decay 0.1 → 20",
            ]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the state of one process, which the tests below only read."""
    folder = str(tmp_path_factory.mktemp("saved"))
    run_ranks(save_job, 1, {}, folder)
    return folder


@pytest.mark.parametrize("field", NEW)
def test_each_setting_by_itself(field: str, saved: str) -> None:
    for where in ("disk", "memory"):
        ((worst, said),) = run_ranks(resume_job, 1, {field: NEW[field]}, saved, where)
        assert worst <= 1e-6 and [text.split()[0] for text in said] == [field]


def test_nothing_is_said_when_nothing_changed(saved: str) -> None:
    for where in ("disk", "memory"):
        ((worst, said),) = run_ranks(resume_job, 1, {}, saved, where)
        assert worst <= 1e-6 and said == []


class Apex:
    """What apex's FusedAdam keeps: one step count for all, in the groups."""

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        self.defaults = {"lr": 1e-3, "bias_correction": True, **settings}
        self.param_groups = groups


def test_apexs_groups_get_them_too() -> None:
    """apex needs a GPU: its groups as they are after loading."""
    from types import SimpleNamespace

    from llm_parallel.checkpoint.optimizer import apply_configured_settings, settings_in_use

    loaded = {"lr": 0.5, "bias_correction": True, "betas": (0.9, 0.95), "eps": 1e-8, "step": 7}
    groups = [{**loaded, "weight_decay": 0.1, "wd_mult": 1.0}, {**loaded, "weight_decay": 0.0, "wd_mult": 0.0}]
    inner = Apex(groups, betas=(0.8, 0.9), eps=1e-3, weight_decay=20.0)
    engine: Any = SimpleNamespace(optimizer=SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=inner)]))
    apply_configured_settings(engine)
    assert settings_in_use(engine) == {**NEW, "optim.moment_bits": 32.0}
    assert [group["weight_decay"] for group in groups] == [20.0, 0.0]
    assert all(group["lr"] == 0.5 and group["step"] == 7 for group in groups)
