"""The Gluon kernels: in the simulator, or on a Hopper GPU if there is one.

Results are compared with fp64 on dense, grouped, ragged and packed tensors, in orders of execution drawn from many
seeds. test_gluon_forward and test_gluon_backward show that the simulator finds the faults of broken kernels.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="Gluon is part of triton")

from llm_kernels import aot
from llm_kernels.attention import bench, gluon_backward, gluon_forward, op, ref
from llm_kernels.attention.bench import gluon_fault
from llm_kernels.attention.op import Segments, attention, attention_qkv, merge
from llm_kernels.attention.ref import Options
from llm_kernels.attention.test_attention import Rows, framework
from llm_kernels.gluon_simulator import simulate
from llm_kernels.testing import cases_of, compare, random

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
DEVICE = torch.device("cuda" if HOPPER else "cpu")


class Simulated:
    """Runs launches in the simulator. ``seed`` draws the order of execution; ``programs``: how many a GPU would run."""

    def __init__(self) -> None:
        self.seed, self.programs, self.launches = 0, 3, 0

    def launch(self, grid: tuple[int], arguments: dict[str, Any]) -> None:
        self.launches += 1
        simulate(gluon_forward._attention_fwd_gluon_kernel, grid, seed=self.seed, **arguments)

    def launch_backward(self, kernel: Any, grid: tuple[int, int], arguments: dict[str, Any]) -> None:
        self.launches += 1
        simulate(kernel, grid, seed=self.seed, **arguments)


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulated]:
    """Makes calls of the operator run the Gluon kernels in the simulator, or on a Hopper GPU as they are."""
    machine = Simulated()
    if HOPPER:
        assert gluon_fault() is None
    else:
        monkeypatch.setattr(op, "arch", lambda _: 90)
        monkeypatch.setattr(gluon_forward, "_launch", machine.launch)
        monkeypatch.setattr(gluon_backward, "_launch", machine.launch_backward)
        monkeypatch.setattr(gluon_forward, "num_sms", lambda _: machine.programs)
    yield machine
    assert HOPPER or machine.launches


def segments_of(rows: Rows | None, b: int, sq: int, sk: int) -> Segments:
    return Segments.dense(b, sq, sk, DEVICE) if rows is None else Segments.from_rows(rows, b, sq, sk, DEVICE)


def check(case: str, inputs: list[Tensor], rows: Rows | None = None, causal: bool = True) -> None:
    """Asserts that output, log-sum-exp and gradients have at most twice torch's error, measured against fp64."""
    q, k = inputs[:2]
    segments = segments_of(rows, q.shape[1], q.shape[0], k.shape[0])
    options = Options(q.shape[-1] ** -0.5, right=0 if causal else -1)
    compare(
        f"attention gluon/{case}",
        lambda *x: attention(*x, segments=segments, causal=causal, backend="gluon"),
        framework(segments.table, options),
        lambda *x: ref.explicit(*x, segments.table, options)[0],
        inputs,
    )
    with torch.no_grad():
        _, lse = attention(*inputs, segments=segments, causal=causal, backend="gluon", return_lse=True)
        _, right = ref.explicit(*(x.detach().double() for x in inputs), segments.table, options)
    torch.testing.assert_close(lse.double(), right, rtol=2e-6, atol=2e-6)


