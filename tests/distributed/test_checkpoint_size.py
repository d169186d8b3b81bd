"""The size of a checkpoint as it is predicted before the run, against folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.ckpt_jobs import open_store
from tests.support.harness import run_ranks
from tests.support.job import base_config, changed, open_engine

pytestmark = pytest.mark.gloo

BIASES = {"model.qkv_bias": True, "model.mlp_bias": True, "model.tie_embeddings": True}
KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "fp32": ({}, 1),
    "fp32 in place": ({"parallel.distributed_optimizer": False}, 1),
    "bf16": ({"train.precision": "bf16", "parallel.dp": 2}, 2),
    "bf16 in place": ({"train.precision": "bf16", "parallel.distributed_optimizer": False, **BIASES}, 1),
    "adapters": ({"adapter.rank": 64}, 1),
    "bf16 in TP 2": ({"train.precision": "bf16", "parallel.tp": 2}, 2),
}


def save(rank: int, world_size: int, changes: dict[str, Any], folder: str) -> None:
    from llm_parallel.checkpoint.state import TrainState

    config = changed(base_config(), changes)
    engine = open_engine(config, rank, world_size)
    open_store(engine, config, folder).save({"policy": engine}, TrainState(step=1), blocking=True)


@pytest.mark.parametrize("kind", KINDS)
def test_predicted_size_is_within_two_percent(kind: str, tmp_path: Path) -> None:
    from llm_parallel.train.room import checkpoint_bytes

    changes, processes = KINDS[kind]
    changes = {"model.hidden_size": 128, "model.ffn_hidden_size": 256, **changes}
    run_ranks(save, processes, changes, str(tmp_path))
    size = sum(path.stat().st_size for path in (tmp_path / "iter_0000001").rglob("*"))
    predicted = checkpoint_bytes(changed(base_config(), changes))
    print(f"| {kind} | {size} | {predicted} | {predicted / size - 1:+.2%} |")
    assert predicted == pytest.approx(size, rel=0.02)
