"""A short training job on any layout, with synthetic samples, for tests that compare layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from llm_parallel.config.tree import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig

GLOBAL_BATCH, SEQ, VOCAB = 8, 32, 128


def base_config() -> RunConfig:
    """A four-layer model with two key/value groups."""
    return RunConfig(
        device="cpu",
        model=ModelConfig(
            num_layers=4,
            hidden_size=64,
            ffn_hidden_size=128,
            num_attention_heads=4,
            num_query_groups=2,
            vocab_size=VOCAB,
            max_seq_length_tokens=SEQ,
        ),
        data=DataConfig(seq_length_tokens=SEQ),
        train=TrainConfig(global_batch_size=GLOBAL_BATCH, steps=10),
        optim=OptimConfig(lr=3e-3, min_lr=3e-3, schedule="constant"),
    )


def changed(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """``config`` with section.field → value replaced, validated anew."""
    tree = config.model_dump()
    for name, value in changes.items():
        section, key = name.split(".")
        tree[section] = {**(tree[section] or {}), key: value}
    return RunConfig.model_validate(tree)


def sample(config: RunConfig, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [SEQ + 1], loss mask [SEQ] and document starts of sample ``number``: counting sequences that the model can
    learn, with three documents of uneven length."""
    generator = torch.Generator().manual_seed(1000 + number)
    start = torch.randint(0, 100, (1,), generator=generator)
    step = torch.randint(1, 4, (1,), generator=generator)
    tokens = (start + step * torch.arange(SEQ + 1)) % min(100, config.model.vocab_size or VOCAB)
    cuts = torch.randperm(SEQ - 2, generator=generator)[:2].sort().values + 1
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), cuts)).to(torch.int32)
    mask = torch.ones(SEQ)
    if config.data.packing == "isolate":
        mask[cuts - 1] = 0.0
    return tokens, mask, starts


def make_batch(config: RunConfig, numbers: range) -> Any:
    """Micro batch of the given samples."""
    from llm_parallel.data.batch import Batch, Documents

    tokens, masks, starts = zip(*(sample(config, number) for number in numbers))
    stacked = torch.stack(tokens)
    return Batch(
        tokens=stacked[:, :-1].contiguous(),
        labels=stacked[:, 1:].contiguous(),
        weights=torch.stack(masks),
        documents=Documents(starts) if config.data.packing == "isolate" else None,
        numbers=torch.tensor(numbers),
    )


def own_batches(config: RunConfig, groups: Any, first: int = 0, samples: int | None = None) -> list[Any]:
    """This replica's micro batches of the step that begins with sample ``first``."""
    from llm_parallel.parallel.layout import Layout

    layout = Layout.from_config(config, groups.mesh.world_size)
    numbers = layout.micro_batches(first, samples or config.train.global_batch_size, groups.at.dp)
    return [make_batch(config, part) for part in numbers]


def with_reference(batches: list[Any]) -> list[Any]:
    """The batches with log-probabilities under a reference that depend on the tokens alone. Their three documents are a
    pair and one that is left over."""
    return [replace(b, columns={"reference": -1.0 - (b.tokens % 7).float() / 2}) for b in batches]


def open_engine(config: RunConfig, rank: int, world_size: int) -> Any:
    """Groups and engine of this rank for a checked configuration."""
    from llm_parallel.config.rules import check_config
    from llm_parallel.parallel.groups import open_groups
    from llm_parallel.parallel.layout import Layout
    from llm_parallel.parallel.platform import open_platform
    from llm_parallel.train.open import policy_engine

    check_config(config, world_size, "cpu")
    platform = open_platform("cpu")
    groups = open_groups(Layout.from_config(config, world_size), rank, platform, config.seed)
    engine = policy_engine(config, groups)
    fill_adapters(engine)
    return engine


@torch.no_grad()
def fill_adapters(engine: Any) -> None:
    """Gives adapters no factor that is zero, the same in every layout, so that both have a gradient."""
    from llm_parallel.model.init import normal_rows
    from llm_parallel.model.tensors import canonical_parameters, kind_of

    mesh, at = engine.groups.mesh, engine.groups.at
    for model in engine.models:
        for name, parameter in canonical_parameters(model):
            if name.endswith(".adapter.b") or name == "embedding.adapter.a":
                kind, (rows, rank) = kind_of(name), parameter.shape
                held = kind.shard(rows * (1 if kind.sharded_dim is None else mesh.tp), mesh.tp, at.tp)
                parameter.copy_(0.1 * torch.cat([normal_rows(1, name, part, rank) for part in held]))
    if engine.network.base is not None:
        engine.optimizer.reload_model_params()


def train_steps(
    engine: Any,
    config: RunConfig,
    first_step: int,
    num_steps: int,
    before_update: Callable[[int], None] = lambda _: None,
) -> list[tuple[float, float]]:
    """Loss and gradient norm of each of the steps ``first_step …``; ``before_update(step)`` may look at gradients."""
    from llm_parallel.train.open import likelihood
    from llm_parallel.train.step import apply_gradient, forward_backward

    history = []
    minimised = likelihood(config)
    size = config.train.global_batch_size
    for step in range(first_step, first_step + num_steps):
        batches = own_batches(config, engine.groups, step * size)
        outcome = forward_backward(engine, minimised, batches)
        before_update(step)
        apply_gradient(engine, outcome, config.optim.lr, config.optim.clip_grad)
        history.append((outcome.loss, outcome.grad_norm))
    return history


def gradients(engine: Any) -> dict[str, torch.Tensor]:
    """This rank's shard of every gradient, by canonical name, after ``forward_backward``; whole again where the
    distributed optimizer left each rank only its part."""
    from llm_parallel.model.tensors import canonical_parameters

    group = engine.groups.collection.dp_cp
    found = {}
    for chunk, model in zip(engine.chunks, engine.models):
        for buffer in chunk.buffers:
            for bucket in buffer.buckets:
                if chunk.ddp_config.use_distributed_optimizer and group.size() > 1:
                    mine = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                    dist.all_gather_into_tensor(bucket.grad_data, mine, group=group)
        for name, parameter in canonical_parameters(model):
            if parameter.requires_grad:
                found[name] = parameter.main_grad.detach().clone()
    return found


def compare_layout(
    rank: int, world_size: int, changes: dict[str, Any], num_steps: int, objective: str = "likelihood"
) -> dict[str, Any]:
    """The gradients of the first step, and the losses and gradient norms of all steps, of one layout; with the
    objective ``preferences`` those of all objectives over answers."""
    from llm_parallel.parallel.groups import close_groups

    config = changed(base_config(), changes)
    engine = open_engine(config, rank, world_size)
    mesh, at = engine.groups.mesh, engine.groups.at
    first: dict[str, Any] = {}

    def keep(step: int) -> None:
        if step == 0:
            first.update({name: gradient.numpy() for name, gradient in gradients(engine).items()})

    if objective == "preferences":
        from tests.support.preference_job import compare_objectives

        first, history = compare_objectives(engine, config)
    else:
        history = train_steps(engine, config, 0, num_steps, keep)
    close_groups(world=False)
    return {"gradients": first, "history": history, "tp": mesh.tp, "tp_rank": at.tp}
