"""Mutants of the Gluon forward kernel: one barrier, parity, index or mask of its source is changed at a time, and the
simulator must report a fault, or the numbers must be wrong.

One mutant of each kind of fault is quick, the others are slow. test_gluon holds that the unchanged kernel is right.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Gluon is part of triton")

from llm_kernels.attention import gluon_forward
from llm_kernels.attention.test_gluon import DEVICE, HOPPER, forward_of, hold, segments_of
from llm_kernels.gluon_simulator import SimulationError
from llm_kernels.testing import cases_of, random


def tensors_of(d: int) -> tuple[Tensor, ...]:
    """Small tensors for mutants: q has two heads, k and v have one."""
    shapes = [(330, 1, 2, d), (330, 1, 1, d), (330, 1, 1, d)]
    return tuple(random(*shape, dtype=torch.bfloat16, seed=i, device=DEVICE).detach() for i, shape in enumerate(shapes))


STEP = "    acc, _p = warpgroup_mma_wait(0, [product, p])\n    mbarrier.arrive(v_empty.index(before), count=1)\n"
LAST = "            acc, _p, at = warpgroup_mma_wait(0, [product, p, at])\n"
FIRST = "            mbarrier.arrive(k_empty.index(used % STAGES), count=1)\n"
WAIT_Q = "            mbarrier.wait(q_full.index(WHICH), begun & 1)\n"
FREE_Q = "            mbarrier.arrive(q_empty.index(WHICH), count=1)\n"
RACE, DEADLOCK, WRONG = "reads|overwrites|more than its", "deadlock", "wrong numbers"
EITHER = f"{RACE}|{DEADLOCK}"
MUTANTS = {
    "k not awaited": ("    mbarrier.wait(k_full.index(stage), n // STAGES & 1)\n", "", RACE),
    "first k not awaited": ("            mbarrier.wait(k_full.index(used % STAGES), used // STAGES & 1)\n", "", RACE),
    "v not awaited": ("    mbarrier.wait(v_full.index(stage), n // STAGES & 1)\n", "", RACE),
    "first v not awaited": ("            mbarrier.wait(v_full.index(used % STAGES), used // STAGES & 1)\n", "", RACE),
    "q not awaited": (WAIT_Q, "", RACE),
    "free k not awaited": ("                mbarrier.wait(k_empty.index(stage), free)\n", "", RACE),
    "free v not awaited": ("                mbarrier.wait(v_empty.index(stage), free)\n", "", RACE),
    "free q not awaited": ("                mbarrier.wait(q_empty.index(which), (begun & 1) ^ 1)\n", "", RACE),
    "parity of k": ("k_full.index(stage), n // STAGES & 1", "k_full.index(stage), (n // STAGES & 1) ^ 1", EITHER),
    "parity of v": ("v_full.index(stage), n // STAGES & 1", "v_full.index(stage), (n // STAGES & 1) ^ 1", EITHER),
    "parity of q": ("q_full.index(WHICH), begun & 1", "q_full.index(WHICH), (begun & 1) ^ 1", EITHER),
    "parity of free buffers": (
        "free = ((filled + i) // STAGES & 1) ^ 1",
        "free = (filled + i) // STAGES & 1",
        DEADLOCK,
    ),
    "parity of free q": ("(begun & 1) ^ 1)", "begun & 1)", DEADLOCK),
    "parity of turns": ("(taken & 1) ^ (1 - WHICH)", "taken & 1", DEADLOCK),
    "turn not handed over": ("mbarrier.arrive(turn.index(1 - WHICH), count=1)", "pass", r"deadlock.*turn\[1\]"),
    "k freed before its product": (
        "    keys = key + gl.arange(",
        "    mbarrier.arrive(k_empty.index(stage), count=1)\n    keys = key + gl.arange(",
        EITHER,
    ),
    "v freed early": (STEP, "".join(reversed(STEP.splitlines(keepends=True))), RACE),
    "q freed early": (WAIT_Q, WAIT_Q + FREE_Q, RACE),
    "last v never freed": ("            mbarrier.arrive(v_empty.index(last), count=1)\n", "", r"deadlock.*v_empty"),
    "first k never freed": (FIRST, "", r"deadlock.*k_empty"),
    "q never freed": (FREE_Q, "", r"deadlock.*q_empty"),
    "k freed by one consumer": (
        "mbarrier.init(k_empty.index(i), count=2)",
        "mbarrier.init(k_empty.index(i), count=1)",
        EITHER,
    ),
    "wrong v": ("v_tiles.index(before), acc, is_async", "v_tiles.index(stage), acc, is_async", RACE),
    "wrong k": ("q, k_tiles.index(stage)", "q, k_tiles.index(before)", RACE),
    "k in v's buffer": ("k_full.index(stage), k_tiles.index(stage)", "k_full.index(stage), v_tiles.index(stage)", RACE),
    "bytes of k": (
        "mbarrier.expect(k_full.index(stage), BLOCK_N * D * 2)",
        "mbarrier.expect(k_full.index(stage), BLOCK_N * D)",
        EITHER,
    ),
    "weights not kept": (
        "warpgroup_mma_wait(0, [product, p])",
        "warpgroup_mma_wait(0, [product, acc])",
        "not among the deps",
    ),
    "product used in flight": (LAST, LAST.replace("wait(0", "wait(1"), "in flight"),
    "q used as if both halves were one": ("q = q_tiles.index(WHICH)", "q = q_tiles.index(0)", f"{RACE}|{WRONG}"),
    "keys of the wrong document": ("k_desc, [k_start + i * BLOCK_N, k_col]", "k_desc, [i * BLOCK_N, k_col]", WRONG),
    "values one row off": (
        "v_desc, [k_start + i * BLOCK_N, v_col]",
        "v_desc, [k_start + i * BLOCK_N + 1, v_col]",
        WRONG,
    ),
    "queries of the wrong head": ("+ h % GROUP * q_place[2]", "+ 0 * q_place[2]", WRONG),
    "diagonal one off": (
        "limit = gl.minimum(limit, rows + (len_k - len_q + 1))",
        "limit = gl.minimum(limit, rows + (len_k - len_q))",
        WRONG,
    ),
    "mask too short": ("whole = gl.minimum(gl.maximum(seen_by_all // BLOCK_N, 1), tiles)", "whole = tiles", WRONG),
    "not rescaled": ("    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, acc_layout))[:, None]\n", "", WRONG),
    "sum not rescaled": ("row_sum * alpha + gl.sum(p, 1)", "row_sum + gl.sum(p, 1)", WRONG),
    "a tile of keys forgotten": (
        "gl.minimum(len_k, gl.minimum(first + BLOCK_M, len_q) + len_k - len_q)",
        "gl.minimum(len_k, first)",
        f"{WRONG}|{EITHER}",
    ),
    "rows of the next document stored": (
        "mask=(at < len_q - first)[:, None]",
        "mask=(at < HALF)[:, None]",
        f"outside the tensor|another partition|{WRONG}",
    ),
    "log-sum-exp in base 2": ("(row_max + gl.log2(row_sum)) * LN2", "row_max + gl.log2(row_sum)", WRONG),
    "a tile done twice": (
        "index = turn * programs + gl.where(turn % 2 == 0, program, programs - 1 - program)",
        "index = turn + program",
        f"another partition|{WRONG}",
    ),
}  # fmt: skip


WITNESSES = [
    "k not awaited", "q freed early", "parity of turns", "q never freed", "bytes of k", "weights not kept",
    "product used in flight", "diagonal one off", "not rescaled", "rows of the next document stored",
]  # fmt: skip


@pytest.mark.skipif(HOPPER, reason="a broken barrier would hang the GPU; the simulator finds it")
@pytest.mark.parametrize(("old", "new", "message"), cases_of(MUTANTS, WITNESSES))
def test_every_way_to_break_the_kernel_is_found(old: str, new: str, message: str, tmp_path: Path) -> None:
    source = Path(gluon_forward.__file__).read_text()
    assert source.count(old) == 1, f"{source.count(old)} places read {old!r}"
    path = tmp_path / "mutant.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("mutant", path)
    assert spec is not None and spec.loader is not None
    mutant = importlib.util.module_from_spec(spec)
    sys.modules["mutant"] = mutant
    spec.loader.exec_module(mutant)
    tensors = tensors_of(64)
    segments = segments_of([(0, 0, 60, 0, 60), (0, 60, 330, 60, 330)], 1, 330, 330)
    with pytest.raises((SimulationError, AssertionError)) as caught:
        hold(tensors, *forward_of(mutant, tensors, segments, seed=1, programs=2), segments)
    found = str(caught.value) if isinstance(caught.value, SimulationError) else WRONG
    assert re.search(message, found), found


def test_the_kernel_itself_passes_where_its_mutants_fail() -> None:
    tensors = tensors_of(64)
    segments = segments_of([(0, 0, 60, 0, 60), (0, 60, 330, 60, 330)], 1, 330, 330)
    for seed in range(6):
        hold(tensors, *forward_of(gluon_forward, tensors, segments, seed=seed, programs=1 + seed % 3), segments)
