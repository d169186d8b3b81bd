"""Operators of ``kernels.deterministic``: right against fp64, and the same bits in another company."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm_kernels.attention.ref import Options, Segment, explicit
from llm_parallel.config.tree import ModelConfig
from llm_parallel.errors import UserError
from llm_parallel.model import deterministic as ops
from llm_parallel.model import deterministic_attention
from llm_parallel.model.deterministic_attention import Scores

DTYPES = (torch.float32, torch.bfloat16)
GRADIENT = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


class Alone:
    """A process group of this process."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


@pytest.fixture(autouse=True, params=[1, 3])
def _threads(request: Any) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_gradients(ours: Any, exact: Any, *inputs: Tensor) -> None:
    """Value and gradients of both against fp64."""
    dtype = inputs[0].dtype
    near = [x.clone().requires_grad_() for x in inputs]
    far = [x.double().requires_grad_() for x in inputs]
    out, wanted = ours(*near), exact(*far)
    upstream = drawn(*wanted.shape, seed=9)
    (out.float() * upstream).sum().backward()
    (wanted * upstream).sum().backward()
    pairs = [(out, wanted), *((x.grad, y.grad) for x, y in zip(near, far))]
    for found, right in pairs:
        assert found is not None and right is not None
        error = (found.double() - right).abs().max() / right.abs().max()
        assert error < GRADIENT[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_right(dtype: torch.dtype) -> None:
    x, weight = drawn(5, 2, 24, dtype=dtype), drawn(10, 24, dtype=dtype, seed=1)
    check_gradients(ops.ColumnProduct.apply, F.linear, x, weight)
    for parts in (1, 3, 4):
        check_gradients(lambda x, w, n=parts: ops.RowProduct.apply(x, w, n, Alone(), True), F.linear, x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_activation_norm_and_losses_are_right(dtype: torch.dtype) -> None:
    check_gradients(
        ops.SwiGLU.apply, lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], drawn(7, 3, 20, dtype=dtype)
    )
    check_gradients(
        lambda x: ops.SquaresOfHeads.apply(x, Alone()), lambda x: x.square().sum((1, 2))[:, None],
        drawn(6, 3, 8, dtype=dtype),
    )  # fmt: skip
    logits, labels = drawn(4, 3, 48, dtype=dtype) * 4, torch.randint(41, (4, 3))
    labels[1, 1] = -100

    def exact(logits: Tensor) -> Tensor:
        capped = 5.0 * torch.tanh(logits[..., :41] / 5.0)
        return F.cross_entropy(capped.flatten(0, 1), labels.flatten(), reduction="none").view(4, 3)

    check_gradients(lambda x: ops.token_losses(x, labels, 41, 41, 5.0, None), exact, logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("left", "softcap"), [(-1, 0.0), (9, 0.0), (-1, 3.0)])
def test_attention_is_right(dtype: torch.dtype, left: int, softcap: float) -> None:
    """Two documents in one row, one in the other, over more than one block of keys and one call."""
    rows = ((Segment(0, 70, 0, 70), Segment(70, 300, 70, 300)), (Segment(0, 300, 0, 300),))
    table = torch.tensor([[0, 0, 70, 0, 70], [0, 70, 300, 70, 300], [1, 0, 300, 0, 300]])
    q, k, v = drawn(300, 2, 4, 8, dtype=dtype), *(drawn(300, 2, 2, 8, dtype=dtype, seed=s) for s in (1, 2))
    how = Scores(0.3, left, softcap)
    check_gradients(
        lambda q, k, v: deterministic_attention.attention(q, k, v, rows, how),
        lambda q, k, v: explicit(q, k, v, table, Options(0.3, left, 0, softcap))[0],
        q, k, v,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_in_any_company(dtype: torch.dtype) -> None:
    x, weight = drawn(150, 96, dtype=dtype), drawn(72, 96, dtype=dtype, seed=1)
    gates, logits = drawn(150, 2 * 3001, dtype=dtype), drawn(150, 301)
    labels = torch.arange(150) % 301
    whole = [
        ops.product(x, weight), ops.parted_product(x, ops.cut(weight, 4)), ops.gated(gates),
        ops.log_probs_of(logits, labels), -ops.token_losses(logits, labels, 301, 301, 0.0, None),
    ]  # fmt: skip
    assert torch.equal(whole[3], whole[4])
    for first, count in ((0, 1), (7, 2), (3, 5), (60, 33), (1, 149)):
        at = slice(first, first + count)
        part = [
            ops.product(x[at], weight), ops.parted_product(x[at], ops.cut(weight, 4)), ops.gated(gates[at]),
            ops.log_probs_of(logits[at], labels[at]),
        ]  # fmt: skip
        for found, wanted in zip(part, whole):
            assert torch.equal(found, wanted[at])


def test_what_ranks_have_adds_up_to_what_one_has() -> None:
    """Columns of a product, and parts of a sum, divided over 2 and 4 ranks."""
    x, weight = drawn(20, 64), drawn(48, 64, seed=1)
    whole, summed = ops.product(x, weight), ops.parted_product(x, ops.cut(weight, 4))
    for ranks in (2, 4):
        shards = [ops.product(x, shard.contiguous()) for shard in weight.chunk(ranks)]
        assert torch.equal(torch.cat(shards, 1), whole)
        columns = zip(x.chunk(ranks, 1), weight.chunk(ranks, 1))
        parts = [ops.parted_product(part, ops.cut(shard, 4 // ranks)) for part, shard in columns]
        assert torch.equal(ops.tree_sum(parts), summed)


@pytest.mark.parametrize("left", [-1, 20])
def test_a_query_sees_the_same_from_a_cache_and_beside_others(left: int) -> None:
    q, k, v, how = drawn(200, 2, 3, 16), drawn(200, 2, 16, seed=1), drawn(200, 2, 16, seed=2), Scores(0.25, left)
    whole = deterministic_attention.attend_in_chunks(q, k, v, how)
    for start, end in ((0, 1), (63, 64), (64, 65), (150, 151), (10, 131), (199, 200)):
        found = deterministic_attention.attend_in_chunks(q[start:end], k[:end], v[:end], how)
        assert torch.equal(found, whole[start:end])
    keys, values = (deterministic_attention.in_blocks(x[:128]) for x in (k, v))
    lengths = torch.tensor([70, 70, 128, 128])
    both = torch.cat((q[69], q[127]))[None]
    side_by_side = deterministic_attention.attend(both, keys.repeat(2, 1, 1), values.repeat(2, 1, 1), lengths, how)
    assert torch.equal(side_by_side[0], torch.cat((whole[69], whole[127])))


def test_the_number_of_parts_suits_the_layouts() -> None:
    def parts(heads: int, width: int, tp: int) -> int:
        model = ModelConfig(
            num_layers=1,
            hidden_size=heads * 8,
            ffn_hidden_size=width,
            num_attention_heads=heads,
            num_query_groups=heads,
        )
        return ops.num_parts(model, tp)

    assert [parts(32, 11008, tp) for tp in (1, 2, 4, 8, 16)] == [8, 8, 8, 8, 16]
    assert [parts(9, 1536, tp) for tp in (1, 3, 9)] == [3, 3, 9]
    assert [parts(14, 4864, tp) for tp in (1, 2, 7)] == [2, 2, 7]
    assert parts(15, 2560, 1) == 5 and parts(7, 64, 1) == 1


def test_a_machine_whose_products_depend_on_their_rows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = drawn(5, 7)
    monkeypatch.setattr(ops, "_onednn", lambda x, w: F.linear(x, w) * (1.0 + 1e-3 * len(x)))
    monkeypatch.setattr(ops, "_least", {})
    with pytest.raises(UserError, match="depends on the number of its rows on this machine; set it to false"):
        ops.product(drawn(3, 7), weight)
    monkeypatch.setattr(ops, "_onednn", lambda x, w: F.linear(x, w) * (1.0 if len(x) >= 8 else 2.0))
    np.testing.assert_array_equal(
        ops.product(drawn(3, 7), weight), F.linear(F.pad(drawn(3, 7), (0, 0, 0, 5)), weight)[:3]
    )
