"""The stack that GPU steps are measured on is transformers' Llama: same weights, same loss, same gradients."""

from __future__ import annotations

import pytest
import torch

from benchmarks.llama_stack import SHAPES, LlamaStack, ours, plain, transformers_model


@pytest.mark.parametrize("kind", ["plain", "torch", "triton"])
def test_stack_equals_transformers(kind: str) -> None:
    if kind == "triton":
        pytest.importorskip("triton")
    shape, tokens = SHAPES["debug"], 24
    torch.manual_seed(0)
    theirs = transformers_model(shape, "cpu")
    stack = LlamaStack(shape, plain() if kind == "plain" else ours(kind), tokens, "cpu")
    stack.load_transformers(theirs)
    ids = torch.randint(0, shape.vocab, (2, tokens + 1), generator=torch.Generator().manual_seed(1))
    logits = theirs(ids[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss = stack(ids[:, :-1].t(), ids[:, 1:].t())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    expected.backward()
    loss.backward()
    for mine, other in (
        (stack.embedding, theirs.model.embed_tokens.weight),
        (stack.layers[0]["fc2"], theirs.model.layers[0].mlp.down_proj.weight),
        (stack.layers[1]["norm2"], theirs.model.layers[1].post_attention_layernorm.weight),
        (stack.layers[0]["norm1"], theirs.model.layers[0].input_layernorm.weight),
    ):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_flops_count_products() -> None:
    """By hand for the debug shape: per layer qkv 64x128, proj 64x64, MLP 3x64x176, attention s x 64; output 64x256."""
    shape = SHAPES["debug"]
    by_hand = 6 * (2 * (64 * 128 + 64 * 64 + 3 * 64 * 176 + 100 * 64) + 64 * 256)
    assert shape.flops_per_token(100) == by_hand
