"""Adapters on the embedding and the output projection, and weights trained whole: what is refused, and what is pure."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llm_parallel.config.rules import find_problems
from llm_parallel.config.tree import ModelConfig
from llm_parallel.config.tree_tune import AdapterConfig
from llm_parallel.errors import UserError
from llm_parallel.model.flops import adapter_parameters, flops_per_token
from llm_parallel.model.peft_files import PeftFolder
from llm_parallel.model.vocabulary_adapters import own_rows
from llm_parallel.parallel.mesh import Mesh
from tests.support.job import base_config, changed

SIZE, HIDDEN, RANK = 12, 8, 2
BOTH = ("embed_tokens", "lm_head")
BASE = {"checkpoint.load": "/base", "chat.train": ({"path": "/data"},), "method.kind": "sft", "data.tokenizer": "/base"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"adapter.targets": ("q", "lm_head"), "adapter.modules_to_save": ("lm_head",)},
            "lm_head is in adapter.modules_to_save and is trained whole, so it has no place in adapter.targets; use "
            "adapter.targets=[q]",
        ),
        ({"adapter.targets": ("embed_tokens",), "adapter.dora": True}, "has no magnitudes for embed_tokens"),
        (
            {"adapter.modules_to_save": ("lm_head",), "model.tie_embeddings": True},
            "has lm_head alone, and the model's embeddings are tied, so that embed_tokens and lm_head are one matrix; "
            "use adapter.modules_to_save=[embed_tokens,lm_head]",
        ),
        (
            {"adapter.targets": ("lm_head",), "kernels.output_loss": "fused"},
            "which kernels.output_loss = fused never holds; use kernels.output_loss=separate",
        ),
    ],
)
def test_what_does_not_fit_together_is_one_sentence(settings: dict[str, Any], words: str) -> None:
    (problem,) = find_problems(changed(base_config(), BASE | {"adapter.rank": 4} | settings), 1, "cpu")
    assert words in problem.message and "\n" not in problem.message
    fixed = dict(problem.fix)
    assert find_problems(changed(base_config(), BASE | {"adapter.rank": 4} | settings | fixed), 1, "cpu") == []


def model_of(tied: bool = False) -> ModelConfig:
    return ModelConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        ffn_hidden_size=16,
        num_attention_heads=2,
        vocab_size=SIZE,
        tie_embeddings=tied,
    )


def folder_of(folder: Path, tensors: dict[str, torch.Tensor], **settings: Any) -> Path:
    layer = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors = {f"{layer}A.weight": torch.zeros(RANK, HIDDEN), f"{layer}B.weight": torch.zeros(HIDDEN, RANK), **tensors}
    save_file(tensors, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(values | settings))
    return folder


EMBED, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"
ON_BOTH = {
    f"{EMBED}.lora_embedding_A": torch.randn(RANK, SIZE),
    f"{EMBED}.lora_embedding_B": torch.randn(HIDDEN, RANK),
    f"{HEAD}.lora_A.weight": torch.randn(RANK, HIDDEN),
    f"{HEAD}.lora_B.weight": torch.randn(SIZE, RANK),
    f"{HEAD}.base_layer.weight": torch.randn(SIZE, HIDDEN),
}
WHOLE = {f"{EMBED}.weight": torch.ones(SIZE, HIDDEN), f"{HEAD}.weight": torch.zeros(SIZE, HIDDEN)}
TIED = {f"{EMBED}.weight": torch.ones(SIZE, HIDDEN), f"{HEAD}.weight": torch.ones(SIZE, HIDDEN)}


@pytest.mark.parametrize(
    ("tensors", "settings", "tied", "words"),
    [
        (
            WHOLE,
            {"modules_to_save": list(BOTH)},
            True,
            "trained embed_tokens and lm_head of a model with tied embeddings",
        ),
        (
            {f"{HEAD}.weight": WHOLE[f"{HEAD}.weight"]},
            {"modules_to_save": ["lm_head"]},
            True,
            "trained lm_head of a model",
        ),
        (
            ON_BOTH,
            {"ensure_weight_tying": True},
            True,
            "so that both have the same factors; adapters here have their own",
        ),
        (
            {},
            {"modules_to_save": ["lm_head"]},
            False,
            f"lacks {HEAD}.weight, and modules_to_save in adapter_config.json",
        ),
        (WHOLE, {}, False, f"has {EMBED}.weight, and modules_to_save in adapter_config.json is []"),
        (
            {"base_model.model.model.norm.lora_A.weight": torch.ones(1)},
            {},
            False,
            "; adapters here are on self_attn.q_proj,",
        ),
        (
            {},
            {"modules_to_save": ["score"]},
            False,
            'has modules_to_save = ["score"]; trained whole beside adapters are',
        ),
        (
            {f"{EMBED}.weight": torch.ones(SIZE + 2, HIDDEN)},
            {"modules_to_save": ["embed_tokens"]},
            False,
            "has shape [14, 8], and the model needs [12, 8]",
        ),
    ],
)
def test_folders_of_peft_that_compute_something_else_are_refused(
    tensors: dict[str, torch.Tensor], settings: dict[str, Any], tied: bool, words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        PeftFolder(folder_of(tmp_path, tensors, **settings)).check(model_of(tied))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_folders_of_peft_are_read(tmp_path: Path) -> None:
    for name in ("adapters", "whole", "tied"):
        (tmp_path / name).mkdir()
    found = PeftFolder(folder_of(tmp_path / "adapters", ON_BOTH))
    found.check(model_of(tied=True))
    assert found.settings.targets == ("q", *BOTH) and found.settings.modules_to_save == ()
    a, b = found.vocabulary_factors("embed_tokens")
    assert a.shape == (SIZE, RANK) and b.shape == (HIDDEN, RANK)
    whole = PeftFolder(folder_of(tmp_path / "whole", WHOLE, modules_to_save=list(BOTH)))
    whole.check(model_of())
    assert whole.settings.modules_to_save == BOTH and torch.equal(whole.whole("lm_head"), WHOLE[f"{HEAD}.weight"])
    # What PEFT writes of a tied model: the embedding's names, and both tensors.
    named = {"modules_to_save": ["embed_tokens", "model.embed_tokens"], "ensure_weight_tying": True}
    tied = PeftFolder(folder_of(tmp_path / "tied", TIED, **named))
    tied.check(model_of(tied=True))
    assert tied.settings.modules_to_save == BOTH


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_own_rows_are_the_whole_and_zeros_beyond_the_vocabulary(tp: int) -> None:
    whole, rows = torch.randn(10, 3), 12 // tp
    groups = [SimpleNamespace(mesh=Mesh(tp=tp), at=SimpleNamespace(tp=rank)) for rank in range(tp)]
    held = [own_rows("output_layer.adapter.b", whole, torch.empty(rows, 3), one) for one in groups]  # type: ignore[arg-type]
    found = torch.cat(held)
    assert torch.equal(found[:10], whole) and not found[10:].any()
    assert own_rows("output_layer.adapter.a", whole, whole, groups[0]) is whole  # type: ignore[arg-type]


def test_parameters_and_products_are_counted() -> None:
    plain = AdapterConfig(rank=RANK, targets=("q",))
    both = plain.model_copy(update={"targets": ("q", *BOTH)})
    whole = plain.model_copy(update={"modules_to_save": BOTH})
    count = adapter_parameters(model_of(), plain)
    assert adapter_parameters(model_of(), both) - count == 2 * RANK * (SIZE + HIDDEN)
    assert adapter_parameters(model_of(), whole) - count == 2 * SIZE * HIDDEN
    assert adapter_parameters(model_of(tied=True), whole) - count == SIZE * HIDDEN
    base = flops_per_token(model_of(), 16, adapter=plain)
    assert flops_per_token(model_of(), 16, adapter=whole) - base == 2 * SIZE * HIDDEN, "the projection's own gradient"
