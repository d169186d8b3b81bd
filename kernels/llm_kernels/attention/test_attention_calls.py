"""What attention promises beside right numbers: it compiles into one graph, refuses what it does not support, reads and
writes elements that lie gigabytes apart, never makes the host wait, and costs the host little time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="the kernels need triton")

from llm_kernels import host_time
from llm_kernels.attention import kernel_backward, kernel_delta
from llm_kernels.attention.kernel import forward
from llm_kernels.attention.op import Segments, attention, attention_qkv
from llm_kernels.attention.ref import Options
from llm_kernels.device import arch
from llm_kernels.test_compile import outputs_and_gradients
from llm_kernels.test_host_time import count_calls
from llm_kernels.testing import default_device, far_apart, random

DEVICE = default_device()
BACKENDS = ["triton", "torch"]


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [random(*shape, dtype=torch.float32, seed=i) for i, shape in enumerate(shapes)]


def of_documents(backend: str, qkv: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Segments whose bounds are on the device, made inside of the traced graph."""
    return attention_qkv(qkv, Segments.from_cu_seqlens(cu_seqlens, cu_seqlens, 4, 4), backend=backend)


def of_rows(backend: str, *qkv: Tensor) -> tuple[Tensor, Tensor]:
    segments = Segments.from_rows([(0, 0, 2, 0, 4), (0, 2, 5, 4, 7)], 1, 5, 7, DEVICE)
    out = attention(*qkv, segments=segments, return_lse=True, softcap=3.0, dropout_p=0.3, seed=4, backend=backend)
    assert isinstance(out, tuple)
    return out


CU_SEQLENS = torch.tensor([0, 2, 6], dtype=torch.int32, device=DEVICE)
CALLS: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    "dense": (lambda b, *x: attention(*x, backend=b), leaves((5, 1, 2, 8), (7, 1, 1, 8), (7, 1, 1, 8))),
    "rows, lse, soft cap, dropout": (of_rows, leaves((5, 1, 2, 8), (7, 1, 1, 8), (7, 1, 1, 8))),
    "packed documents": (lambda b, x: of_documents(b, x, CU_SEQLENS), leaves((6, 1, 2, 4, 8))),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_compiles_whole_with_the_gradients_of_the_eager_call(name: str, backend: str) -> None:
    op, inputs = CALLS[name]
    torch._dynamo.reset()
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    expected, found = (outputs_and_gradients(f, backend, inputs) for f in (op, compiled))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CALLS)
def test_second_derivatives_are_refused(name: str) -> None:
    op, inputs = CALLS[name]
    out = op("triton", *inputs)
    out = out[0] if isinstance(out, tuple) else out
    (gradient,) = torch.autograd.grad(out, inputs[:1], torch.ones_like(out), create_graph=True)
    with pytest.raises(RuntimeError, match=r"attention\w* has no second derivative"):
        gradient.square().sum().backward()


def test_refuses_dtypes_and_head_dims_that_the_kernels_lack() -> None:
    """They are refused before anything is launched; ``auto`` computes them by torch."""
    q, k, v = (random(3, 1, 1, 16, dtype=torch.float64, seed=i) for i in range(3))
    with pytest.raises(ValueError, match=r"float32, bfloat16 and float16, not torch\.float64"):
        attention(q, k, v, backend="triton")
    with pytest.raises(ValueError, match=r"float32, bfloat16 and float16, not torch\.float64"):
        attention_qkv(torch.stack([q, k, v], 3), backend="triton")
    assert attention(q, k, v).dtype == torch.float64
    wide = random(3, 1, 1, 264, dtype=torch.float32)
    with pytest.raises(ValueError, match="up to 256, this is 264"):
        attention(wide, wide, wide, backend="triton")
    assert attention(wide, wide, wide).shape == wide.shape


def test_tables_are_copied_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of packed documents is copied from pinned memory, once per micro batch, without blocking the host."""
    pinned = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.name() == "aten::_to_copy":
                assert kwargs["non_blocking"] and pinned
            return func(*args, **(kwargs or {}))

    def pin(x: Tensor) -> Tensor:
        pinned.append(x)
        return x

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    with Copies():
        segments = Segments.from_rows([(0, 0, 3, 0, 3)], 1, 3, 3, "meta")
        assert Segments.dense(1, 77, 78, "meta").table.device.type == "meta"
    assert segments.table.device.type == "meta" and segments.rows == ((0, 0, 3, 0, 3),) and len(pinned) == 2


# Elements between two tokens, samples or heads; the offset of the third one does not fit into 32 bits.
FAR = 3 << 29


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would have to hold the gigabytes")
@pytest.mark.parametrize("strides", [(FAR, 64, 16), (64, FAR, 16), (64, 1024, FAR)], ids=["tokens", "samples", "heads"])
def test_elements_gigabytes_apart(strides: tuple[int, int, int], tmp_path: Path) -> None:
    """Both the inputs and the gradients lie far apart; the repaired interpreter raises where 32 bits overflow."""
    s, b, h, d = 3, 3, 3, 16

    def far() -> Tensor:
        return far_apart((s, b, h, d), (*strides, 1), torch.bfloat16, tmp_path)

    def run(q: Tensor, k: Tensor, v: Tensor, gradients: list[Tensor]) -> list[Tensor]:
        table, options = Segments.dense(b, s, s, DEVICE).table, Options(0.25, right=0)
        by_group = q.unsqueeze(2)  # all heads of q are in one group
        out, lse = forward(by_group, k, v, table, s, True, options, arch(q))
        stats = kernel_delta.per_row(out, out, lse, None)
        tensors = (by_group, k, v, out, *stats)
        results = (gradients[0].unsqueeze(2), *gradients[1:])
        kernel_backward.backward(tensors, results, table, (s, s), options, arch(q))
        return [out, lse, *(x.contiguous() for x in gradients)]

    q, k, v = far(), far(), far()
    k, v = k[:, :, 2:], v[:, :, 2:]
    near = run(*(x.contiguous() for x in (q, k, v)), [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)])
    results = [far(), far()[:, :, 2:], far()[:, :, 2:]]
    for found, wanted in zip(run(q, k, v, results), near, strict=True):
        assert torch.equal(found, wanted)


def test_few_calls_and_no_wait() -> None:
    """Counts function calls of Python and C in forward and backward; through torch.library there would be 354."""
    with host_time.without_kernels():
        (call,) = [call for call in host_time.calls() if call.name == "attention_qkv"]
        run = host_time.both_of(call)
        count = count_calls(run)
        print(count)
        assert count <= 250

        class NoNumbers(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                assert not any(part in func.name() for part in ("_local_scalar_dense", "nonzero", "masked_select"))
                return func(*args, **(kwargs or {}))

        with NoNumbers():
            run()
