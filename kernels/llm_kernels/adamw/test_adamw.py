"""AdamW against the same steps in fp64, beside torch's own; its state against torch's; and that a resumed run has the
same bits."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim.adamw import adamw

from llm_kernels.adamw import ref
from llm_kernels.adamw.bench import BENCHMARK, NUMBERS
from llm_kernels.adamw.op import Addresses, adamw_
from llm_kernels.adamw.optimizer import FusedAdamW
from llm_kernels.memory_checker import Traffic
from llm_kernels.testing import FACTOR, SUMMARY, default_device

pytest.importorskip("triton", reason="the kernels need triton")


def tensors(sizes: Sequence[int], seed: int = 0, gradient: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """p, grad, m, v of the given sizes."""
    generator = torch.Generator().manual_seed(seed)
    columns = [[torch.randn(size, generator=generator) for size in sizes] for _ in range(4)]
    columns[3] = [x.square() for x in columns[3]]
    columns[1] = [x.to(gradient) for x in columns[1]]
    return [[x.to(default_device()) for x in column] for column in columns]


def reach(checked: Traffic | None, columns: Sequence[Sequence[Tensor]]) -> None:
    """Tells the memory checker which tensors the kernel reaches by their addresses."""
    if checked is not None:
        checked.reachable = lambda: [x for column in columns for x in column]


def step_ours(columns: list[list[Tensor]], **options) -> None:
    adamw_(*columns, NUMBERS, backend="triton", **options)


SIZES = {
    "one element": [1],
    "one vector": [16],
    "a chunk, one less and one more": [16383, 16384, 16385],
    "several chunks, and an empty tensor": [3, 0, 40000, 77],
}


@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_step(checked: Traffic | None, sizes: list[int], gradient: torch.dtype) -> None:
    ours, theirs, exact = (tensors(sizes, gradient=gradient) for _ in range(3))
    exact = [[x.double() for x in column] for column in exact]
    reach(checked, ours)
    step_ours(ours)
    ref.adamw_(*exact, [], NUMBERS)
    steps = [torch.tensor(float(NUMBERS.step - 1)) for _ in sizes]
    theirs[1] = [x.float() for x in theirs[1]]
    adamw(
        *theirs, [], steps, foreach=True, amsgrad=False, beta1=NUMBERS.beta1, beta2=NUMBERS.beta2, lr=NUMBERS.lr,
        weight_decay=NUMBERS.weight_decay, eps=NUMBERS.eps, maximize=False,
    )  # fmt: skip
    for which in (0, 2, 3):
        for found, peer, right in zip(ours[which], theirs[which], exact[which]):
            if not right.numel():
                continue
            scale = right.abs().max()
            error, of_peer = ((x.double() - right).abs().max() / scale for x in (found, peer))
            assert error <= FACTOR * of_peer + torch.finfo(torch.float32).eps, (which, error, of_peer)
            SUMMARY.add("adamw/step", gradient, float(error), float(of_peer))


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 5000), min_size=1, max_size=6), offset=st.sampled_from([0, 1, 4, 16]))
def test_any_sizes_and_alignment(checked: Traffic | None, sizes: list[int], offset: int) -> None:
    """Tensors are views at an offset of one flat buffer, as in megatron-core; nothing outside of them changes."""
    total = sum(sizes) + offset
    flat = [torch.randn(total + 7, generator=torch.Generator().manual_seed(i)).to(default_device()) for i in range(4)]
    flat[3].square_()
    before = [x.clone() for x in flat]
    bounds = [(offset + sum(sizes[:i]), offset + sum(sizes[: i + 1])) for i in range(len(sizes))]
    ours, right = ([[x[a:b] for a, b in bounds] for x in source] for source in (flat, [x.clone() for x in flat]))
    reach(checked, [flat])
    step_ours(ours)
    ref.adamw_(*right, [], NUMBERS)
    for found, wanted in zip(ours, right):
        for x, y in zip(found, wanted):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
    for x, old in zip(flat, before):
        assert torch.equal(x[:offset], old[:offset]) and torch.equal(x[total:], old[total:])


def test_grouping_changes_no_bit(checked: Traffic | None) -> None:
    together, apart = tensors([100, 20000, 64]), tensors([100, 20000, 64])
    reach(checked, [*together, *apart])
    step_ours(together)
    for index in range(3):
        step_ours([[column[index]] for column in apart])
    assert all(torch.equal(x, y) for a, b in zip(together, apart) for x, y in zip(a, b))


def test_a_longer_tensor_at_the_same_address_is_stepped_whole(checked: Traffic | None) -> None:
    """The cache of addresses must not take a tensor for a shorter one that begins at the same address."""
    columns, right = tensors([64]), tensors([64])
    start = [column[0].clone() for column in columns]
    reach(checked, columns)
    addresses = Addresses()
    step_ours([[column[0][:32]] for column in columns], addresses=addresses)
    for column, x in zip(columns, start):
        column[0].copy_(x)
    step_ours(columns, addresses=addresses)
    ref.adamw_(*right, [], NUMBERS)
    torch.testing.assert_close(columns[0][0], right[0][0], rtol=1e-6, atol=1e-6)


def test_scale_is_folded_in(checked: Traffic | None) -> None:
    scaled, plain = tensors([1000]), tensors([1000])
    reach(checked, [*scaled, *plain])
    factor = torch.tensor(0.125, device=default_device())
    step_ours(scaled, scale=factor)
    plain[1] = [x * factor for x in plain[1]]
    reach(checked, [*scaled, *plain])
    step_ours(plain)
    assert torch.equal(scaled[0][0], plain[0][0])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_skip_changes_nothing(checked: Traffic | None, backend: str) -> None:
    columns = tensors([1000])
    before = copy.deepcopy(columns)
    reach(checked, columns)
    adamw_(*columns, NUMBERS, skip=torch.tensor(1.0, device=default_device()), backend=backend)
    assert all(torch.equal(x, y) for a, b in zip(columns, before) for x, y in zip(a, b))
    adamw_(*columns, NUMBERS, skip=torch.tensor(0.0, device=default_device()), backend=backend)
    assert not torch.equal(columns[0][0], before[0][0])


def test_low_precision_copy_is_the_rounded_parameter(checked: Traffic | None) -> None:
    columns = tensors([1000, 48])
    low = [torch.empty(x.shape, dtype=torch.bfloat16, device=x.device) for x in columns[0]]
    reach(checked, [*columns, low])
    step_ours(columns, low=low)
    assert all(torch.equal(x, p.to(torch.bfloat16)) for x, p in zip(low, columns[0]))


def train(optimizer: torch.optim.Optimizer, params: list[Tensor], steps: range) -> None:
    for number in steps:
        generator = torch.Generator().manual_seed(number)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.device)
        optimizer.step()


def parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(size, generator=generator).to(default_device()).requires_grad_() for size in (33, 512)]


def make(kind: str, params: list[Tensor]) -> torch.optim.Optimizer:
    groups = [{"params": params[:1], "weight_decay": 0.0}, {"params": params[1:]}]
    if kind == "torch":
        return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    return FusedAdamW(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, backend=kind)


def reach_state(checked: Traffic | None, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    def tensors_of() -> list[Tensor]:
        params = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        states = [x for optimizer in optimizers for state in optimizer.state.values() for x in state.values()]
        return [*params, *(p.grad for p in params if p.grad is not None), *states]

    if checked is not None:
        checked.reachable = tensors_of


@pytest.mark.parametrize(("first", "second"), [("torch", "triton"), ("triton", "torch"), ("triton", "triton")])
def test_state_passes_between_torch_and_ours(checked: Traffic | None, first: str, second: str) -> None:
    """Five steps of one optimizer, then five of another that has loaded its state, equal ten steps of torch's. From
    ours to ours they are, bit for bit, those of a run that was not interrupted."""
    whole, resumed, reference = parameters(), parameters(), parameters()
    early, late, peer = make(first, resumed), make(second, resumed), make("torch", reference)
    unbroken = make(second, whole)
    reach_state(checked, [early, late, unbroken])
    train(early, resumed, range(5))
    late.load_state_dict(copy.deepcopy(early.state_dict()))
    train(late, resumed, range(5, 10))
    train(unbroken, whole, range(10))
    train(peer, reference, range(10))
    for x, y, z in zip(resumed, whole, reference):
        torch.testing.assert_close(x, z, rtol=2e-6, atol=2e-6)
        if first == second:
            assert torch.equal(x, y)


@pytest.mark.parametrize("option", ["amsgrad", "maximize"])
def test_state_of_another_rule_is_refused(option: str) -> None:
    params = parameters()
    saved = torch.optim.AdamW(params, **{option: True}).state_dict()  # type: ignore[arg-type]
    ours = FusedAdamW(params, backend="torch")
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match=option):
        ours.load_state_dict(saved)
    assert ours.state_dict() == before


def test_scale_is_used_once(checked: Traffic | None) -> None:
    params = parameters()
    ours = make("triton", params)
    reach_state(checked, [ours])
    assert isinstance(ours, FusedAdamW)
    ours.scale = torch.tensor(0.0, device=default_device())
    train(ours, params, range(1))
    assert all(not state["exp_avg"].any() for state in ours.state.values()) and ours.scale is None
    train(ours, params, range(1, 2))
    assert all(state["exp_avg"].any() for state in ours.state.values())


@pytest.mark.parametrize("low", [False, True])
def test_moves_the_least_bytes(traffic: Traffic, low: bool) -> None:
    inputs = BENCHMARK.make(BENCHMARK.small, torch.float32, default_device())
    columns = [list(x.chunk(8)) for x in inputs]
    copies = [torch.empty_like(x, dtype=torch.bfloat16) for x in columns[0]] if low else []
    reach(traffic, [*columns, copies])
    step_ours(columns, low=copies)
    least = (30 if low else 28) * BENCHMARK.small["parameters"]
    moved = traffic.bytes_loaded + traffic.bytes_stored
    print(f"adamw low={low}: {moved / least:.4f}")
    assert moved <= 1.03 * least


NO_EXCHANGE = """
from llm_kernels.adamw.bench import aot_cases
from llm_kernels.aot import inspect
for arch in (80, 90):
    for report in [inspect(case, arch) for case in aot_cases(arch)]:
        assert not report.problems and not report.shared_bytes, (report.name, report.shared_bytes, report.problems)
