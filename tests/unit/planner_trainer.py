"""Measures the memory of one rank of our trainer by kind, for tests of the planner's memory model."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import torch

from llm_parallel.config.tree import DataConfig, KernelsConfig, ModelConfig, RunConfig, TrainConfig
from tests.support.job import changed, open_engine

KERNELS = ("rms_norm", "rope", "attention", "swiglu", "cross_entropy")
SEQ, BATCH = 32, 2


def base_config() -> RunConfig:
    """Small, but with widths that differ from each other, so that no term can stand in for another."""
    return RunConfig(
        device="cpu",
        model=ModelConfig(
            num_layers=2,
            hidden_size=256,
            ffn_hidden_size=704,
            num_attention_heads=8,
            num_query_groups=4,
            vocab_size=1024,
            max_seq_length_tokens=SEQ,
        ),
        data=DataConfig(seq_length_tokens=SEQ),
        train=TrainConfig(global_batch_size=BATCH, steps=1, precision="bf16"),
        kernels=KernelsConfig(**dict.fromkeys(KERNELS, "triton")),
    )


class Saved:
    """Bytes of all storages that autograd holds for backward, at present and at most, without those in ``excluded``."""

    def __init__(self, excluded: set[int]) -> None:
        self.excluded, self.holders = excluded, Counter[int]()
        self.now = self.most = 0
        self.shapes: dict[int, str] = {}
        self.at_most: list[str] = []

    def pack(self, x: torch.Tensor) -> Held:
        """Counts a saved tensor until autograd releases it."""
        return Held(self, x)

    def add(self, x: torch.Tensor) -> None:
        """Adds a holder of a storage."""
        number = x.untyped_storage().data_ptr()
        self.holders[number] += 1
        if self.holders[number] == 1 and number not in self.excluded:
            self.now += x.untyped_storage().nbytes()
            self.shapes[number] = f"{tuple(x.shape)} {x.dtype}"
            if self.now > self.most:
                self.most, self.at_most = self.now, list(self.shapes.values())

    def drop(self, x: torch.Tensor) -> None:
        """Removes a holder of a storage."""
        number = x.untyped_storage().data_ptr()
        self.holders[number] -= 1
        if not self.holders[number] and number not in self.excluded:
            self.now -= x.untyped_storage().nbytes()
            self.shapes.pop(number)


class Held:
    """A saved tensor, which is counted while autograd holds it."""

    def __init__(self, saved: Saved, x: torch.Tensor) -> None:
        self.saved, self.x = saved, x
        saved.add(x)

    def __del__(self) -> None:
        self.saved.drop(self.x)


def nbytes(tensors: Any) -> int:
    """Bytes of some tensors."""
    return sum(x.nbytes for x in tensors)


def measure(rank: int, world_size: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Bytes of this rank by kind, after one step of the small model with changes; its pipeline rank."""
    os.environ["TRITON_INTERPRET"] = "1"
    return measure_config(changed(base_config(), changes), rank, world_size)


def measure_config(config: RunConfig, rank: int, world_size: int) -> dict[str, Any]:
    """The same of any model, on samples without documents."""
    from llm_parallel.data.batch import Batch
    from llm_parallel.objectives.likelihood import Likelihood
    from llm_parallel.parallel.groups import close_groups
    from llm_parallel.parallel.layout import Layout
    from llm_parallel.train.step import apply_gradient, forward_backward

    engine = open_engine(config, rank, world_size)
    buffers = [buffer for chunk in engine.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    held = [x for m in engine.models for x in (*m.parameters(), *m.buffers(), *_codes(m))]
    weights = {x.untyped_storage().data_ptr() for x in held}
    generator = torch.Generator().manual_seed(0)
    size, length = config.train.micro_batch_size, config.data.seq_length_tokens

    def batch() -> Batch:
        tokens = torch.randint(0, 1000, (size, length + 1), generator=generator)
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(size, length))

    layout = Layout.from_config(config, world_size)
    batches = [batch() for _ in range(layout.num_micro_batches(config.train.global_batch_size))]
    given = {x.untyped_storage().data_ptr() for item in batches for x in (item.tokens, item.labels, item.weights)}
    saved = Saved(weights | given)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.x):
        outcome = forward_backward(engine, Likelihood(), batches)
    apply_gradient(engine, outcome, 1e-3, 1.0)
    found = {
        "weights": nbytes(held),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": _optimizer_bytes(engine, weights),
        "saved": saved.most,
        "shapes": Counter(saved.at_most),
        "pp": engine.groups.at.pp,
    }
    close_groups(world=False)
    return found


def _codes(model: Any) -> list[torch.Tensor]:
    """What a model holds of its matrices in few bits."""
    return [x for p in model.parameters() if hasattr(p, "stored") for x in p.stored.tensors]


def _optimizer_bytes(engine: Any, weights: set[int]) -> int:
    """Moments, and the fp32 master weights."""
    total = 0
    for part in engine.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            total += nbytes(p for p in group["params"] if p.untyped_storage().data_ptr() not in weights)
        for held in getattr(part.optimizer, "moments", {}).values():
            total += nbytes((*held.codes, *held.scales))
        for state in part.optimizer.state.values():
            total += nbytes(x for x in state.values() if isinstance(x, torch.Tensor) and x.numel() > 1)
    return total
