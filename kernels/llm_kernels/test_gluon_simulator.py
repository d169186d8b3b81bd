"""The simulator of Gluon kernels: a pipelined product is right in every order of execution, and faults are found.

The kernel has the structure of the attention kernels: a loading warp, a warpgroup that multiplies asynchronously, and
barriers in both directions. Every mutant changes one place of its source.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Gluon is part of triton")

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from llm_kernels.gluon_simulator import SimulationError, simulate

PRODUCT = """
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait,
)

@gluon.jit
def load(a_desc, b_desc, a_tiles, b_tiles, full, empty, K, BLOCK: gl.constexpr, STAGES: gl.constexpr):
    for i in range(K // BLOCK):
        stage = i % STAGES
        mbarrier.wait(empty.index(stage), (i // STAGES & 1) ^ 1)
        mbarrier.expect(full.index(stage), 2 * BLOCK * BLOCK * 2)
        tma.async_copy_global_to_shared(a_desc, [0, i * BLOCK], full.index(stage), a_tiles.index(stage))
        tma.async_copy_global_to_shared(b_desc, [i * BLOCK, 0], full.index(stage), b_tiles.index(stage))

@gluon.jit
def multiply(a_tiles, b_tiles, full, empty, c_ptr, K, N, BLOCK: gl.constexpr, STAGES: gl.constexpr):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    acc = gl.zeros([BLOCK, BLOCK], gl.float32, layout)
    for i in range(K // BLOCK):
        stage = i % STAGES
        mbarrier.wait(full.index(stage), i // STAGES & 1)
        product = warpgroup_mma(a_tiles.index(stage), b_tiles.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(0, [product])
        mbarrier.arrive(empty.index(stage), count=1)
    rows = gl.arange(0, BLOCK, gl.SliceLayout(1, layout))
    cols = gl.arange(0, BLOCK, gl.SliceLayout(0, layout))
    gl.store(c_ptr + rows[:, None] * N + cols[None, :], acc)

@gluon.jit
def kernel(a_desc, b_desc, c_ptr, K, N, BLOCK: gl.constexpr, STAGES: gl.constexpr):
    a_tiles = gl.allocate_shared_memory(a_desc.dtype, [STAGES, BLOCK, BLOCK], a_desc.layout)
    b_tiles = gl.allocate_shared_memory(b_desc.dtype, [STAGES, BLOCK, BLOCK], b_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (multiply, (a_tiles, b_tiles, full, empty, c_ptr, K, N, BLOCK, STAGES)),
            (load, (a_desc, b_desc, a_tiles, b_tiles, full, empty, K, BLOCK, STAGES)),
        ], [1], [24],
    )
"""

ROUND_TRIP = """
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

@gluon.jit
def kernel(x_ptr, y_ptr, OFFSET, BLOCK: gl.constexpr):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, BLOCK], gl.bfloat16)
    rows = gl.arange(0, BLOCK, gl.SliceLayout(1, layout))
    cols = gl.arange(0, BLOCK, gl.SliceLayout(0, layout))
    at = OFFSET + rows[:, None] * BLOCK + cols[None, :]
    x = gl.load(x_ptr + at)
    tile = gl.allocate_shared_memory(gl.bfloat16, [BLOCK, BLOCK], shared)
    tile.store(x)
    fence_async_shared()
    y = warpgroup_mma(tile, tile, gl.zeros([BLOCK, BLOCK], gl.float32, layout))
    gl.store(y_ptr + at, y)
"""

_numbers = itertools.count()


def module_of(source: str, folder: Path) -> ModuleType:
    """A module of this source; Gluon reads the source of its functions from a file."""
    path = folder / f"kernel_{next(_numbers)}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mutant_of(source: str, old: str, new: str, folder: Path) -> ModuleType:
    """The source with one place changed."""
    assert source.count(old) == 1, f"{source.count(old)} places read {old!r}"
    return module_of(source.replace(old, new), folder)


def product(module: ModuleType, k: int = 96, stages: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(the kernel's product of random a [16, k] and b [k, 16], the right product)."""
    block = 16
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator).bfloat16() for shape in ((block, k), (k, block)))
    layout = gl.NVMMASharedLayout.get_default_for([block, block], gl.bfloat16)
    descriptors = [TensorDescriptor(x, list(x.shape), list(x.stride()), [block, block], layout) for x in (a, b)]
    c = torch.full((block, block), float("nan"))
    simulate(module.kernel, (1,), *descriptors, c, k, block, BLOCK=block, STAGES=stages, seed=seed)
    return c, a.float() @ b.float()


@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 4))
@settings(max_examples=40)
def test_pipelined_product_is_right_in_every_order(
    tmp_path_factory: pytest.TempPathFactory, seed: int, tiles: int, stages: int
) -> None:
    found, right = product(module_of(PRODUCT, tmp_path_factory.mktemp("product")), 16 * tiles, stages, seed)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