def inputs_of(sq: int, sk: int, b: int, h: int, g: int, d: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    shapes = [(sq, b, h, d), (sk, b, g, d), (sk, b, g, d)]
    return [random(*shape, dtype=dtype, seed=seed, device=DEVICE) for seed, shape in enumerate(shapes)]


SHAPES = {
    "one tile": (128, 128, 1, 1, 1, 64),
    "several tiles of keys and of queries": (300, 300, 1, 1, 1, 64),
    "grouped heads, batch": (140, 140, 2, 4, 2, 64),
    "head dim 128": (260, 260, 1, 2, 1, 128),
    "head dim 256": (140, 140, 1, 1, 1, 256),
    "fewer queries than keys": (70, 400, 1, 1, 1, 64),
    "more queries than keys: the first see nothing": (300, 150, 1, 1, 1, 64),
    "one query": (1, 130, 1, 2, 1, 64),
    "one key": (130, 1, 1, 1, 1, 64),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_causal(shape: tuple[int, ...], simulated: Simulated) -> None:
    check(f"causal {shape}", inputs_of(*shape))


# Without a causal mask only the last tile of keys is an edge, and every query sees the same keys.
@pytest.mark.parametrize("shape", cases_of({k: (v,) for k, v in SHAPES.items()}, [
    "several tiles of keys and of queries", "head dim 256", "one key",
]))  # fmt: skip
def test_full(shape: tuple[int, ...], simulated: Simulated) -> None:
    check(f"full {shape}", inputs_of(*shape), causal=False)


@pytest.mark.parametrize("d", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_fp16(d: int, simulated: Simulated) -> None:
    check(f"fp16 {d}", inputs_of(200, 200, 1, 2, 1, d, torch.float16))


RAGGED: dict[str, tuple[tuple[int, int, int], Rows]] = {
    "documents of many lengths": (
        (420, 420, 1),
        [(0, a, b, a, b) for a, b in ((0, 1), (1, 130), (130, 131), (131, 400), (400, 420))],
    ),
    "documents of a batch": ((150, 150, 2), [(1, 0, 90, 0, 90), (0, 0, 150, 0, 150), (1, 90, 150, 90, 150)]),
    "queries and keys of other lengths": ((130, 300, 1), [(0, 0, 100, 0, 40), (0, 100, 130, 40, 300)]),
    "no keys, no queries": ((100, 100, 1), [(0, 0, 50, 0, 0), (0, 50, 100, 20, 100), (0, 100, 100, 0, 20)]),
    "queries in no segment": ((200, 200, 1), [(0, 20, 60, 0, 150), (0, 100, 190, 150, 200)]),
}  # fmt: skip


@pytest.mark.parametrize(("lengths", "rows"), RAGGED.values(), ids=RAGGED.keys())
def test_ragged(lengths: tuple[int, int, int], rows: Rows, simulated: Simulated) -> None:
    sq, sk, b = lengths
    check(f"ragged {lengths}", inputs_of(sq, sk, b, 2, 1, 64), rows)


@given(
    st.integers(0, 10**6), st.lists(st.integers(1, 200), min_size=1, max_size=4), st.integers(1, 3), st.integers(1, 5)
)
@settings(max_examples=15)
def test_random_documents_in_random_orders(seed: int, lengths: list[int], groups: int, programs: int) -> None:
    total = sum(lengths)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    rows = [(0, start, start + n, start, start + n) for start, n in zip(starts, lengths)]
    q, k, v = (x.detach() for x in inputs_of(total, total, 1, 2 * groups, groups, 64))
    found, lse = forward_of(gluon_forward, (q, k, v), segments_of(rows, 1, total, total), seed, programs)
    hold((q, k, v), found, lse, segments_of(rows, 1, total, total))


def forward_of(
    module: ModuleType, tensors: tuple[Tensor, ...], segments: Segments, seed: int = 0, programs: int = 3
) -> tuple[Tensor, Tensor]:
    """Causal output and log-sum-exp, computed by the kernel of ``module``."""
    q, k, v = tensors
    options = Options(q.shape[-1] ** -0.5, right=0)
    q = q.unflatten(2, (k.shape[2], -1))
    if HOPPER:
        assert gluon_fault() is None
        return module.forward(q, k, v, segments.table, segments.max_q, segments.covers_queries, options, 90)
    out = torch.full((q.shape[0], q.shape[1], q.shape[2] * q.shape[3], q.shape[4]), float("nan"), dtype=q.dtype)
    lse = torch.full((q.shape[1], out.shape[2], q.shape[0]), float("nan"))
    grid, arguments = module._arguments(
        (q, k, v, out, lse), segments.table, segments.max_q, options.scale, True, programs
    )
    simulate(module._attention_fwd_gluon_kernel, grid, seed=seed, **arguments)
    return out, lse


def hold(tensors: tuple[Tensor, ...], found: Tensor, lse: Tensor, segments: Segments) -> None:
    """Asserts that the error of a causal output and its log-sum-exp is at most twice torch's plus one rounding of the
    largest value."""
    q = tensors[0]
    options = Options(q.shape[-1] ** -0.5, right=0)
    right, right_lse = ref.explicit(*(x.double() for x in tensors), segments.table, options)
    error = (framework(segments.table, options)(*tensors).double() - right).abs().max()
    rounding = torch.finfo(q.dtype).eps * right.abs().max()
    assert (found.double() - right).abs().max() <= 2 * error + rounding
    torch.testing.assert_close(lse.double(), right_lse, rtol=2e-6, atol=2e-6)


def test_packed_projection_and_strided_rows(simulated: Simulated) -> None:
    qkv = random(150, 2, 2, 4, 64, dtype=torch.bfloat16, device=DEVICE)
    segments = segments_of(None, 2, 150, 150)
    options = Options(0.125, right=0)

    def by_parts(function: Any) -> Any:
        return lambda x: function(x[:, :, :, :2].flatten(2, 3), x[:, :, :, 2], x[:, :, :, 3])

    compare(
        "attention gluon/packed",
        lambda x: attention_qkv(x, backend="gluon"),
        by_parts(framework(segments.table, options)),
        by_parts(lambda *x: ref.explicit(*x, segments.table, options)[0]),
        [qkv],
    )


def test_merged_halves_of_the_keys(simulated: Simulated) -> None:
    """As under context parallelism: attention to two parts of the keys, merged by their log-sum-exps."""
    q, k, v = inputs_of(70, 300, 1, 2, 1, 64)

    def halves(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = []
        for part in (slice(0, 100), slice(100, 300)):
            both = attention(q, k[part], v[part], causal=False, backend="gluon", return_lse=True)
            assert isinstance(both, tuple)
            parts += both
        return merge(*parts)[0]

    table = segments_of(None, 1, 70, 300).table
    options = Options(0.125)
    compare(
        "attention gluon/merged",
        halves,
        framework(table, options),
        lambda *x: ref.explicit(*x, table, options)[0],
        [q, k, v],
        floor=2.0,
    )


def test_large_scores_and_large_keys_of_others(simulated: Simulated) -> None:
    """Scores in the thousands do not overflow, and keys beyond a document may be any finite number."""
    q, k, v = (x.detach() for x in inputs_of(200, 200, 1, 1, 1, 64))
    q, k = q * 40, k.index_fill(0, torch.arange(130, 200, device=DEVICE), 1e30)
    segments = segments_of([(0, 0, 130, 0, 130)], 1, 200, 200)
    found, lse = attention(q, k, v, segments=segments, backend="gluon", return_lse=True)
    inside = [x[:130] for x in (q, k, v)]
    table = segments_of(None, 1, 130, 130).table
    right, right_lse = ref.explicit(*(x.double() for x in inside), table, Options(0.125, right=0))
    error = (framework(table, Options(0.125, right=0))(*inside).double() - right).abs().max()
    assert (found[:130].double() - right).abs().max() <= 2 * error + 2.0**-7 * right.abs().max()
    torch.testing.assert_close(lse[..., :130].double(), right_lse, rtol=2e-6, atol=2e-6)
    assert not found[130:].any() and torch.equal(lse[..., 130:], torch.full_like(lse[..., 130:], -torch.inf))


def test_nan_is_not_swallowed(simulated: Simulated) -> None:
    """Masked scores are computed as a minimum, which must be NaN where the score is NaN."""
    q, k, v = (x.detach() for x in inputs_of(128, 128, 1, 1, 1, 64))
    k[100] = float("nan")
    out = attention(q, k, v, backend="gluon")
    assert isinstance(out, Tensor) and out[100:].isnan().all()


REFUSED: dict[str, tuple[tuple[int, torch.dtype], dict[str, Any], str]] = {
    "window": ((64, torch.bfloat16), {"window": (10, 0)}, "no window, soft cap or dropout"),
    "soft cap": ((64, torch.bfloat16), {"softcap": 20.0}, "no window, soft cap or dropout"),
    "dropout": ((64, torch.bfloat16), {"dropout_p": 0.1}, "no window, soft cap or dropout"),
    "head dim": ((96, torch.bfloat16), {}, "head dim 64, 128 or 256, this is torch.bfloat16 of 96"),
    "wide head dim": ((512, torch.bfloat16), {}, "this is torch.bfloat16 of 512"),
    "dtype": ((64, torch.float32), {}, "takes bf16 and fp16 .* this is torch.float32"),
}


@pytest.mark.parametrize(("what", "how", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_it_lacks_is_refused_in_a_sentence(
    what: tuple[int, torch.dtype], how: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "arch", lambda _: 90)
    d, dtype = what
    with pytest.raises(ValueError, match=message):
        attention(*inputs_of(8, 8, 1, 1, 1, d, dtype), backend="gluon", **how)


def test_strides_that_tma_cannot_read_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "arch", lambda _: 90)
    q, k, v = inputs_of(8, 8, 1, 2, 1, 64)
    shifted = torch.empty(8, 1, 1, 68, dtype=q.dtype, device=DEVICE)[..., 4:]
    for broken in (shifted, k[:1].expand(8, 1, 1, 64)):
        with pytest.raises(ValueError, match=r"q, k and v have strides .*68|q, k and v have strides .*0, 64"):
            attention(q, broken, v, backend="gluon")


@pytest.mark.skipif(HOPPER, reason="the proof finds a GPU here, and passes")
def test_proof_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the process that runs the proof fails, and its error is the answer."""
    monkeypatch.setattr(bench, "PROOF_S", 600)  # a busy machine may need more than the limit to import torch
    gluon_fault.cache_clear()
    assert re.search("CUDA|NVIDIA driver", gluon_fault() or "")


@pytest.mark.skipif(HOPPER, reason="this machine's GPU takes the kernels that others are refused")
def test_other_machines_are_refused() -> None:
    with pytest.raises(ValueError, match=f"compute capability 9.0 .*, {DEVICE} is not one"):
        attention(*inputs_of(8, 8, 1, 1, 1, 64), backend="gluon")


COMPILE = """
import json, sys
from pathlib import Path
from llm_kernels import aot
from llm_kernels.attention.bench import aot_cases
if __name__ == "__main__":
    cases = [case for case in aot_cases(90) if case.name == "attention forward gluon d=128 causal bf16"]
    print(json.dumps(aot.as_data([aot.inspect(case, 90, Path(sys.argv[1])) for case in cases])))
"""


def test_compiled_loop_exponentiates_while_the_product_runs(tmp_path: Path) -> None:
    """ptxas keeps the order of the source and does not spill: all exponentials of a tile lie between the wait for its
    scores and the wait for the product of the tile before. FlashAttention 4's loop, compiled here, has 475 instructions
    for 16 HGMMA."""
    script = tmp_path / "compile.py"
    script.write_text(COMPILE)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script, tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (report,) = json.loads(done.stdout)
    assert not report["problems"] and report["spill_bytes"] == 0
    assert report["instructions"]["tma"] and report["instructions"]["setmaxnreg"]
    assert report["loop"] == {"hgmma": 16, "wait": 3, "barrier": 5} and report["loop_length"] <= 490
    instructions, labels = aot._parse(next(tmp_path.glob("*.sass")).read_text())
    bodies = []
    for address, opcode, operands in instructions:
        start = labels.get(operands.split("`(")[-1].split(")")[0], address) if opcode.startswith("BRA") else address
        bodies.append([each for each in instructions if start <= each[0] <= address])
    loop = next(body for body in bodies if len(body) == report["loop_length"])
    waits = [i for i, (_, opcode, _) in enumerate(loop) if opcode.startswith("WARPGROUP.DEPBAR")]
    exponentials = [i for i, (_, opcode, _) in enumerate(loop) if opcode == "MUFU.EX2"]
    assert len(exponentials) == 66 and waits[0] < exponentials[0] and exponentials[-1] < waits[1]
