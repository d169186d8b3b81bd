"""AdamW on numbers that are finite but extreme, against fp64, beside torch's own AdamW in fp32."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.optim.adamw import adamw

from llm_kernels.adamw import ref
from llm_kernels.adamw.bench import NUMBERS
from llm_kernels.adamw.op import adamw_
from llm_kernels.adamw.optimizer import FusedAdamW
from llm_kernels.adamw.ref import AdamWStep
from llm_kernels.memory_checker import Traffic
from llm_kernels.testing import FACTOR, default_device

pytest.importorskip("triton", reason="the kernels need triton")

# At the first step bias corrections are large, at a late one there are none.
STEPS = {
    "step 1": replace(NUMBERS, step=1),
    "step 1e7": replace(NUMBERS, step=10**7),
    "eps 0": replace(NUMBERS, eps=0.0),
    "beta2 0.99999, step 3": replace(NUMBERS, beta2=0.99999, step=3),
    "learning rate 1e-12, no decay": replace(NUMBERS, lr=1e-12, weight_decay=0.0),
}
SCALES = (1e-38, 1e-30, 1e-20, 1e-10, 1e-4, 1.0, 1e4, 1e10, 1e18, 3e19, 1e25, 1e37)


def columns(size: int = 64) -> list[Tensor]:
    """p, gradient, m, v. For each scale of the gradient there are ``size`` elements with zero moments, and as many with
    moments that earlier gradients of that scale have left."""
    generator = torch.Generator().manual_seed(0)
    out: list[list[Tensor]] = [[], [], [], []]
    for scale in SCALES:
        for history in (0.0, 1.0):
            noise = torch.randn(4, size, generator=generator)
            v = (noise[3].double() * scale * history).square().clamp(max=3e38).float()
            for column, x in zip(out, (noise[0], noise[1] * scale, noise[2] * scale * history, v)):
                column.append(x)
    return [torch.cat(column).to(default_device()) for column in out]


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numbers", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("clip", [None, 1e-3])
def test_extremes(checked: Traffic | None, clip: float | None, numbers: AdamWStep, dtype: torch.dtype) -> None:
    scale = None if clip is None else torch.tensor(clip, device=default_device())
    sources = columns()
    sources[1] = sources[1].to(dtype)
    ours, theirs, exact = ([[x.clone()] for x in sources] for _ in range(3))
    exact, theirs[1] = [[x.double() for x in column] for column in exact], [x.float() for x in theirs[1]]
    if scale is not None:
        theirs[1], exact[1] = [x * scale for x in theirs[1]], [x * scale.double() for x in exact[1]]
    if checked is not None:
        checked.reachable = lambda: [x for column in ours for x in column]
    adamw_(*ours, numbers, scale=scale, backend="triton")
    ref.adamw_(*exact, [], numbers)
    steps = [torch.tensor(float(numbers.step - 1)) for _ in theirs[0]]
    adamw(
        *theirs, [], steps, foreach=True, amsgrad=False, beta1=numbers.beta1, beta2=numbers.beta2, lr=numbers.lr,
        weight_decay=numbers.weight_decay, eps=numbers.eps, maximize=False,
    )  # fmt: skip
    worst = (0.0, "")
    for which, name in ((0, "parameter"), (2, "first moment"), (3, "second moment")):
        segments = (x[which][0].view(2 * len(SCALES), -1) for x in (ours, theirs, exact))
        for number, (found, peer, right) in enumerate(zip(*segments)):
            label = f"{name}, gradients of {SCALES[number // 2]:g}, {'with' if number % 2 else 'no'} history"
            sure = peer.isfinite() & (right.abs() < torch.finfo(torch.float32).max)
            assert found[sure].isfinite().all(), f"{label}: not finite where torch is"
            if not sure.any():
                continue
            size = max(right[sure].abs().max().item(), torch.finfo(torch.float32).tiny)
            error, of_peer = ((x.double() - right)[sure].abs().max().item() / size for x in (found, peer))
            limit = FACTOR * max(of_peer, torch.finfo(torch.float32).eps / 2)
            assert error <= limit, f"{label}: error {error:.2e}, torch's {of_peer:.2e}"
            worst = max(worst, (error / max(of_peer, torch.finfo(torch.float32).eps / 2), label))
    print(f"adamw, gradients {str(dtype)[6:]}: worst ratio to torch's error {worst[0]:.2f} ({worst[1]})")


def whole(dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32)) -> list[list[Tensor]]:
    """p, gradient, m, v of one tensor, of the dtypes of p and of the gradient."""
    state, gradient = dtypes
    generator = torch.Generator().manual_seed(3)
    found = [torch.rand(20, generator=generator).to(default_device(), x) for x in (state, gradient, state, state)]
    return [[x] for x in found]


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float64)], ids=str)
def test_fp64_is_the_references(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    found, right = whole(dtypes), whole(dtypes)
    adamw_(*found, NUMBERS)
    ref.adamw_(*right, [], NUMBERS)
    assert torch.equal(found[0][0], right[0][0])
    with pytest.raises(ValueError, match=r"float32, bfloat16 and float16, not torch\.float64"):
        adamw_(*found, NUMBERS, backend="triton")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_writes_are_noticed_by_autograd(checked: Traffic | None, backend: str) -> None:
    data = whole()
    if checked is not None:
        checked.reachable = lambda: [x for column in data for x in column]
    p = data[0][0].requires_grad_()
    loss = (p * p).sum()
    with pytest.raises(ValueError, match="params requires a gradient"):
        adamw_(*data, NUMBERS, backend=backend)
    with torch.no_grad():
        adamw_(*data, NUMBERS, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_whole(checked: Traffic | None, backend: str) -> None:
    """With all tensors that are written in place, and all scalars on the device."""
    results: list[list[Tensor]] = []
    if checked is not None:
        # A graph may pass copies of the tensors that are written in place, and the table then points to the copies.
        checked.reachable = lambda: [x for x in gc.get_objects() if type(x) is Tensor and x.numel() == 20]

    def step(p: Tensor, g: Tensor, m: Tensor, v: Tensor, low: Tensor, scale: Tensor, skip: Tensor) -> Tensor:
        with torch.no_grad():
            adamw_([p], [g], [m], [v], NUMBERS, low=[low], scale=scale, skip=skip, backend=backend)
        return low * 2

    torch._dynamo.reset()
    for run in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        data = [column[0] for column in whole()]
        device = data[0].device
        low = torch.zeros(20, dtype=torch.bfloat16, device=device)
        doubled = run(*data, low, torch.tensor(0.5, device=device), torch.tensor(0.0, device=device))
        results.append([*data, low, doubled])
    for found, wanted in zip(*results, strict=True):
        assert torch.equal(found, wanted)
    assert not torch.equal(results[0][0], whole()[0][0])


def test_a_group_in_several_launches(checked: Traffic | None) -> None:
    """Parameters of one group that differ in their number of steps, as after freezing, or in their gradients' dtype."""
    ours, theirs = ([torch.linspace(-1, 1, n).to(default_device()).requires_grad_() for n in (5, 9, 9)] for _ in "ab")
    optimizer, peer = FusedAdamW(ours, lr=1e-2, backend="triton"), torch.optim.AdamW(theirs, lr=1e-2)
    if checked is not None:
        checked.reachable = lambda: [
            *ours, *(p.grad for p in ours if p.grad is not None),
            *(x for state in optimizer.state.values() for x in state.values()),
        ]  # fmt: skip
    for turn in range(4):
        for index, (p, q) in enumerate(zip(ours, theirs)):
            q.grad = None if (turn, index) == (1, 0) else torch.sin(q.detach() + turn).bfloat16().float()
            if index == 2:
                p.grad_dtype = torch.bfloat16
            p.grad = None if q.grad is None else q.grad.to(torch.bfloat16 if index == 2 else torch.float32)
        optimizer.step()
        peer.step()
    assert [int(optimizer.state[p]["step"]) for p in ours] == [3, 4, 4]
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_loss_scaling_in_fp16(checked: Traffic | None, backend: str) -> None:
    """fp16 gradients and copies, as with apex: a step whose gradients have overflowed is skipped and leaves no NaN, and
    the next step is as if that one had not happened."""
    data = whole((torch.float32, torch.float16))
    right = [[x.double() for x in column] for column in data]
    low = [torch.zeros(20, dtype=torch.float16, device=data[0][0].device)]
    if checked is not None:
        checked.reachable = lambda: [*overflown, *low, *(x for column in data for x in column)]
    overflown = [torch.full_like(data[1][0], torch.inf)]
    options = {"scale": torch.tensor(2.0**-10, device=low[0].device), "low": low, "backend": backend}
    skip = overflown[0].isinf().any().float()
    adamw_(data[0], overflown, data[2], data[3], NUMBERS, skip=skip, **options)  # type: ignore[arg-type]
    assert not low[0].any() and torch.equal(data[0][0].double(), right[0][0])
    adamw_(*data, NUMBERS, skip=skip * 0, **options)  # type: ignore[arg-type]
    ref.adamw_(right[0], [right[1][0] * 2.0**-10], right[2], right[3], [], NUMBERS)
    for which in (0, 2, 3):
        torch.testing.assert_close(data[which][0].double(), right[which][0], rtol=1e-6, atol=1e-7)
    assert torch.equal(low[0], data[0][0].half())