MUTANTS = {
    "no wait for the copies": ("        mbarrier.wait(full.index(stage), i // STAGES & 1)\n", "", "reads a_tiles"),
    "no wait for a free buffer": (
        "        mbarrier.wait(empty.index(stage), (i // STAGES & 1) ^ 1)\n", "", "overwrites a_tiles|more than its 1",
    ),
    "parity of the copies": ("full.index(stage), i // STAGES & 1", "full.index(stage), (i // STAGES & 1) ^ 1", "reads"),
    "parity of a free buffer": ("(i // STAGES & 1) ^ 1)", "i // STAGES & 1)", r"deadlock.*parity 0 of empty\[0\]"),
    "freed before the product is done": (
        "        acc = warpgroup_mma_wait(0, [product])\n        mbarrier.arrive(empty.index(stage), count=1)\n",
        "        mbarrier.arrive(empty.index(stage), count=1)\n        acc = warpgroup_mma_wait(0, [product])\n",
        "overwrites a_tiles.*while product of main",
    ),
    "never freed": ("        mbarrier.arrive(empty.index(stage), count=1)\n", "", r"deadlock.*empty\[0\]"),
    "freed twice": ("arrive(empty.index(stage), count=1)", "arrive(empty.index(stage), count=2)", "more than its 1"),
    "wrong buffer": ("b_tiles.index(stage), acc", "b_tiles.index(0), acc", "b_tiles"),
    "no such buffer": ("b_tiles.index(stage), acc", "b_tiles.index(stage + 1), acc", r"index 2|reads b_tiles\[1\]"),
    "fewer bytes expected": ("2 * BLOCK * BLOCK * 2", "BLOCK * BLOCK * 2", "deadlock|reads [ab]_tiles"),
    "more bytes expected": ("2 * BLOCK * BLOCK * 2", "4 * BLOCK * BLOCK * 2", r"deadlock.*full\[0\].*bytes due"),
    "barrier not initialised": ("        mbarrier.init(empty.index(i), count=1)\n", "", "not initialised"),
    "result used in flight": ("warpgroup_mma_wait(0, [product])", "warpgroup_mma_wait(1, [product])", "in flight"),
    "result out of bounds": ("gl.store(c_ptr + rows", "gl.store(c_ptr + 1 + rows", "store at element 256, outside"),
    "overflow": ("range(K // BLOCK):\n        stage = i % STAGES\n        mbarrier.wait(full",
                 "range(K * 100000000 // BLOCK):\n        stage = i % STAGES\n        mbarrier.wait(full", "32 bits"),
    "copies without a reader": (
        "    for i in range(K // BLOCK):\n        stage = i % STAGES\n        mbarrier.wait(full",
        "    for i in range(0):\n        stage = i % STAGES\n        mbarrier.wait(full", "deadlock",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), MUTANTS.values(), ids=MUTANTS.keys())
def test_every_way_to_break_the_product_is_found(old: str, new: str, message: str, tmp_path: Path) -> None:
    mutant = mutant_of(PRODUCT, old, new, tmp_path)
    for seed in range(3):
        with pytest.raises(SimulationError, match=message):
            product(mutant, seed=seed)


def test_wrong_coordinates_give_wrong_numbers(tmp_path: Path) -> None:
    found, right = product(mutant_of(PRODUCT, "[i * BLOCK, 0]", "[0, 0]", tmp_path))
    assert not torch.allclose(found, right, rtol=1e-2, atol=1e-2)


def round_trip(
    change: Callable[[str], str], folder: Path, offset: int = 0, dtype: torch.dtype = torch.bfloat16
) -> None:
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = torch.full((16, 16), float("nan"))
    simulate(module_of(change(ROUND_TRIP), folder).kernel, (1,), x, y, offset, BLOCK=16)
    torch.testing.assert_close(y, x.float() @ x.float(), rtol=1e-5, atol=1e-5)


def test_own_stores_to_shared_memory_need_a_fence(tmp_path: Path) -> None:
    round_trip(lambda source: source, tmp_path)
    with pytest.raises(SimulationError, match="async proxy without a fence"):
        round_trip(lambda source: source.replace("    fence_async_shared()\n", ""), tmp_path)
    with pytest.raises(SimulationError, match="reads tile, which nothing has written"):
        round_trip(lambda source: source.replace("    tile.store(x)\n", ""), tmp_path)
    with pytest.raises(SimulationError, match="stores fp16"):
        round_trip(lambda source: source, tmp_path, dtype=torch.float16)


@pytest.mark.parametrize("offset", [-1, 1, 255])
def test_loads_out_of_bounds_are_faults(offset: int, tmp_path: Path) -> None:
    with pytest.raises(SimulationError, match=r"load at element .* outside the tensor"):
        round_trip(lambda source: source, tmp_path, offset)


def test_faults_name_partition_and_line(tmp_path: Path) -> None:
    mutant = mutant_of(PRODUCT, "        mbarrier.wait(full.index(stage), i // STAGES & 1)\n", "", tmp_path)
    with pytest.raises(SimulationError, match=r"main: .*line \d+: product = warpgroup_mma\(a_tiles"):
        product(mutant)


def test_two_programs_must_not_store_one_element(tmp_path: Path) -> None:
    module = module_of(ROUND_TRIP, tmp_path)
    x, y = torch.ones(16, 16).bfloat16(), torch.zeros(16, 16)
    with pytest.raises(SimulationError, match="stores where another partition or program did"):
        simulate(module.kernel, (2,), x, y, 0, BLOCK=16)
