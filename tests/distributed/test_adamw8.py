"""AdamW with moments in 8 bits: bitsandbytes' update in one process, the same numbers in every layout, and states that
are saved in one layout and go on in another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed import test_memory_checkpoint as memory
from tests.distributed.test_checkpoint import _p
from tests.support.ckpt_jobs import load_job, save_job
from tests.support.harness import run_ranks
from tests.support.job import base_config, changed, open_engine, train_steps

pytestmark = pytest.mark.gloo
EIGHT = {"optim.moment_bits": 8, "model.hidden_size": 96, "optim.lr": 5e-4, "optim.min_lr": 5e-4}
"""96 and 128 columns: with 2 and with 4 ranks blocks of 256 are cut in the middle."""
ADAPTERS = EIGHT | {"adapter.rank": 24, "adapter.targets": ("q", "v", "o", "gate", "down")}
LAYOUTS = [
    pytest.param("TP2 DP2", _p(tp=2, dp=2), 4, marks=pytest.mark.slow),
    pytest.param("PP2 VPP2 DP2", _p(pp=2, vpp=2, dp=2), 4, marks=pytest.mark.slow),
    pytest.param("CP2 TP2, several buckets", _p(cp=2, tp=2, bucket_size=5000), 4, marks=pytest.mark.slow),
    pytest.param("plain optimizer TP2 DP2", _p(tp=2, dp=2, distributed_optimizer=False), 4, marks=pytest.mark.slow),
]


def steps_job(rank: int, world_size: int, changes: dict[str, Any], steps: int) -> Any:
    """Losses and gradient norms, and in one process every weight."""
    config = changed(base_config(), changes)
    engine = open_engine(config, rank, world_size)
    history = train_steps(engine, config, 0, steps)
    named = engine.models[0].named_parameters() if world_size == 1 else ()
    return history, {name: parameter.detach().numpy().copy() for name, parameter in named}


def bitsandbytes_job(rank: int, world_size: int, changes: dict[str, Any], steps: int, nearest: bool) -> Any:
    """The same with bitsandbytes' optimizer on our model. ``nearest``: with the quantization that it has where there is
    no special one for the device, which takes the nearest code; its own for the CPU does not always."""
    import bitsandbytes as bnb
    import torch
    from bitsandbytes.backends.cpu import ops

    from llm_parallel.train.open import likelihood
    from llm_parallel.train.step import forward_backward
    from tests.support.job import own_batches

    if nearest:

        def quantize(x: Any, code: Any, largest: Any, out: Any, block: int) -> None:
            rows = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % block)).view(-1, block)
            largest.copy_(rows.abs().amax(1))
            scaled = (rows / largest.clamp(min=1e-38)[:, None]).flatten()[: x.numel()]
            out.copy_(torch.bucketize(scaled, (code[1:] + code[:-1]) / 2).view(out.shape))

        ops._quant_blockwise_fp32_direct = quantize
    config = changed(base_config(), changes)
    engine = open_engine(changed(config, {"optim.moment_bits": 32}), rank, world_size)
    (model,), optim = engine.models, config.optim
    decayed = {True: [], False: []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decayed[parameter.dim() > 1].append(parameter)
    optimizer = bnb.optim.AdamW8bit(
        [{"params": held, "weight_decay": optim.weight_decay * many} for many, held in decayed.items() if held],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.epsilon,
    )
    embedding = model.embedding.word_embeddings
    bnb.optim.GlobalOptimManager.get_instance().override_config(embedding.weight, "optim_bits", 32)
    history = []
    for step in range(steps):
        batches = own_batches(config, engine.groups, step * config.train.global_batch_size)
        outcome = forward_backward(engine, likelihood(config), batches)
        scale = min(1.0, optim.clip_grad / (outcome.grad_norm + 1e-6))
        for parameters in decayed.values():
            for parameter in parameters:
                parameter.grad = parameter.main_grad.clone() * scale
        optimizer.step()
        history.append((outcome.loss, outcome.grad_norm))
    kinds = {str(state["state1"].dtype) for state in optimizer.state.values()}
    assert kinds == {"torch.uint8", "torch.float32"}
    return history, {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}


def worst(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> float:
    assert len(a) == len(b) > 0
    return max(abs(x - y) for (x, _), (y, _) in zip(a, b))


@pytest.mark.parametrize(
    ("changes", "nearest"),
    [
        pytest.param(EIGHT, True, id="all weights"),
        pytest.param(EIGHT, False, id="all weights, its own codes", marks=pytest.mark.slow),
        pytest.param(ADAPTERS, True, id="adapters", marks=pytest.mark.slow),
    ],
)
def test_ten_steps_are_those_of_bitsandbytes(changes: dict[str, Any], nearest: bool) -> None:
    """A code next to a border becomes another by one rounding, hence single weights that differ a little more."""
    pytest.importorskip("bitsandbytes")
    ours, weights = run_ranks(steps_job, 1, changes, 10)[0]
    theirs, others = run_ranks(bitsandbytes_job, 1, changes, 10, nearest)[0]
    plain, in_fp32 = run_ranks(steps_job, 1, changes | {"optim.moment_bits": 32}, 10)[0]

    def apart(one: dict[str, np.ndarray]) -> float:
        return float(np.mean([np.abs(weights[name] - one[name]).mean() for name in weights]))

    print(
        f"| {nearest} | {worst(ours, theirs):.1e} {worst(ours, plain):.1e} | {apart(others):.1e} {apart(in_fp32):.1e}"
    )
    assert worst(ours, theirs) <= (2e-6 if nearest else 2e-5)
    assert apart(others) <= (0.01 if nearest else 0.5) * apart(in_fp32)


@pytest.mark.parametrize(("name", "layout", "processes"), LAYOUTS)
@pytest.mark.parametrize("changes", [EIGHT, ADAPTERS], ids=["all weights", "adapters"])
def test_every_layout_has_the_numbers_of_one_process(
    name: str, layout: dict[str, Any], processes: int, changes: dict[str, Any]
) -> None:
    alone = run_ranks(steps_job, 1, changes, 10)[0][0]
    together = run_ranks(steps_job, processes, changes | layout, 10)[0][0]
    print(f"| {name} | {worst(alone, together):.1e} |")
    assert worst(alone, together) <= 1e-5


OTHERS = [
    ("one process", {}, 1),
    ("TP4", _p(tp=4), 4),
    ("DP2 overlap", _p(dp=2, overlap=True, bucket_size=5000), 2),
    ("PP2 VPP2", _p(pp=2, vpp=2), 2),
    ("CP2 TP2", _p(cp=2, tp=2), 4),
]


@pytest.mark.parametrize(
    ("layout", "processes", "changes", "others"),
    [
        pytest.param(_p(tp=2), 2, EIGHT, [("DP2", _p(dp=2), 2)], id="all weights"),
        pytest.param(_p(tp=2, dp=2), 4, EIGHT, OTHERS, id="all weights, more", marks=pytest.mark.slow),
        pytest.param(_p(tp=2, dp=2), 4, ADAPTERS, OTHERS, id="adapters", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_goes_on_in_other_layouts(
    layout: dict[str, Any], processes: int, changes: dict[str, Any], others: list[Any], tmp_path: Path
) -> None:
    """Bit for bit in its own."""
    undisturbed = run_ranks(save_job, processes, layout | changes, str(tmp_path), 2, 3)[0]
    assert run_ranks(load_job, processes, layout | changes, str(tmp_path), 3)[0] == undisturbed
    assert worst(run_ranks(steps_job, 1, changes, 5)[0][0][2:], undisturbed) <= 2e-6, "the steps are one process's"
    for name, other, ranks in others:
        difference = worst(undisturbed, run_ranks(load_job, ranks, other | changes, str(tmp_path), 3)[0])
        print(f"| {layout} -> {name} | {difference:.1e} |")
        assert difference <= 2e-6, name


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        pytest.param(_p(tp=2, dp=2), EIGHT, marks=pytest.mark.slow),
        pytest.param(_p(dp=4), ADAPTERS, marks=pytest.mark.slow),
        pytest.param(_p(tp=2, dp=2, distributed_optimizer=False), EIGHT, marks=pytest.mark.slow),
    ],
)
def test_copies_in_memory_go_on_in_another_layout(
    layout: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    undisturbed = run_ranks(memory.save_job, 4, layout | changes, str(tmp_path), None)[0]
    assert run_ranks(memory.load_job, 4, layout | changes, 4, str(tmp_path), None)[0] == undisturbed
    kind = {key: value for key, value in layout.items() if key.endswith("distributed_optimizer")}
    other = run_ranks(memory.load_job, 2, _p(pp=2) | kind | changes, 4, str(tmp_path), None)[0]
    assert worst(undisturbed, other) <= 2e-6


def other_bits_job(rank: int, world_size: int, changes: dict[str, Any], folder: str) -> Any:
    """What is said when a checkpoint is loaded by an optimizer with other moments, and two steps from there."""
    from llm_parallel.checkpoint.load import load_checkpoint

    config = changed(base_config(), changes)
    engine = open_engine(config, rank, world_size)
    said: list[str] = []
    state = load_checkpoint(folder, {"policy": engine}, changed=said.extend)
    return said, train_steps(engine, config, state.step, 3)


@pytest.mark.slow
def test_a_change_between_8_and_32_bits_is_said(tmp_path: Path) -> None:
    """Moments in 8 bits become fp32 as they are; fp32 ones are rounded by about what DECISIONS 91 measured."""
    layout = _p(tp=2) | EIGHT
    for bits, other in ((32, 8), (8, 32)):
        folder = str(tmp_path / str(bits))
        undisturbed = run_ranks(save_job, 2, layout | {"optim.moment_bits": bits}, folder, 2, 3)[0]
        said, resumed = run_ranks(other_bits_job, 2, layout | {"optim.moment_bits": other}, folder)[0]
        assert said[0] == f"optim.moment_bits {bits} → {other}"
        assert worst(undisturbed, resumed) <= 1e-3
        if other == 8:
            first, second = (float(word.rstrip("%")) for word in said[1].split() if word.endswith("%"))
            assert 0.3 < first < 3.0
            assert 0.1 < second < 3.0
        else:
            assert len(said) == 1
            assert worst(undisturbed[:1], resumed[:1]) == 0.0, "the same moments"
