"""PPO: a critic is trained beside the policy, the same in every layout and after every stop; the four-digit task is
learned; reward models of ours judge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.integration.test_prefer import start  # noqa: F401 (a fixture)
from tests.integration.test_rounds import STEPS_OF_ROUND, lines_of, steps_of, write_run
from tests.support.commands import events, losses, train_in_ranks
from tests.support.harness import run_ranks

pytestmark = pytest.mark.gloo

Task = Callable[..., Path]


def changed(run_file: Path, **method: Any) -> Path:
    """The run file with other fields in its section ``method``; those of a section are added to it."""
    tree = yaml.safe_load(run_file.read_text())
    for name, value in method.items():
        old = tree["method"].get(name)
        tree["method"][name] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    run_file.write_text(yaml.safe_dump(tree))
    return run_file


@pytest.fixture
def task(start: Path, tmp_path: Path) -> Task:  # noqa: F811
    """Writes a run file of PPO with every term of its losses."""

    def write(name: str, parallel: dict[str, int] | None = None, **method: Any) -> Path:
        run_file = write_run(start, tmp_path, "ppo", name, parallel=parallel or {})
        settings = {"entropy_weight": 0.01, "kl_weight": 0.05, "dual_clip": 3.0, "importance_cap": 2.0}
        return changed(run_file, **{"ppo": settings, "critic": {"lr": 2e-3}, **method})

    return write


def value_losses(run_dir: Path) -> list[float]:
    return [record["train/loss/value_avg"] for record in steps_of(run_dir)]


def same_answers(one: Path, other: Path, rounds: int = 3) -> None:
    for number in range(rounds):
        first, second = (
            {(line["prompt"], line["sample"]): line["tokens"] for line in lines_of(run_dir, "answers", number)}
            for run_dir in (one, other)
        )
        assert first == second and len(first) == 24


def test_a_layout_and_a_stop_in_the_middle_of_a_round_change_nothing(task: Task, tmp_path: Path) -> None:
    assert train_in_ranks(task("alone"), 1) == [6]
    run_file = task("many", {"tp": 2})
    assert train_in_ranks(run_file, 2, stop_at=3) == [3] * 2
    assert train_in_ranks(run_file, 2) == [6] * 2
    alone, many = tmp_path / "alone", tmp_path / "many"
    assert losses(many) == pytest.approx(losses(alone), abs=1e-5)
    assert value_losses(many) == pytest.approx(value_losses(alone), abs=1e-5)
    same_answers(alone, many)
    for record in steps_of(alone):
        first = (record["step"] - 1) % STEPS_OF_ROUND == 0
        assert (record["train/policy/ratio_error"] == 0.0) == first
        assert (record["train/val/clipfrac_avg"] == 0.0) or not first
        assert ("train/objective/scores" in record) == first
        assert record["train/policy/entropy_avg"] > 0
    divergences = [r["train/objective/kl"] for r in steps_of(alone) if "train/objective/kl" in r]
    assert divergences[0] == 0.0 and divergences[-1] > 0
    values = np.load(alone / "rounds" / "000002" / "values.npy")
    np.testing.assert_allclose(np.load(many / "rounds" / "000002" / "values.npy"), values, atol=1e-5)


LAYOUTS = {
    "TP2 SP PP2": (4, {"tp": 2, "pp": 2}),
    "CP2 DP2": (4, {"cp": 2, "dp": 2}),
    "PP2 VPP2": (2, {"pp": 2, "vpp": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_other_layouts(name: str, task: Task, tmp_path: Path) -> None:
    """After a stop in the middle of a round the run goes on in another one."""
    processes, parallel = LAYOUTS[name]
    train_in_ranks(task("alone"), 1)
    run_file = task("many", parallel)
    assert train_in_ranks(run_file, processes, stop_at=3) == [3] * processes
    train_in_ranks(run_file, 1, "parallel.tp=1", "parallel.pp=1", "parallel.vpp=1", "parallel.cp=1", "parallel.dp=1")
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)
    assert value_losses(tmp_path / "many") == pytest.approx(value_losses(tmp_path / "alone"), abs=1e-5)
    same_answers(tmp_path / "alone", tmp_path / "many")


@pytest.mark.slow
def test_values_that_are_lost_in_the_middle_of_a_round_are_refused(task: Task, tmp_path: Path) -> None:
    """The critic that gave them is gone; that of now would give others."""
    run_file = task("run")
    train_in_ranks(run_file, 1, stop_at=3)
    (tmp_path / "run" / "rounds" / "000001" / "values.npy").unlink()
    with pytest.raises(AssertionError, match=r"000001.values\.npy is not there as it was written"):
        train_in_ranks(run_file, 1)


def a_critic_that_fails(rank: int, loop: Any) -> None:
    """As if the critic's third loss were no number."""
    from llm_parallel.objectives.value import ClippedValue

    real, seen = loop.forward_backward, []

    def failing(engine: Any, objective: Any, *rest: Any) -> Any:
        outcome = real(engine, objective, *rest)
        seen.append(isinstance(objective, ClippedValue))
        return replace(outcome, loss=float("nan")) if seen[-1] and sum(seen) == 3 else outcome

    loop.forward_backward = failing


