"""A step of PPO on a round that the run sampled itself: losses and every gradient of policy and critic against fp64,
from the answers alone, in every kind of layout."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.distributed.test_layouts import worst_gradient
from tests.integration.test_rounds import lines_of, write_prompts
from tests.support import four_digits, preference_math
from tests.support.harness import run_ranks

pytestmark = pytest.mark.gloo
SIZES = {
    "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 16, "max_position_embeddings": 256, "initializer_range": 0.15,
    "bos_token_id": None, "eos_token_id": four_digits.END, "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
PPO = {"gamma": 0.97, "gae_lambda": 0.9, "clip_low": 0.1, "clip_high": 0.2, "dual_clip": 1.5, "value_clip": 0.3,
       "entropy_weight": 0.05, "kl_weight": 0.1}  # fmt: skip
TOLERANCE = 1e-5


def moved(model: Any, seed: int, size: float) -> Any:
    """The model with noise on all of its weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face folders: the policy and the critic that a round begins with, what they are like some steps later,
    and the reference."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("folders")
    torch.manual_seed(0)
    policy = LlamaForCausalLM(LlamaConfig(**SIZES)).float()
    critic = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1)).float()
    four_digits.write_tokenizer(folder / "policy")
    policy.save_pretrained(folder / "policy")
    moved(policy, 1, 0.01).save_pretrained(folder / "reference")
    moved(policy, 2, 0.01).save_pretrained(folder / "policy later")
    critic.save_pretrained(folder / "critic")
    moved(critic, 3, 0.01).save_pretrained(folder / "critic later")
    write_prompts(folder / "prompts.jsonl", 40)
    (folder / "judge.py").write_text(
        "def reward(answer, record, **_):\n    return len(set(answer) & set(record['answer'])) - 0.1 * len(answer)\n"
    )
    return folder


def write_run(folders: Path, name: str, ppo: dict[str, Any], **more: Any) -> Path:
    """One step a round, on all of its answers."""
    rollout = {
        "prompts": 6, "answers": 4, "max_new_tokens": 6, "unfinished_score": None, "held_out_interval": None,
        "judges": [{"kind": "function", "file": str(folders / "judge.py")}],
    }  # fmt: skip
    method = {"kind": "ppo", "rollout": rollout, "ppo": PPO | ppo, "critic": str(folders / "critic")}
    tree: dict[str, Any] = {
        "run_dir": str(folders / name / "run"), "device": "cpu",
        "method": method | more.pop("method", {"reference": {"load": str(folders / "reference")}}),
        "checkpoint": {"load": str(folders / "policy")}, "data": {"seq_length_tokens": 64},
        "chat": {"train": [str(folders / "prompts.jsonl")], "eval_fraction": 0.0},
        "train": {"global_batch_size": 24, "micro_batch_size": 1, "steps": 4, "threads_per_process": 1},
        "log": {"tensorboard": False, "plots": False}, **more,
    }  # fmt: skip
    (folders / name).mkdir(exist_ok=True)
    path = folders / name / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def job(
    rank: int, world_size: int, run_file: str, overrides: list[str], later: dict[str, str], wanted: dict[str, str]
) -> dict[str, Any]:
    """Losses and gradients of both models as they are ``later`` over the round that they began with. ``wanted``:
    folders that hold a gradient in the place of each weight, of which this process's parts are returned beside its
    own."""
    from llm_parallel.checkpoint.base import load_adapters
    from llm_parallel.config.load import load_config
    from llm_parallel.model.adapters import adapters_of
    from llm_parallel.model.hf import load_hf_weights
    from llm_parallel.model.peft_files import peft_tensors
    from llm_parallel.parallel.groups import close_groups
    from llm_parallel.train.open import open_run
    from llm_parallel.train.preflight import preflight
    from llm_parallel.train.run import Place
    from llm_parallel.train.step import forward_backward
    from llm_parallel.train.watch import Watch
    from llm_parallel.tune.methods import method_of
    from tests.support.job import gradients

    config = preflight(load_config(run_file, overrides, notice=lambda _: None), world_size)
    method = method_of(config)
    run = open_run(config, Place(rank, world_size, rank), lambda: False, Watch(), method)
    method.begin(run)
    batches = run.feed.step(run.state)
    objectives = {"policy": run.objective} | {name: one.objective for name, one in run.also.items()}
    found: dict[str, Any] = {"tp": run.groups.mesh.tp, "tp_rank": run.groups.at.tp, "losses": {}}
    for name, folder in later.items():
        engine = run.engines[name]
        if engine.network.base is None:
            load_hf_weights(folder, engine.models)
        else:
            load_adapters(folder, engine.network)
        engine.optimizer.reload_model_params()
        outcome = forward_backward(engine, objectives[name], batches)
        found["losses"][name] = outcome.loss
        own = {tensor: gradient.numpy() for tensor, gradient in gradients(engine).items()}
        found |= {name: {"gradients": own, "tp": found["tp"], "tp_rank": found["tp_rank"]}, "count": outcome.count}
        if engine.network.base is not None and world_size == 1:
            assert config.adapter is not None
            by_name = {}
            for layer, linear, adapter in adapters_of(engine.models):
                both = adapter.a.main_grad, adapter.b.main_grad
                by_name |= peft_tensors(config.model, config.adapter, layer, linear, *both)
            found["peft"] = {tensor: gradient.clone().numpy() for tensor, gradient in by_name.items()}
        if name in wanted:
            parts: dict[str, Any] = {}
            load_hf_weights(wanted[name], engine.models, partial(keep, parts))
            found[f"{name} wanted"] = parts
    run.feed.close()
    run.metrics.close()
    close_groups(world=False)
    return found


