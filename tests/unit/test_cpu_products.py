"""Products by oneDNN on a CPU: right for every way in which a matrix may lie in memory, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llm_parallel.parallel import cpu_products


@pytest.fixture(scope="module", autouse=True)
def installed() -> Iterator[None]:
    """Installs the products whatever this machine's processor is."""
    if cpu_products.onednn_linear() is None:
        pytest.skip("this torch has no oneDNN")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_products, "is_faster", lambda: True)
        cpu_products.install()
        yield
        cpu_products.uninstall()


WAYS = {
    "rows": lambda m, n: torch.randn(m, n),
    "columns": lambda m, n: torch.randn(n, m).t(),
    "with gaps": lambda m, n: torch.randn(m, n + 3)[:, :n],
    "every second row": lambda m, n: torch.randn(2 * m, n)[::2],
    "every second column": lambda m, n: torch.randn(m, 2 * n)[:, ::2],
    "one row repeated": lambda m, n: torch.randn(1, n).expand(m, n),
    "one column repeated": lambda m, n: torch.randn(m, 1).expand(m, n),
    "one number": lambda m, n: torch.randn(1).expand(m, n),
    "from the second element on": lambda m, n: torch.randn(m * n + 1)[1:].view(m, n),
}
sizes = st.integers(0, 40)
ways = st.sampled_from(sorted(WAYS))


@given(sizes, sizes, sizes, ways, ways)
def test_a_product_is_that_of_fp64(m: int, k: int, n: int, left: str, right: str) -> None:
    a, b = WAYS[left](m, k), WAYS[right](k, n)
    expected = a.double() @ b.double()
    torch.testing.assert_close((a @ b).double(), expected, rtol=1e-5, atol=1e-5)


def gradients_of(x: Tensor, weight: Tensor) -> list[Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    torch.nn.functional.linear(x, weight).sin().sum().backward()
    assert x.grad is not None and weight.grad is not None
    return [x.grad, weight.grad]


def test_gradients_are_those_of_fp64() -> None:
    x, weight = torch.randn(5, 3, 24), torch.randn(40, 24)
    for found, expected in zip(gradients_of(x, weight), gradients_of(x.double(), weight.double())):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_comparison_gets_torchs_own_products() -> None:
    a, b = torch.randn(64, 96), torch.randn(96, 32)
    own = torch.mm(a, b, out=torch.empty(64, 32))
    with cpu_products.as_torch_multiplies():
        assert cpu_products._library is None
        assert torch.equal(a @ b, own)
    assert cpu_products._library is not None


def test_other_dtypes_are_as_before() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int64):
        a, b = torch.randint(-3, 4, (9, 17)).to(dtype), torch.randint(-3, 4, (17, 5)).to(dtype)
        assert torch.equal((a @ b).double(), a.double() @ b.double()), dtype