@pytest.mark.slow
def test_a_critic_that_is_not_finite_skips_the_step_of_both(task: Task, tmp_path: Path) -> None:
    train_in_ranks(task("run"), 1, prepare=a_critic_that_fails)
    (skipped,) = events(tmp_path / "run", "skip")
    assert skipped["step"] == 3 and skipped["reason"] == "loss nan of the critic"
    # The third step, the first of its round, changed nothing: the fourth is as before it.
    assert steps_of(tmp_path / "run")[3]["train/policy/ratio_error"] == 0.0


@pytest.mark.slow
def test_a_round_of_another_critic_is_answered_again(task: Task, tmp_path: Path) -> None:
    train_in_ranks(task("one"), 1)
    run_file = task("other", critic={"load": str(tmp_path / "one")})
    shutil.copytree(tmp_path / "one" / "rounds" / "000000", tmp_path / "other" / "rounds" / "000000")
    train_in_ranks(run_file, 1)
    first, second = (np.load(tmp_path / name / "rounds" / "000000" / "values.npy") for name in ("one", "other"))
    assert len(first) == len(second) and np.abs(first - second).max() > 0.1, (
        "the answers are the same, the critic is not"
    )


@pytest.mark.slow
def test_adapters_need_no_reference_beside(task: Task, tmp_path: Path) -> None:
    """The policy is trained by adapters, in a layout too; without them it is its own reference."""
    for name, processes, parallel in (("alone", 1, {}), ("many", 4, {"tp": 2, "pp": 2})):
        run_file = task(name, parallel)
        tree = yaml.safe_load(run_file.read_text())
        tree["adapter"] = {"rank": 4}
        tree["optim"]["lr"] = 1e-2
        run_file.write_text(yaml.safe_dump(tree))
        assert train_in_ranks(run_file, processes, stop_at=3) == [3] * processes
        assert train_in_ranks(run_file, processes) == [6] * processes
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)
    divergences = [r["train/objective/kl"] for r in steps_of(tmp_path / "alone") if "train/objective/kl" in r]
    assert divergences[0] == 0.0 and abs(divergences[-1]) > 0


def reward_run(start_: Path, folder: Path) -> Path:
    """The run folder of a reward model."""
    tree: dict[str, Any] = {
        "run_dir": str(folder / "reward"), "device": "cpu", "method": {"kind": "reward"},
        "checkpoint": {"load": str(start_ / "run")}, "data": {"seq_length_tokens": 96},
        "chat": {"train": [str(start_ / "pairs.jsonl")], "eval_fraction": 0.0},
        "train": {"global_batch_size": 8, "micro_batch_size": 2, "steps": 8, "threads_per_process": 1},
        "optim": {"lr": 3e-3, "schedule": "constant", "weight_decay": 0.0},
        "log": {"tensorboard": False, "plots": False},
    }  # fmt: skip
    path = folder / "reward.yaml"
    path.write_text(yaml.safe_dump(tree))
    train_in_ranks(path, 1)
    return folder / "reward"