def keep(into: dict[str, Any], chunk: Any, name: str, values: torch.Tensor) -> None:
    into[name] = values.float().numpy()


def spoken(model: Any, prompt: list[int], answer: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of an answer's tokens, and the entropies of the distributions that they were drawn from."""
    logits = model(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
    log_p = logits.log_softmax(-1)
    return log_p[torch.arange(len(answer)), answer], -(log_p.exp() * log_p).sum(-1)


def valued(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Values of the texts before each of an answer's tokens."""
    hidden = model.model(torch.tensor([prompt + answer[:-1]])).last_hidden_state[0, len(prompt) - 1 :]
    return model.score(hidden)[:, 0]


def opened(folder: Path) -> Any:
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    kind = LlamaForSequenceClassification if "critic" in folder.name else LlamaForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")


def answers_in(run_dir: Path) -> list[tuple[list[int], list[int], float]]:
    """Prompt, answer and score of each answer of the first round."""
    from llm_parallel.config.load import load_config
    from llm_parallel.data.prompts import Prompts

    (folder,) = {path.parent for path in (run_dir / "data").rglob("prompts.jsonl")}
    seed = load_config(str(run_dir.parent / "run.yaml"), [], notice=lambda _: None).seed
    prompts = {number: list(prompt.tokens) for number, prompt in Prompts.open(folder).of_round(0, 6, seed)}
    scores = {(line["prompt"], line["sample"]): line["score"] for line in lines_of(run_dir, "scores", 0)}
    lines = sorted(lines_of(run_dir, "answers", 0), key=lambda line: (line["prompt"], line["sample"]))
    assert len(lines) == 24
    return [(prompts[line["prompt"]], line["tokens"], scores[line["prompt"], line["sample"]]) for line in lines]


def exact(
    answers: list[tuple[list[int], list[int], float]], ppo: dict[str, Any], models: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Losses of policy and critic as they are later, in fp64, from the papers' formulas."""
    s = PPO | ppo
    rows = []
    with torch.no_grad():
        for prompt, answer, score in answers:
            old, reference = (spoken(models[name], prompt, answer)[0] for name in ("policy", "reference"))
            before = valued(models["critic"], prompt, answer)
            price = s["kl_weight"] if s.get("kl_in", "reward") == "reward" else 0.0
            rewards = (-price * (old - reference)).tolist()
            rewards[-1] += score
            advantages, returns = preference_math.gae(rewards, before.tolist(), s["gamma"], s["gae_lambda"])
            rows.append((old, reference, before, torch.tensor(advantages).double(), torch.tensor(returns).double()))
    everything = torch.cat([row[3] for row in rows])
    mean, spread = everything.mean(), everything.std(unbiased=False)
    policy, critic, count = [], [], 0
    for (prompt, answer, _), (old, reference, before, advantages, returns) in zip(answers, rows):
        logps, entropies = spoken(models["policy later"], prompt, answer)
        gains = (advantages - mean) / spread
        ratio = torch.exp(logps - old)
        gain = torch.minimum(ratio * gains, ratio.clamp(1 - s["clip_low"], 1 + s["clip_high"]) * gains)
        gain = torch.where(gains < 0, torch.maximum(gain, s["dual_clip"] * gains), gain)
        loss = -gain - s["entropy_weight"] * entropies
        if s.get("kl_in") == "loss":
            loss = loss + s["kl_weight"] * (torch.exp(reference - logps) - 1 - (reference - logps))
        policy.append(loss.sum())
        values = valued(models["critic later"], prompt, answer)
        bounded = before + (values - before).clamp(-s["value_clip"], s["value_clip"])
        critic.append(0.5 * torch.maximum((values - returns) ** 2, (bounded - returns) ** 2).sum())
        count += len(answer)
    return {"policy": torch.stack(policy).sum() / count, "critic": torch.stack(critic).sum() / count}


def write_gradients(model: Any, like: Path, folder: Path) -> Path:
    """A folder as that of ``model``, with gradients for weights."""
    from safetensors.torch import save_file

    folder.mkdir()
    shutil.copy(like / "config.json", folder)
    tensors = {name: parameter.grad.float() for name, parameter in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def distance(own: np.ndarray, wanted: np.ndarray) -> float:
    """||g - g0|| / ||g0||; the rows that pad the vocabulary may be all of a shard, and have gradient 0."""
    scale = float(np.linalg.norm(wanted.astype(np.float64)))
    return float(np.linalg.norm(own.astype(np.float64) - wanted)) / (scale or 1e-30)


KINDS: dict[str, dict[str, Any]] = {"KL in the reward": {}, "KL in the loss": {"kl_in": "loss"}}


@pytest.fixture(scope="module")
def reference(folders: Path) -> Callable[[str], tuple[dict[str, float], dict[str, str]]]:
    """Losses in fp64, and folders of the gradients; the answers are those of one process."""

    @cache
    def computed(kind: str) -> tuple[dict[str, float], dict[str, str]]:
        run_file = write_run(folders, kind, KINDS[kind])
        run_ranks(job, 1, str(run_file), [], {}, {})
        names = ("policy", "reference", "critic", "policy later", "critic later")
        models = {name: opened(folders / name) for name in names}
        losses = exact(answers_in(folders / kind / "run"), KINDS[kind], models)
        found = {}
        for name, loss in losses.items():
            loss.backward()
            like = folders / f"{name} later"
            found[name] = str(write_gradients(models[f"{name} later"], like, folders / kind / name))
        return {name: float(loss.detach()) for name, loss in losses.items()}, found

    return computed


LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []),
    "TP2 SP PP2": (4, ["parallel.tp=2", "parallel.pp=2"]),
    "TP2 without SP": (2, ["parallel.tp=2", "parallel.sequence_parallel=false"]),
    "DP2": (2, ["parallel.dp=2"]),
    "CP2": (2, ["parallel.cp=2"]),
    "PP2 VPP2 CP2": (4, ["parallel.pp=2", "parallel.vpp=2", "parallel.cp=2"]),
}
QUICK = {("KL in the reward", "one process")}
"""In the other layouts by default: tests/integration/test_ppo.py, which compares the losses of six steps."""


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, marks=[] if (kind, name) in QUICK else [pytest.mark.slow])
        for kind in KINDS
        for name in LAYOUTS
    ],
)
def test_losses_and_gradients_are_those_of_the_papers(
    kind: str, name: str, folders: Path, reference: Callable[[str], tuple[dict[str, float], dict[str, str]]]
) -> None:
    losses, wanted = reference(kind)
    processes, overrides = LAYOUTS[name]
    later = {model: str(folders / f"{model} later") for model in ("policy", "critic")}
    other = [*overrides, f"run_dir={folders}/{kind}/{name}"]
    ranks = run_ranks(job, processes, str(folders / kind / "run.yaml"), other, later, wanted)
    for found in ranks:
        for model in ("policy", "critic"):
            assert found["losses"][model] == pytest.approx(losses[model], abs=TOLERANCE)
            parts, own = found[f"{model} wanted"], found[model]["gradients"]
            assert parts.keys() == own.keys()
            worst = max((distance(own[tensor], part), tensor) for tensor, part in parts.items())
            print(f"| {kind} | {name} | {model} | {found['losses'][model]:.6f} | {worst[0]:.1e} | {worst[1]} |")
            assert worst[0] <= TOLERANCE


