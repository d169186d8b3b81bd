"""What can be wrong with a run of PPO, or with a reward model that judges: one sentence before any process starts. And
what a dry run says of its two models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_parallel.config.load import load_config
from llm_parallel.errors import UserError
from llm_parallel.train.preflight import preflight
from llm_parallel.train.room import checkpoint_bytes, copies_bytes
from llm_parallel.worker.show import _memory
from tests.support import four_digits
from tests.unit.test_prefer_bad_input import PROMPTS, hf_folder, prepare


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, and beside it a reward model, one with other tokens, one with fewer heads, and with two
    labels."""
    folder = tmp_path_factory.mktemp("models")
    other = [*reversed(four_digits.TOKENS[:10]), *four_digits.TOKENS[10:]]
    valued = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    written(hf_folder(folder / "reward"), **valued)
    written(hf_folder(folder / "other reward", other), **valued)
    hf_folder(folder / "other", other)
    written(
        hf_folder(folder / "odd"), num_attention_heads=3, num_key_value_heads=3, hidden_size=48, num_hidden_layers=3
    )
    written(hf_folder(folder / "two labels"), **valued | {"id2label": {"0": "a", "1": "b"}})
    return hf_folder(folder / "model")


def written(folder: Path, **changes: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


JUDGED = "method.rollout.judges=[{kind: reward_model, folder: 'MODELS/NAME'}]"
REFUSED: dict[str, tuple[str, list[str], str]] = {
    "lambda over 1": ("ppo", ["method.ppo.gae_lambda=1.1"], "method.ppo.gae_lambda = 1.1"),
    "gamma under 0": ("ppo", ["method.ppo.gamma=-0.1"], "method.ppo.gamma = -0.1"),
    "dual clip of 1": ("ppo", ["method.ppo.dual_clip=1"], "method.ppo.dual_clip = 1"),
    "negative weight of the divergence": ("ppo", ["method.ppo.kl_weight=-1"], "method.ppo.kl_weight = -1"),
    "minibatches that do not divide": (
        "ppo", ["train.global_batch_size=5"], "which train.global_batch_size = 5 does not divide"
    ),
    "a critic for grpo": ("grpo", ["method.critic=MODELS/reward"], "method.critic.load = .* has no effect"),
    "a critic's rate for grpo": ("grpo", ["method.critic.lr=1e-3"], "method.critic.lr = 0.001 has no effect"),
    "settings of ppo for grpo": ("grpo", ["method.ppo.gamma=0.9"], "method.ppo.gamma = 0.9 has no effect"),
    "adapters of a critic without a kind": (
        "ppo", ["method.critic.adapters=true"], "method.critic.adapters = true .* which is not given"
    ),
    "adapters of a critic of its own": (
        "ppo", ["adapter.rank=4", "method.critic={load: MODELS/reward, adapters: true}"],
        "puts adapters on the policy's frozen weights, and method.critic.load = .* has others",
    ),
    "adapters of a critic on weights that are trained": (
        "ppo", ["adapter.modules_to_save=[embed_tokens,lm_head]", "method.critic.adapters=true"],
        "needs the policy's weights as they are, and adapter.modules_to_save = ",
    ),
    "adapters of a critic on what it has not": (
        "ppo", ["adapter.targets=[lm_head]", "method.critic.adapters=true"], "has lm_head alone, which a critic has not"
    ),
    "no such critic": ("ppo", ["method.critic=FOLDER/none"], "method.critic.load = .*none does not exist"),
    "a critic of another tokenizer": (
        "ppo", ["method.critic=MODELS/other"], "method.critic.load = .* cannot read the answers, since 10 tokens"
    ),
    "a critic that the layout does not divide": (
        "ppo", ["method.critic=MODELS/odd", "parallel.tp=2", "parallel.pp=2"], "the run's layout does not divide"
    ),
    "a critic with two labels": ("ppo", ["method.critic=MODELS/two labels"], "critic.load = .* cannot be taken"),
    "a reference without a weight": (
        "ppo", ["method.ppo.kl_weight=0", "method.reference.load=MODELS/model"], "ppo has no reference"
    ),
    "an estimator without effect": ("ppo", ["method.ppo.estimator=k2"], "method.ppo.estimator = k2 has no effect"),
    "entropies without logits": (
        "ppo", ["method.ppo.entropy_weight=0.01", "kernels.output_loss=fused"], "entropy_weight = 0.01 needs all logits"
    ),
    "a judge without a model": (
        "ppo", ["method.rollout.judges=[{kind: reward_model}]"], "method.rollout.judges.0.folder is not given"
    ),
    "no such judge": ("grpo", [JUDGED.replace("NAME", "none")], "judges.0.folder = .*none does not exist"),
    "a judge that gives no values": (
        "grpo", [JUDGED.replace("NAME", "model")], "method.rollout.judges.0.folder = .*model holds a language model"
    ),
    "a judge of another tokenizer": (
        "grpo", [JUDGED.replace("NAME", "other reward")], "judges.0.folder = .*other reward cannot read the answers"
    ),
    "no judge": ("ppo", ["method.rollout.judges=[]"], "method.rollout.judges is empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_one_sentence(name: str, model: Path, tmp_path: Path) -> None:
    kind, overrides, words = REFUSED[name]
    with pytest.raises(UserError, match=words) as found:
        prepare(model, tmp_path, kind, PROMPTS, *overrides)
    assert len(str(found.value).splitlines()) == 1


def test_critics_and_reward_models_that_fit(model: Path, tmp_path: Path) -> None:
    """A critic may have other sizes than the policy."""
    prepare(model, tmp_path, "ppo", PROMPTS, "method.critic=MODELS/odd", JUDGED.replace("NAME", "reward"))
    prepare(model, tmp_path, "ppo", PROMPTS, "method.critic.load=MODELS/reward", "method.ppo.kl_in=loss")


def test_room_for_both_models(model: Path, tmp_path: Path) -> None:
    prepare(model, tmp_path, "ppo", PROMPTS)
    config = preflight(load_config(tmp_path / "run.yaml", [], notice=lambda _: None))
    alone = preflight(load_config(tmp_path / "run.yaml", ["method.kind=grpo"], notice=lambda _: None))
    for size in (checkpoint_bytes, lambda one: copies_bytes(one, 2)):
        assert 1.4 < size(config) / size(alone) < 2.0, "the critic has no output projection"
    assert "of tensors of policy and critic (weights" in _memory(config, 1)
    assert "policy and critic" not in _memory(alone, 1)