def exported(rank: int, world_size: int, run_dir: str, target: str) -> None:
    from llm_parallel.convert.export import export_to_hf

    export_to_hf(run_dir, target)


def said_by_transformers(folder: Path, prompts: list[list[int]], answers: list[list[int]]) -> list[float]:
    """The score of each prompt with its answer, in fp64, one by one."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        hidden = [
            model.model(torch.tensor([prompt + answer])).last_hidden_state[0, -1]
            for prompt, answer in zip(prompts, answers)
        ]
        return [float(model.score(one)) for one in hidden]


@pytest.mark.slow
def test_a_reward_model_of_ours_judges_and_is_the_critics_beginning(
    task: Task,
    start: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """As a run and as a Hugging Face folder, in two layouts; its scores are transformers'."""
    reward = reward_run(start, tmp_path)
    run_ranks(exported, 1, str(reward), str(tmp_path / "hf"))
    for name, processes, parallel, folder in (
        ("alone", 1, {}, reward),
        ("many", 4, {"tp": 2, "pp": 2}, reward),
        ("hf", 2, {"cp": 2}, tmp_path / "hf"),
    ):
        run_file = task(name, parallel, critic=str(folder))
        changed(run_file, rollout={"judges": [{"kind": "reward_model", "folder": str(folder)}]})
        assert train_in_ranks(run_file, processes) == [6] * processes
    for name in ("many", "hf"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)
        same_answers(tmp_path / "alone", tmp_path / name)
    prompts = prompts_of(tmp_path / "alone")
    lines = lines_of(tmp_path / "alone", "answers", 0)
    asked = {(line["prompt"], line["sample"]): line["score"] for line in lines_of(tmp_path / "alone", "scores", 0)}
    wanted = said_by_transformers(
        tmp_path / "hf", [prompts[line["prompt"]] for line in lines], [x["tokens"] for x in lines]
    )
    found = [asked[line["prompt"], line["sample"]] for line in lines]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    held_out = [r["train/held_out/reward"] for r in steps_of(tmp_path / "alone") if "train/held_out/reward" in r]
    assert held_out == pytest.approx(
        [r["train/held_out/reward"] for r in steps_of(tmp_path / "many") if "train/held_out/reward" in r], abs=1e-5
    )
    # The critic began as the reward model, whose value at the last token but one is no constant.
    assert np.load(tmp_path / "alone" / "rounds" / "000000" / "values.npy").std() > 0.01


def prompts_of(run_dir: Path) -> dict[int, list[int]]:
    """Tokens of the prompts of the first round, by number."""
    from llm_parallel.config.load import load_config
    from llm_parallel.data.prompts import Prompts

    (folder,) = {path.parent for path in (run_dir / "data").rglob("prompts.jsonl")}
    config = load_config(str(run_dir.parent / f"{run_dir.name}.yaml"), [], notice=lambda _: None)
    asked = Prompts.open(folder).of_round(0, config.method.rollout.prompts, config.seed)
    return {number: list(prompt.tokens) for number, prompt in asked}


@pytest.mark.slow
def test_a_reward_model_that_says_nan_is_an_error(task: Task, start: Path, tmp_path: Path) -> None:  # noqa: F811
    """Never a score of 0, and no process waits for another."""
    import torch
    from safetensors.torch import load_file, save_file

    run_ranks(exported, 1, str(reward_run(start, tmp_path)), str(tmp_path / "hf"))
    path = next((tmp_path / "hf").glob("*.safetensors"))
    tensors = load_file(path)
    tensors["score.weight"] = torch.full_like(tensors["score.weight"], float("nan"))
    save_file(tensors, path, metadata={"format": "pt"})
    run_file = changed(
        task("run", {"dp": 2}), rollout={"judges": [{"kind": "reward_model", "folder": str(tmp_path / "hf")}]}
    )
    with pytest.raises(AssertionError, match=r"the reward model in .*hf says nan"):
        train_in_ranks(run_file, 2)
    assert not (tmp_path / "run" / "rounds" / "000000" / "scores-0.jsonl").exists() or not json.loads(
        (tmp_path / "run" / "rounds" / "000000" / "scores-0.jsonl").read_text() or "[]"
    )
