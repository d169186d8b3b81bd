"""Adapters of models with a value head: pairs of a reward model, and values of a critic, against PEFT in fp64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.test_layouts import worst_gradient
from tests.support.harness import run_ranks

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.gloo

PAIRS, LENGTH, VOCABULARY = 4, 32, 61
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "initializer_range": 0.1,
    "pad_token_id": None,
}  # fmt: skip
SETTINGS = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj", "embed_tokens"]}
ADAPTER = {"rank": 4, "alpha": 8, "targets": ("q", "v", "down", "embed_tokens")}
CLIP, TOLERANCE = 0.2, 1e-5


def texts() -> list[list[torch.Tensor]]:
    """Pairs of texts, of which each pair fits a row."""
    rng = np.random.default_rng(0)
    return [
        [torch.from_numpy(rng.integers(0, VOCABULARY, size)) for size in rng.integers(4, 15, 2)] for _ in range(PAIRS)
    ]


def wanted_of(text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What was earned from each token on, and what the critic said before the round."""
    earned = (text % 7).double() / 3 - 1
    return earned, earned + (text % 5).double() / 10 - 0.2


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, and PEFT's adapters with a head on it."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("value")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).float().save_pretrained(folder / "base")
    kind = LlamaForSequenceClassification
    model = kind.from_pretrained(folder / "base", num_labels=1, dtype=torch.float64, attn_implementation="eager")
    adapted = peft.get_peft_model(model, peft.LoraConfig(**SETTINGS, task_type="SEQ_CLS"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "lora_embedding" in name:
                parameter.normal_(0.0, 0.1)
            if "score.modules_to_save" in name:
                parameter.normal_(0.0, 0.3)
    adapted.save_pretrained(folder / "peft")
    return folder


def exact(folder: Path) -> dict[str, tuple[float, dict[str, np.ndarray]]]:
    """Losses and gradients of both objectives in fp64, from the papers' formulas, by PEFT's names."""
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification.from_pretrained(
        folder / "base", num_labels=1, dtype=torch.float64, attn_implementation="eager"
    )
    adapted = peft.PeftModel.from_pretrained(model, folder / "peft", is_trainable=True).double()
    trunk, score = adapted.base_model.model.model, adapted.base_model.model.score
    found = {}
    for name in ("reward", "critic"):
        adapted.zero_grad()
        losses, count = [], 0
        for pair in texts():
            values = [score(trunk(text[None]).last_hidden_state)[0, :, 0] for text in pair]
            if name == "reward":
                losses.append(-torch.nn.functional.logsigmoid(values[0][-1] - values[1][-1]))
                count += 1
                continue
            for text, value in zip(pair, values):
                earned, before = wanted_of(text)
                bounded = before + (value - before).clamp(-CLIP, CLIP)
                losses.append(0.5 * torch.maximum((value - earned) ** 2, (bounded - earned) ** 2).sum())
                count += len(text)
        loss = torch.stack(losses).sum() / count
        loss.backward()
        trained = {n.replace(".default", "").replace(".modules_to_save", ""): p for n, p in adapted.named_parameters()}
        gradients = {n: p.grad.float().numpy() for n, p in trained.items() if p.requires_grad}
        found[name] = float(loss.detach()), gradients
    return found


def rows(numbers: range, objective: str) -> Any:
    """A micro batch of pairs."""
    from llm_parallel.data.batch import Batch, Documents

    shape = (len(numbers), LENGTH)
    tokens, weights = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    columns = {name: torch.zeros(shape) for name in ("return", "value")}
    starts = []
    for row, number in enumerate(numbers):
        at, begins = 0, []
        for text in texts()[number]:
            part = slice(at, at + len(text))
            tokens[row, part] = text
            weights[row, part.stop - 1 if objective == "reward" else part] = 1.0
            columns["return"][row, part], columns["value"][row, part] = wanted_of(text)
            begins.append(at)
            at = part.stop
        starts.append(torch.tensor([*begins, at], dtype=torch.int32))
    return Batch(tokens, tokens.clone(), weights, Documents(tuple(starts)), columns)


def ours(rank: int, world_size: int, folder: str, parallel: dict[str, int]) -> dict[str, Any]:
    """Losses and gradients of both objectives, by our names, and in one process by PEFT's."""
    from llm_parallel.checkpoint.base import load_adapters, load_base
    from llm_parallel.config.tree_tune import AdapterConfig
    from llm_parallel.model.adapters import adapters_of
    from llm_parallel.model.peft_files import SCORE, peft_tensors, peft_vocabulary_tensors
    from llm_parallel.model.vocabulary_adapters import vocabulary_adapters
    from llm_parallel.objectives.reward import RewardPairs
    from llm_parallel.objectives.value import ClippedValue
    from llm_parallel.parallel.groups import close_groups, open_groups
    from llm_parallel.parallel.layout import Layout
    from llm_parallel.parallel.platform import open_platform
    from llm_parallel.train.open import policy_engine
    from llm_parallel.train.step import forward_backward
    from tests.support.job import changed, gradients
    from tests.support.parity_models import our_config

    config = our_config(f"{folder}/base", LENGTH, **parallel)
    changes = {"model.value_head": True, "train.global_batch_size": PAIRS, "data.packing": "isolate"}
    config = changed(config, changes).model_copy(update={"adapter": AdapterConfig(**ADAPTER)})
    layout = Layout.from_config(config, world_size)
    groups = open_groups(layout, rank, open_platform("cpu"), 0)
    engine = policy_engine(config, groups)
    load_base(f"{folder}/base", engine.network)
    load_adapters(f"{folder}/peft", engine.network)
    engine.optimizer.reload_model_params()
    found: dict[str, Any] = {"tp": groups.mesh.tp, "tp_rank": groups.at.tp, "losses": {}, "gradients": {}, "peft": {}}
    for name, objective in (("reward", RewardPairs()), ("critic", ClippedValue(CLIP))):
        parts = layout.micro_batches(0, PAIRS, groups.at.dp)
        outcome = forward_backward(engine, objective, [rows(part, name) for part in parts])
        found["losses"][name] = outcome.loss
        own = gradients(engine)
        found["gradients"] |= {f"{name} {tensor}": gradient.numpy() for tensor, gradient in own.items()}
        if world_size == 1:
            by_name = {SCORE: own["value_head.weight"]}
            for layer, linear, adapter in adapters_of(engine.models):
                factors = adapter.a.main_grad, adapter.b.main_grad
                by_name |= peft_tensors(config.model, config.adapter, layer, linear, *factors)
            for target, adapter in vocabulary_adapters(engine.models):
                by_name |= peft_vocabulary_tensors(config.model, target, adapter.a.main_grad, adapter.b.main_grad)
            found["peft"][name] = {tensor: gradient.clone().numpy() for tensor, gradient in by_name.items()}
    close_groups(world=False)
    return found


@pytest.fixture(scope="module")
def alone(folders: Path) -> dict[str, Any]:
    return run_ranks(ours, 1, str(folders), {})[0]


def test_gradients_of_adapters_and_head_are_those_of_peft_in_fp64(folders: Path, alone: dict[str, Any]) -> None:
    for name, (loss, gradients) in exact(folders).items():
        assert alone["losses"][name] == pytest.approx(loss, rel=TOLERANCE)
        assert alone["peft"][name].keys() == gradients.keys()
        for tensor, gradient in gradients.items():
            distance = np.linalg.norm(alone["peft"][name][tensor] - gradient) / np.linalg.norm(gradient)
            assert distance <= TOLERANCE, (name, tensor)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "parallel"),
    [(4, {"tp": 2, "pp": 2}), (4, {"cp": 2, "dp": 2}), (4, {"tp": 2, "cp": 2}), (2, {"pp": 2})],
    ids=["TP2 SP PP2", "CP2 DP2", "TP2 SP CP2", "PP2"],
)
def test_layouts_have_the_gradients_of_one_process(
    processes: int, parallel: dict[str, int], folders: Path, alone: dict[str, Any]
) -> None:
    ranks = run_ranks(ours, processes, str(folders), parallel)
    for found in ranks:
        assert found["losses"] == pytest.approx(alone["losses"], rel=TOLERANCE)
    worst, tensor = worst_gradient(alone["gradients"], ranks)
    print(f"| {parallel} | {worst:.1e} | {tensor} |")
    assert worst <= TOLERANCE
