"""Windows, soft caps, biases, norms of heads, label smoothing and z-loss, in every kind of layout and on both back
ends."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.test_layouts import worst_gradient
from tests.support.harness import run_ranks
from tests.support.job import base_config, changed, compare_layout, make_batch, open_engine

pytestmark = pytest.mark.gloo

OPTIONS: dict[str, Any] = {
    "model.window_tokens": 9,
    "model.layers_without_rope": (1,),
    "model.attention_softcap": 2.0,
    "model.output_softcap": 1.5,
    "train.label_smoothing": 0.1,
    "train.z_loss": 0.05,
    "data.packing": "isolate",
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2 SP PP2": (4, {"parallel.tp": 2, "parallel.pp": 2}),
    "CP2, fused loss": (2, {"parallel.cp": 2, "kernels.output_loss": "fused"}),
}


FAMILY: dict[str, Any] = {
    "model.qkv_bias": True,
    "model.attention_output_bias": True,
    "model.mlp_bias": True,
    "model.qk_norm": True,
}
NORMS: dict[str, Any] = {
    "model.qkv_bias": True,
    "model.qk_norm_over_heads": True,
    "model.norm_outputs": True,
    "model.mlp_bias": True,
}
FAMILY_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2 without SP": (2, {"parallel.tp": 2, "parallel.sequence_parallel": False}),
    "TP4 SP, each group's keys on two ranks": (4, {"parallel.tp": 4}),
}
NORMS_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2 SP CP2": (4, {"parallel.tp": 2, "parallel.cp": 2}),
    "PP2 DP2, full recompute": (4, {"parallel.pp": 2, "parallel.dp": 2, "parallel.recompute": "full"}),
}


SETS = ((OPTIONS, LAYOUTS), (FAMILY, FAMILY_LAYOUTS), (NORMS, NORMS_LAYOUTS))


@cache
def reference(number: int) -> dict[str, Any]:
    return run_ranks(compare_layout, 1, SETS[number][0], 3)[0]


@pytest.mark.parametrize(("number", "name"), [(n, name) for n, (_, layouts) in enumerate(SETS) for name in layouts])
def test_options_in_a_layout_equal_one_process(number: int, name: str) -> None:
    options, layouts = SETS[number]
    processes, changes = layouts[name]
    ranks = run_ranks(compare_layout, processes, options | changes, 3)
    for found in ranks:
        np.testing.assert_allclose(found["history"], reference(number)["history"], rtol=2e-5, atol=1e-5)
    worst, tensor = worst_gradient(reference(number)["gradients"], ranks)
    assert worst <= 1e-5, tensor


def by_hand(rank: int, world_size: int) -> dict[str, float]:
    """Largest differences from what the options mean, with the same weights."""
    from llm_parallel.objectives.likelihood import Likelihood

    def logits_and_loss(changes: dict[str, Any], objective: Any) -> tuple[torch.Tensor, torch.Tensor]:
        config = changed(base_config(), changes | {"model.init_std": 0.3})
        model = open_engine(config, rank, world_size).models[0].eval()
        batch = make_batch(config, range(1))
        with torch.no_grad():
            return model(batch.tokens), model(batch.tokens, labels=batch.labels, loss_options=objective.loss_options)

    from llm_parallel.parallel.groups import close_groups

    plain, _ = logits_and_loss({}, Likelihood())
    close_groups(world=False)
    capped, loss = logits_and_loss({"model.output_softcap": 1.5}, Likelihood(label_smoothing=0.1, z_loss=0.05))
    close_groups(world=False)
    whole, _ = logits_and_loss({"model.window_tokens": 32}, Likelihood())
    close_groups(world=False)
    one, _ = logits_and_loss({"model.window_tokens": 1}, Likelihood())
    batch = make_batch(base_config(), range(1))
    expected = 1.5 * torch.tanh(plain.double() / 1.5)
    valid = expected[..., :128]
    terms = torch.nn.functional.cross_entropy(
        valid.flatten(0, 1), batch.labels.flatten(), label_smoothing=0.1, reduction="none"
    )
    terms = terms + 0.05 * valid.logsumexp(-1).flatten() ** 2
    return {
        "cap": (capped.double() - expected).abs().max().item(),
        "loss": (loss.double().flatten() - terms).abs().max().item(),
        "whole window": (whole - plain).abs().max().item(),
        "window of one moves the logits": (one - plain)[:, 1:].abs().max().item(),
        "window of one at the first token": (one - plain)[:, 0].abs().max().item(),
    }


def test_options_mean_what_they_say() -> None:
    found = run_ranks(by_hand, 1)[0]
    assert found["cap"] < 1e-5 and found["loss"] < 1e-4
    assert found["whole window"] < 1e-5 and found["window of one at the first token"] < 1e-5
    assert found["window of one moves the logits"] > 1e-2


def both_back_ends(rank: int, world_size: int) -> float:
    """Largest difference of the losses between torch's operators and the interpreted kernels."""
    os.environ["TRITON_INTERPRET"] = "1"
    from llm_parallel.parallel.groups import close_groups
    from llm_parallel.train.open import likelihood

    found = []
    for backend in ("torch", "triton"):
        kernels = {f"kernels.{name}": backend for name in ("attention", "cross_entropy", "rope")}
        config = changed(base_config(), OPTIONS | kernels | {"model.init_std": 0.3, "model.num_layers": 3})
        model = open_engine(config, rank, world_size).models[0]
        batch = make_batch(config, range(1))
        options = likelihood(config).loss_options
        found.append(model(batch.tokens, labels=batch.labels, documents=batch.documents, loss_options=options))
        close_groups(world=False)
    return (found[0] - found[1]).abs().max().item()


def test_both_back_ends_agree() -> None:
    assert run_ranks(both_back_ends, 1)[0] < 1e-4