def adapted(folders: Path, name: str, seed: int) -> Any:
    """PEFT's adapters on the policy, and their files."""
    import peft

    torch.manual_seed(seed)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(opened(folders / "policy"), settings)
    with torch.no_grad():
        for tensor, parameter in model.named_parameters():
            if "lora_B" in tensor:
                parameter.normal_(0.0, 0.03)
    model.save_pretrained(folders / name)
    return model.double()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one process"])
def test_adapters_have_the_gradients_of_pefts(name: str, folders: Path, pefts: dict[str, Any]) -> None:
    processes, overrides = LAYOUTS[name]
    other = [*overrides, f"run_dir={folders}/lora/{name}"]
    ranks = run_ranks(job, processes, str(folders / "lora" / "run.yaml"), other, pefts["later"], {})
    for model in ("policy", "critic"):
        for found in ranks:
            assert found["losses"][model] == pytest.approx(pefts["losses"][model], abs=TOLERANCE)
        worst, tensor = worst_gradient(pefts["one"][model]["gradients"], [found[model] for found in ranks])
        print(f"| adapters | {name} | {model} | {worst:.1e} | {tensor} |")
        assert worst <= TOLERANCE


@pytest.fixture(scope="module")
def pefts(folders: Path) -> dict[str, Any]:
    """The step of one process whose policy has adapters, after it was compared with PEFT in fp64."""
    before, after = adapted(folders, "adapters", 1), adapted(folders, "adapters later", 2)
    adapter = {"rank": 4, "alpha": 8, "load": str(folders / "adapters")}
    run_file = write_run(folders, "lora", {}, adapter=adapter)
    later = {"policy": str(folders / "adapters later"), "critic": str(folders / "critic later")}
    one = run_ranks(job, 1, str(run_file), [], later, {})[0]
    models = {name: opened(folders / name) for name in ("critic", "critic later")}
    models |= {"policy": before, "reference": opened(folders / "reference"), "policy later": after}
    losses = exact(answers_in(folders / "lora" / "run"), {}, models)
    for model, loss in losses.items():
        assert one["losses"][model] == pytest.approx(float(loss.detach()), abs=TOLERANCE)
    losses["policy"].backward()
    wanted = {n.replace(".default", ""): p.grad.numpy() for n, p in after.named_parameters() if p.requires_grad}
    assert wanted.keys() == one["peft"].keys()
    worst = max((distance(one["peft"][n], gradient), n) for n, gradient in wanted.items())
    print(f"| adapters | one process | policy | {worst[0]:.1e} | {worst[1]} |")
    assert worst[0] <= TOLERANCE
    return {"one": one, "later": later, "losses": {name: float(loss.detach()) for name, loss in losses.items()}}
