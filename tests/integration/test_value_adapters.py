"""Adapters of models that give values, in whole runs: a reward model, which judges afterwards, and PPO's critic."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.integration.test_ppo import Task, same_answers, task, value_losses  # noqa: F401 (a fixture)
from tests.integration.test_prefer import start  # noqa: F401 (a fixture)
from tests.integration.test_prefer import write_run as write_preferences
from tests.integration.test_rounds import lines_of, write_run
from tests.support.commands import losses, train_in_ranks
from tests.support.harness import run_ranks
from tests.support.in_process import in_process

pytestmark = [pytest.mark.gloo, pytest.mark.slow]


def with_adapters(run_file: Path, **adapter: Any) -> Path:
    tree = yaml.safe_load(run_file.read_text())
    tree |= {"adapter": {"rank": 4, **adapter}, "optim": {**tree["optim"], "lr": 1e-2}}
    run_file.write_text(yaml.safe_dump(tree))
    return run_file


def held(rank: int, world_size: int, run_file: str) -> dict[str, Any]:
    """Whether the critic's frozen weights are the policy's, and what a checkpoint would hold of the critic."""
    from llm_parallel.checkpoint.content import weights_state
    from llm_parallel.config.load import load_config
    from llm_parallel.parallel.groups import open_groups
    from llm_parallel.parallel.layout import Layout
    from llm_parallel.parallel.platform import open_platform
    from llm_parallel.train.preflight import preflight
    from llm_parallel.tune.ppo import policy_and_critic

    config = preflight(load_config(run_file, [], notice=lambda _: None), world_size)
    groups = open_groups(Layout.from_config(config, world_size), rank, open_platform("cpu"), config.seed)
    models = policy_and_critic(config, groups)
    policy, critic = (dict(models[name].models[0].named_parameters()) for name in ("policy", "critic"))  # type: ignore[union-attr]
    frozen = {name for name, parameter in critic.items() if not parameter.requires_grad}
    same = all(critic[name].data_ptr() == policy[name].data_ptr() for name in frozen)
    network = models["critic"].network  # type: ignore[union-attr]
    return {"same": same, "frozen": sorted(frozen), "saved": sorted(weights_state(network)["model"])}


@pytest.mark.parametrize("base", ["full", "nf4"])
def test_a_critic_of_adapters_stands_on_the_policys_weights(
    base: str,
    task: Task,  # noqa: F811
    tmp_path: Path,
) -> None:
    """The same losses in a layout and after a stop in the middle of a round, in another one too."""
    critic = {"adapters": True, "lr": 2e-3}
    targets = ["q", "v", "o", "down", *([] if base == "nf4" else ["embed_tokens", "lm_head"])]
    settings = {"base": base, "targets": targets}
    assert train_in_ranks(with_adapters(task("alone", critic=critic), **settings), 1) == [6]
    run_file = with_adapters(task("many", {"tp": 2, "pp": 2}, critic=critic), **settings)
    assert train_in_ranks(run_file, 4, stop_at=3) == [3] * 4
    train_in_ranks(run_file, 1, "parallel.tp=1", "parallel.pp=1")
    alone, many = tmp_path / "alone", tmp_path / "many"
    assert losses(many) == pytest.approx(losses(alone), abs=1e-5)
    assert value_losses(many) == pytest.approx(value_losses(alone), abs=1e-5)
    same_answers(alone, many)
    first, *_, last = (
        np.load(alone / "rounds" / "000000" / "values.npy"),
        np.load(alone / "rounds" / "000002" / "values.npy"),
    )
    assert np.abs(first).max() > 0 and last.std() > 0
    found = run_ranks(held, 1, str(tmp_path / "alone.yaml"))[0]
    assert found["same"] and "embedding.word_embeddings.weight" in found["frozen"]
    assert all(".adapter." in name or name == "value_head.weight" for name in found["saved"])
    # A run whose critic is whole does not go on from it.
    with pytest.raises(AssertionError, match=r"holds adapters of the critic, and this run trains a whole model"):
        train_in_ranks(run_file, 1, "method.critic.adapters=false", "parallel.tp=1", "parallel.pp=1", "train.steps=8")


def peft_value(rank: int, world_size: int, folders: dict[str, str], text: str) -> list[float]:
    """The value of an answer: by ours from the run's adapters and from PEFT's folder, by PEFT, and merged by
    transformers."""
    import peft
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from llm_parallel.generate.load import load_model
    from llm_parallel.parallel.groups import close_groups

    found = []
    tokenizer = AutoTokenizer.from_pretrained(folders["merged"])
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        for name in ("run", "peft"):
            found.append(float(load_model(folders[name], device="cpu", values=True).network.models[0](ids)[0, -1]))
            close_groups(world=False)
        base = AutoModelForSequenceClassification.from_pretrained(folders["base"], num_labels=1)
        found.append(float(peft.PeftModel.from_pretrained(base, folders["peft"])(ids).logits))
        found.append(float(AutoModelForSequenceClassification.from_pretrained(folders["merged"])(ids).logits))
    return found


def test_a_reward_model_of_adapters_is_trained_exported_and_judges(
    start: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    written, base = partial(write_preferences, start, tmp_path), tmp_path / "base"
    assert in_process("convert", start / "run", base).returncode == 0
    shared: dict[str, Any] = {
        "adapter": {"rank": 4, "targets": ["q", "v", "down"]},
        "checkpoint": {"load": str(base)},
        "optim": {"lr": 1e-2},
        "train": {"steps": 16},
    }
    assert train_in_ranks(written("reward", "alone", **shared), 1) == [16]
    run_file = written("reward", "many", parallel={"tp": 2, "pp": 2}, **shared)
    assert train_in_ranks(run_file, 4, stop_at=6) == [6] * 4
    assert train_in_ranks(run_file, 1, "parallel.tp=1", "parallel.pp=1") == [16]
    alone, many = tmp_path / "alone", tmp_path / "many"
    assert losses(many) == pytest.approx(losses(alone), abs=1e-4)
    assert losses(alone)[16] < losses(alone)[1] - 0.01, losses(alone)
    folders = {"run": str(alone), "peft": str(tmp_path / "peft"), "merged": str(tmp_path / "hf"), "base": str(base)}
    for target, options in ((folders["peft"], ()), (folders["merged"], ("--merge",))):
        done = in_process("convert", alone, target, *options)
        assert done.returncode == 0 and "gives texts a value" in done.stdout, done.stdout + done.stderr
    text = "<|im_start|>user\n12+34<|im_end|>\n<|im_start|>assistant\n4321<|im_end|>"
    values = run_ranks(peft_value, 1, folders, text)[0]
    assert values == pytest.approx([values[0]] * 4, abs=1e-5) and abs(values[0]) > 1e-3
    # It judges in the processes of a run, as it does merged.
    for name, folder, processes, parallel in (
        ("judged", alone, 2, {"tp": 2}),
        ("by the merged", tmp_path / "hf", 1, {}),
    ):
        run_file = write_run(start, tmp_path, "grpo", name, parallel=parallel)
        tree = yaml.safe_load(run_file.read_text())
        tree["method"]["rollout"]["judges"] = [{"kind": "reward_model", "folder": str(folder)}]
        tree["train"]["steps"] = 2
        run_file.write_text(yaml.safe_dump(tree))
        train_in_ranks(run_file, processes)
    assert losses(tmp_path / "judged") == pytest.approx(losses(tmp_path / "by the merged"), abs=1e-5)
    scores = [
        {(line["prompt"], line["sample"]): line["score"] for line in lines_of(tmp_path / name, "scores", 0)}
        for name in ("judged", "by the merged")
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5) and len(set(scores[0].values())) > 3
