"""Saving under one layout and loading under another gives the undisturbed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_kernels.dispatch import triton_fault
from tests.support.ckpt_jobs import History, load_job, save_job
from tests.support.harness import run_ranks

pytestmark = pytest.mark.gloo


def _p(**parallel: Any) -> dict[str, Any]:
    return {f"parallel.{name}": value for name, value in parallel.items()}


ONE: dict[str, Any] = {}
TIED = {"model.tie_embeddings": True}
OURS = {"optim.implementation": "triton"}
PAIRS = [
    ("TP2 PP2 DP2", _p(tp=2, pp=2, dp=2), 8, [("TP1", ONE, 1), ("DP4", _p(dp=4), 4)]),
    ("TP1", ONE, 1, [("TP2 SP", _p(tp=2), 2), ("PP2 uneven", _p(pp=2, stage_layers=[3, 1]), 2)]),
    ("PP2 VPP2", _p(pp=2, vpp=2), 2, [("TP2 DP2", _p(tp=2, dp=2), 4)]),
    ("CP2 DP2", _p(cp=2, dp=2), 4, [("PP2 uneven", _p(pp=2, stage_layers=[1, 3]), 2)]),
    ("DP4 overlap, small buckets", _p(dp=4, overlap=True, bucket_size=3000), 4, [("TP2 CP2", _p(tp=2, cp=2), 4)]),
    ("tied PP2", _p(pp=2) | TIED, 2, [("tied TP2", _p(tp=2) | TIED, 2), ("tied TP1", TIED, 1)]),
    ("bf16 DP2", _p(dp=2) | {"train.precision": "bf16"}, 2, [("bf16 DP2", _p(dp=2) | {"train.precision": "bf16"}, 2)]),
    ("our AdamW DP2", _p(dp=2) | OURS, 2, [("torch's AdamW TP2", _p(tp=2), 2), ("our AdamW TP1", OURS, 1)]),
    ("bf16 our AdamW DP2", _p(dp=2) | OURS | {"train.precision": "bf16"}, 2,
     [("bf16 our AdamW DP2", _p(dp=2) | OURS | {"train.precision": "bf16"}, 2)]),
    ("plain optimizer DP2", _p(dp=2, distributed_optimizer=False), 2,
     [("plain optimizer TP2", _p(tp=2, distributed_optimizer=False), 2)]),
]  # fmt: skip


# Both ways of saving write the same plan; what differs is who waits for it, which these three show.
SYNCHRONOUS = ("TP2 PP2 DP2", "TP1", "bf16 our AdamW DP2")
NEEDS_TRITON = {"our AdamW TP1", "our AdamW DP2", "bf16 our AdamW DP2"}

BF16_OURS = _p(dp=2) | OURS | {"train.precision": "bf16"}
FEW: list[tuple[Any, ...]] = [
    ("PP2 VPP2", _p(pp=2, vpp=2), 2, [("TP2 DP2", _p(tp=2, dp=2), 4)]),
    ("CP2 DP2 overlap, small buckets", _p(cp=2, dp=2, overlap=True, bucket_size=3000), 4,
     [("PP2 uneven", _p(pp=2, stage_layers=[1, 3]), 2)]),
    ("tied PP2", _p(pp=2) | TIED, 2, [("tied TP2", _p(tp=2) | TIED, 2)]),
    ("our AdamW TP1", OURS, 1, [("torch's AdamW TP1", ONE, 1)]),
    ("bf16 our AdamW DP2", BF16_OURS, 2, [("bf16 our AdamW DP2", BF16_OURS, 2)]),
    ("plain optimizer DP2", _p(dp=2, distributed_optimizer=False), 2,
     [("plain optimizer TP2", _p(tp=2, distributed_optimizer=False), 2)]),
]  # fmt: skip
"""Each regime of ``PAIRS`` once, in few processes."""


def _case(pair: tuple[Any, ...], asynchronous: bool) -> Any:
    fault = triton_fault() if pair[0] in NEEDS_TRITON else None
    marks = [pytest.mark.skip(reason=fault)] if fault else []
    return pytest.param(*pair, asynchronous, id=f"{'async' if asynchronous else 'sync'}-{pair[0]}", marks=marks)


CASES = [_case(pair, True) for pair in PAIRS]
CASES += [_case(pair, False) for pair in PAIRS if pair[0] in SYNCHRONOUS]


def assert_goes_on(name: str, undisturbed: History, resumed: History) -> None:
    assert len(resumed) == len(undisturbed) > 0
    worst = max(abs(a - b) for (a, _), (b, _) in zip(undisturbed, resumed))
    print(f"| {name} | {worst:.1e} |")
    assert worst <= (1e-5 if "bf16" not in name else 0.0), name


@pytest.mark.parametrize(("name", "saved", "processes", "loads", "asynchronous"), [_case(pair, True) for pair in FEW])
def test_another_layout_goes_on_as_the_undisturbed_run(
    name: str, saved: dict[str, Any], processes: int, loads: list[Any], asynchronous: bool, tmp_path: Path
) -> None:
    """Two steps, a checkpoint, and three steps."""
    undisturbed = run_ranks(save_job, processes, saved, str(tmp_path), 2, 3)[0]
    for target, layout, ranks in loads:
        assert_goes_on(f"{name} -> {target}", undisturbed, run_ranks(load_job, ranks, layout, str(tmp_path), 3)[0])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "saved", "processes", "loads", "asynchronous"), CASES)
def test_any_layout_goes_on_as_the_undisturbed_run(
    name: str, saved: dict[str, Any], processes: int, loads: list[Any], asynchronous: bool, tmp_path: Path
) -> None:
    changes = saved | {"checkpoint.asynchronous": asynchronous}
    undisturbed = run_ranks(save_job, processes, changes, str(tmp_path))[0]
    for target, layout, ranks in loads if asynchronous else loads[:1]:
        assert_goes_on(f"{name} -> {target}", undisturbed, run_ranks(load_job, ranks, layout, str(tmp_path))[0])


def test_the_same_layout_resumes_bit_for_bit(tmp_path: Path) -> None:
    """And one process goes on from the same checkpoint, which is saved synchronously."""
    layout = _p(tp=2, pp=2) | {"checkpoint.asynchronous": False}
    undisturbed = run_ranks(save_job, 4, layout, str(tmp_path), 2, 3)[0]
    assert run_ranks(load_job, 4, layout, str(tmp_path), 3)[0] == undisturbed
    assert_goes_on("TP2 PP2 -> TP1", undisturbed, run_ranks(load_job, 1, ONE, str(tmp_path), 3)[0])
