"""Mutants of the Gluon backward kernels: one barrier, parity, index or mask of the source is changed at a time, and the
simulator must report a fault, or the numbers must be wrong.

One mutant of each kind of fault is quick, the others are slow. test_gluon holds that the unchanged kernels are right,
through the operator's gradients.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Gluon is part of triton")

from llm_kernels.attention import gluon_backward, gluon_dkdv, gluon_dq, kernel_delta, ref
from llm_kernels.attention.ref import Options
from llm_kernels.attention.test_attention import framework
from llm_kernels.gluon_simulator import SimulationError, simulate
from llm_kernels.testing import cases_of, random

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="broken kernels belong in the simulator")

# A program has up to five tiles in its loop, more than any number of stages, so every buffer is used again.
ROWS = [(0, 0, 70, 0, 60), (0, 70, 330, 60, 700)]
OPTIONS = Options(0.125, right=0)


@cache
def case() -> tuple[tuple[Tensor, ...], Tensor, list[Tensor], list[float]]:
    """(tensors for the kernels, table of segments, right gradients, the largest error that each gradient may have)."""
    shapes = [(330, 1, 2, 64), (700, 1, 1, 64), (700, 1, 1, 64), (330, 1, 2, 64)]
    q, k, v, dout = (random(*s, dtype=torch.bfloat16, seed=i, device="cpu").detach() for i, s in enumerate(shapes))
    table = torch.tensor(ROWS, dtype=torch.int32)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = ref.explicit(*exact, table, OPTIONS)
    right = list(torch.autograd.grad(out, exact, dout.double()))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    peer = torch.autograd.grad(framework(table, OPTIONS)(*leaves), leaves, dout)
    limits = [2 * (x.double() - y).abs().max().item() + 2.0**-7 * y.abs().max().item() for x, y in zip(peer, right)]
    out, lse = out.detach().bfloat16().contiguous(), lse.detach().float().contiguous()
    stats = kernel_delta.per_row(out, dout, lse, None)
    return (q.unflatten(2, (1, 2)), k, v, dout, *stats), table, right, limits


def hold(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Asserts that the kernels, run in the simulator, compute the right gradients."""
    tensors, table, right, limits = case()

    def launch(kernel: Any, grid: tuple[int, int], arguments: dict[str, Any]) -> None:
        simulate(kernel, grid, seed=seed, **arguments)

    monkeypatch.setattr(gluon_backward, "_launch", launch)
    found = [torch.full(x.shape, float("nan"), dtype=torch.bfloat16) for x in right]
    gradients = (found[0].unflatten(2, (1, 2)), found[1], found[2])
    gluon_backward.backward(tensors, gradients, table, (260, 640), OPTIONS, 90)
    for x, y, limit in zip(found, right, limits):
        assert (x.double() - y).abs().max() <= limit


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3))])
def test_unchanged_kernels_pass_where_mutants_fail(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hold(monkeypatch, seed)


RACE, DEADLOCK, WRONG = "reads|overwrites|more than its", "deadlock", "wrong numbers"
EITHER = f"{RACE}|{DEADLOCK}"
FREE = (
    "    dk, dv, _weights, _ds = warpgroup_mma_wait(0, [key_product, value_product, weights, ds])\n"
    "    mbarrier.arrive(empty.index(stage), count=1)\n"
)
KEYS_AND_VALUES = {
    "k and v not awaited": ("        mbarrier.wait(kv_full.index(0), 0)\n", "", RACE),
    "q not awaited": ("    mbarrier.wait(q_full.index(stage), parity)\n", "", RACE),
    "dout not awaited": ("    mbarrier.wait(dout_full.index(stage), parity)\n    shares", "    shares", RACE),
    "free buffers not awaited": ("                mbarrier.wait(empty.index(stage), free)\n", "", RACE),
    "parity": ("parity = n // STAGES & 1", "parity = (n // STAGES & 1) ^ 1", EITHER),
    "parity of free buffers": ("free = (n // STAGES & 1) ^ 1", "free = n // STAGES & 1", DEADLOCK),
    "freed while in use": (FREE, "".join(reversed(FREE.splitlines(keepends=True))), RACE),
    "products in flight": ("warpgroup_mma_wait(0, [key_product,", "warpgroup_mma_wait(1, [key_product,", "in flight"),
    "never freed": ("    mbarrier.arrive(empty.index(stage), count=1)\n", "", r"deadlock.*empty"),
    "lse without its arrival": (
        "                mbarrier.arrive(q_full.index(stage), count=1)\n",
        "",
        r"deadlock.*q_full",
    ),
    "arrival before lse is there": (
        "mbarrier.init(q_full.index(i), count=2)",
        "mbarrier.init(q_full.index(i), count=1)",
        RACE,
    ),
    "lse of another stage": ("lse_tiles.index(stage).load", "lse_tiles.index(0).load", f"{RACE}|{WRONG}"),
    "freed by one consumer": (
        "mbarrier.init(empty.index(i), count=2)",
        "mbarrier.init(empty.index(i), count=1)",
        EITHER,
    ),
    "values of the other half": ("v = v_tiles.index(WHICH)", "v = v_tiles.index(0)", WRONG),
    "bytes of k and v": ("4 * HALF * D * 2", "2 * HALF * D * 2", EITHER),
    "queries of one head only": ("+ member * q_place[2]", "+ 0 * q_place[2]", WRONG),
    "dout of one head only": ("dout_col = head * D", "dout_col = (batch * H + group * GROUP) * D", WRONG),
    "queries beyond the document count": (
        "mask=inside, other=float(\"inf\")",
        "other=float(\"inf\")",
        WRONG + "|outside",
    ),
    "diagonal one off": ("queries[None, :] - sees[:, None]", "queries[None, :] - sees[:, None] - 1", WRONG),
    "mask too short": (
        "edge = gl.minimum(gl.maximum((first + HALF - 1 - shift + QUERIES - 1) // QUERIES, low), high)",
        "edge = low",
        WRONG,
    ),
    "a tile of queries forgotten": (
        "low = gl.maximum(first - (len_k - len_q), 0) // QUERIES",
        "low = gl.maximum(first - (len_k - len_q), 0) // QUERIES + 1",
        f"{WRONG}|{EITHER}",
    ),
    "not scaled": ("(dk * scale)", "dk", WRONG),
    "rows of the next document stored": (
        "mask=(at < rows - first)[:, None]",
        "mask=(at < HALF)[:, None]",
        f"outside|another partition|{WRONG}",
    ),
}  # fmt: skip
QUERIES = {
    "q not awaited": ("            mbarrier.wait(q_full.index(WHICH), 0)\n", "", RACE),
    "k not awaited": ("    mbarrier.wait(k_full.index(k_stage), n // STAGES_K & 1)\n    scores", "    scores", RACE),
    "parity of v": (
        "mbarrier.wait(v_full.index(v_stage), n // STAGES_V & 1)\n    shares",
        "mbarrier.wait(v_full.index(v_stage), (n // STAGES_V & 1) ^ 1)\n    shares",
        EITHER,
    ),
    "free k not awaited": ("            mbarrier.wait(k_empty.index(k_stage), (n // STAGES_K & 1) ^ 1)\n", "", RACE),
    "free v not awaited": ("            mbarrier.wait(v_empty.index(v_stage), (n // STAGES_V & 1) ^ 1)\n", "", RACE),
    "parity of free k": ("(n // STAGES_K & 1) ^ 1", "n // STAGES_K & 1", DEADLOCK),
    "k freed with its scores": (
        "mbarrier.arrive(k_empty.index(before), count=1)",
        "mbarrier.arrive(k_empty.index(k_stage), count=1)",
        EITHER,
    ),
    "v freed early": (
        "    if BEFORE:\n        product = ",
        "    mbarrier.arrive(v_empty.index(v_stage), count=1)\n    if BEFORE:\n        product = ",
        EITHER,
    ),
    "wrong k": ("ds, k_tiles.index(before)", "ds, k_tiles.index(k_stage)", WRONG),
    "gradients not kept": (
        "warpgroup_mma_wait(0, [product, ds])\n        mbarrier",
        "warpgroup_mma_wait(0, [product, dp])\n        mbarrier",
        "not among the deps",
    ),
    "share before its product": (
        "warpgroup_mma_wait(1 if BEFORE else 0, [shares])",
        "warpgroup_mma_wait(2 if BEFORE else 1, [shares])",
        "in flight",
    ),
    "dout of the other half": ("dout = dout_tiles.index(WHICH)", "dout = dout_tiles.index(0)", f"{RACE}|{WRONG}"),
    "diagonal one off": ("rows + (len_k - len_q + 1))", "rows + (len_k - len_q))", WRONG),
    "mask too short": ("whole = gl.minimum(gl.maximum(whole, 1), tiles)", "whole = tiles", WRONG),
    "queries beyond the document count": ("mask=rows < len_q, other=float(\"inf\")", "mask=rows < 0, other=0.0", WRONG),
    "lse of another head": (
        "at = ((batch * H + h) * SQ + q_start) + rows",
        "at = ((batch * H + h // GROUP) * SQ + q_start) + rows",
        WRONG,
    ),
    "not scaled": ("(dq * scale)", "dq", WRONG),
    "delta forgotten": ("share = p * (dp - delta[:, None])", "share = p * dp", WRONG),
}  # fmt: skip
CASES = {
    f"{kernel}: {name}": (module, kernel, *mutant)
    for module, kernel, mutants in ((gluon_dkdv, "dkdv", KEYS_AND_VALUES), (gluon_dq, "dq", QUERIES))
    for name, mutant in mutants.items()
}
WITNESSES = [
    "dkdv: q not awaited", "dkdv: parity of free buffers", "dkdv: products in flight", "dkdv: lse without its arrival",
    "dkdv: diagonal one off", "dkdv: rows of the next document stored", "dq: v freed early", "dq: parity of free k",
    "dq: gradients not kept", "dq: share before its product", "dq: delta forgotten",
]  # fmt: skip


@pytest.mark.parametrize(("module", "kernel", "old", "new", "message"), cases_of(CASES, WITNESSES))
def test_every_way_to_break_it_is_found(
    module: Any, kernel: str, old: str, new: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(module.__file__).read_text()
    assert source.count(old) == 1, f"{source.count(old)} places read {old!r}"
    path = tmp_path / "mutant.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("mutant", path)
    assert spec is not None and spec.loader is not None
    mutant = importlib.util.module_from_spec(spec)
    sys.modules["mutant"] = mutant
    spec.loader.exec_module(mutant)
    name = f"_attention_bwd_{kernel}_gluon_kernel"
    monkeypatch.setattr(gluon_backward, name, getattr(mutant, name))
    with pytest.raises((SimulationError, AssertionError)) as caught:
        hold(monkeypatch, seed=1)
    found = str(caught.value) if isinstance(caught.value, SimulationError) else WRONG
    assert re.search(message, found), found