"""


@pytest.mark.slow
def test_no_thread_waits_for_another() -> None:
    """No element depends on another, so the kernel needs no shared memory. If it had some, the layouts of 2-byte and
    4-byte tensors would differ."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", NO_EXCHANGE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_bad_input_is_named() -> None:
    columns = tensors([8, 8])
    with pytest.raises(ValueError, match="grads has 1 tensors"):
        adamw_(columns[0], columns[1][:1], columns[2], columns[3], NUMBERS)
    with pytest.raises(ValueError, match=r"exp_avgs\[0\] is torch.bfloat16"):
        adamw_(columns[0], columns[1], [x.bfloat16() for x in columns[2]], columns[3], NUMBERS)
    with pytest.raises(ValueError, match=r"params\[0\] is torch.bfloat16; AdamW steps float32"):
        adamw_([x.bfloat16() for x in columns[0]], *columns[1:], NUMBERS)
    with pytest.raises(ValueError, match=r"grads mixes torch.bfloat16 and torch.float32"):
        adamw_(columns[0], [columns[1][0], columns[1][1].bfloat16()], *columns[2:], NUMBERS)
    with pytest.raises(ValueError, match=r"grads\[1\] is \(8,\) with strides \(2,\); it must be contiguous"):
        adamw_(columns[0], [columns[1][0], columns[1][1].repeat(2)[::2]], *columns[2:], NUMBERS)
    with pytest.raises(ValueError, match=r"exp_avg_sqs\[0\] is \(4,\).* as many elements as params\[0\], \(8,\)"):
        adamw_(*columns[:3], [x[:4] for x in columns[3]], NUMBERS)