def test_a_frozen_model_steps_nothing() -> None:
    """A case of apex's: no parameter has a gradient."""
    p = torch.ones(5, device=default_device(), requires_grad=True)
    optimizer = FusedAdamW([p], backend="triton")
    optimizer.step()
    assert not optimizer.state and torch.equal(p.detach(), torch.ones_like(p))


def test_a_chunk_behind_two_thousand_million_elements(checked: Traffic | None) -> None:
    """Offsets into a tensor are int64. The addresses in the table lie 8 GiB before the few numbers that exist, and the
    one program steps the chunk that begins at these numbers."""
    from llm_kernels.adamw import kernel

    first = 2**31 // kernel.CHUNK
    data, right = whole(), [[x[0].double()] for x in whole()]
    if checked is not None:
        checked.reachable = lambda: [x for column in data for x in column]
    addresses = [[*(x[0].data_ptr() - 4 * 2**31 for x in data), 0]]
    table = [torch.tensor(addresses), torch.tensor([2**31 + data[0][0].numel()])]
    table += [torch.tensor([number], dtype=torch.int32) for number in (0, first)]
    scalars = [
        NUMBERS.decay, NUMBERS.beta2, 1 - NUMBERS.beta1, 1 - NUMBERS.beta2, NUMBERS.step_size,
        NUMBERS.root_correction, NUMBERS.eps,
    ]  # fmt: skip
    on_device = [x.to(default_device()) for x in table]
    kernel.launch(kernel.Table(*on_device, aligned=False), (torch.float32, None), None, None, scalars)
    ref.adamw_(*right, [], NUMBERS)
    torch.testing.assert_close(data[0][0].double(), right[0][0], rtol=1e-6, atol=1e-6)
