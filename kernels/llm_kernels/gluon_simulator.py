"""Runs a Gluon kernel for Hopper on CPU tensors: executes its Python source with a simulation of Gluon's functions.

``simulate(kernel, grid, *args, seed=0, **kwargs)`` takes the arguments of a launch: CPU tensors, host TensorDescriptors
and numbers. gluon_machine says which faults are found and what is not simulated.
"""

from __future__ import annotations

import builtins
import itertools
import re
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.runtime.jit import JITFunction

from llm_kernels import gluon_machine as machine
from llm_kernels.gluon_machine import (
    TORCH,
    Barrier,
    Barriers,
    Cell,
    Descriptor,
    Int,
    Memory,
    Partition,
    Pointer,
    Product,
    Program,
    Shared,
    SimulationError,
    Tile,
    binary,
    fault,
    join,
    me,
    require,
)

__all__ = ["SimulationError", "simulate"]
machine.INTERNAL.add(__file__)


def simulate(kernel: Any, grid: Sequence[int], *args: Any, seed: int = 0, **kwargs: Any) -> None:
    """Runs every program of ``grid``, each in its own order drawn from ``seed``. Raises SimulationError for a fault."""
    names = [parameter.name for parameter in kernel.params]
    given = dict(zip(names, args)) | {name: value for name, value in kwargs.items() if name in names}
    values = {p.name: given[p.name] if p.is_constexpr else _argument(given[p.name]) for p in kernel.params}
    full = (*grid, 1, 1)[:3]
    body = _bind(kernel, {})
    for index in itertools.product(*map(range, full)):
        Program(index, full, seed).run(lambda: body(**values))


def _argument(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Pointer(Memory(value), torch.tensor(value.storage_offset()))
    if hasattr(value, "block_shape"):
        return Descriptor(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return Int(value, 32 if -(2**31) <= value < 2**31 else 64)
    return value


def _bind(function: Any, known: dict[Any, Callable]) -> Callable:
    """The kernel's Python function with globals that hold the simulated functions instead of Gluon's."""
    if function in known:
        return known[function]
    raw = function.fn
    names = {"range": _range, "__builtins__": builtins}
    bound = FunctionType(raw.__code__, names, raw.__name__, raw.__defaults__)
    bound.__kwdefaults__ = raw.__kwdefaults__
    known[function] = bound
    for name in raw.__code__.co_names:
        if name in raw.__globals__:
            names[name] = _stand_in(raw.__globals__[name], known)
    return bound


def _stand_in(value: Any, known: dict[Any, Callable]) -> Any:
    for original, replacement in _REPLACED:
        if value is original:
            return replacement
    if isinstance(value, gl.constexpr):
        return value.value
    return _bind(value, known) if isinstance(value, JITFunction) else value


def _range(*limits: int) -> Any:
    return (Int(i) for i in builtins.range(*map(int, limits)))


def _pick(function: Callable, with_nan: Callable, scalar: Callable) -> Callable:
    """An elementwise function of two values, each a tile or a scalar."""

    def call(x: Any, y: Any, propagate_nan: Any = tl.PropagateNan.NONE) -> Any:
        if not isinstance(x, Tile) and not isinstance(y, Tile):
            return scalar(x, y)
        chosen = with_nan if propagate_nan == tl.PropagateNan.ALL else function
        dtype = next(v.data.dtype for v in (x, y) if isinstance(v, Tile))
        return binary(lambda a, b: chosen(torch.as_tensor(a, dtype=dtype), torch.as_tensor(b, dtype=dtype)), x, y)

    return call


def _where(condition: Any, x: Any, y: Any) -> Any:
    if not isinstance(condition, Tile):
        return x if condition else y
    tile = x if isinstance(x, Tile) else y
    require(not isinstance(x, Tile) or x.layout == condition.layout, "layouts of where differ")
    require(not isinstance(y, Tile) or y.layout == condition.layout, "layouts of where differ")
    dtype = tile.data.dtype if isinstance(tile, Tile) else torch.float32
    x, y = (v.data if isinstance(v, Tile) else torch.tensor(v, dtype=dtype) for v in (x, y))
    return Tile(torch.where(condition.data, x, y), condition.layout)


def _largest(x: torch.Tensor, axis: int) -> torch.Tensor:
    """The maximum, which ignores NaN as the GPU's instruction does."""
    return x.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).amax(axis)


def _reduction(function: Callable) -> Callable:
    def call(x: Tile, axis: int) -> Tile:
        return Tile(function(x.data, axis), gl.SliceLayout(axis, x.layout) if x.layout else None)

    return call


def _elementwise(function: Callable) -> Callable:
    return lambda x: Tile(function(x.data), x.layout) if isinstance(x, Tile) else float(function(torch.tensor(x)))


def _full(shape: Sequence[int], value: Any, dtype: Any, layout: Any = None) -> Tile:
    return Tile(torch.full([int(n) for n in shape], value, dtype=TORCH[dtype]), layout)


def _addresses(pointer: Pointer, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
    inside = torch.as_tensor(True) if mask is None else torch.as_tensor(getattr(mask, "data", mask))
    at, inside = torch.broadcast_tensors(pointer.offset, inside)
    return at, inside


def _load(pointer: Pointer, mask: Any = None, other: Any = None) -> Any:
    at, inside = _addresses(pointer, mask)
    pointer.memory.check(at[inside], "load")
    flat = pointer.memory.flat
    found = flat[at.clamp(0, len(flat) - 1)]
    if other is not None:
        found = torch.where(inside, found, torch.as_tensor(getattr(other, "data", other), dtype=flat.dtype))
    elif flat.is_floating_point():
        found = found.masked_fill(~inside, float("nan"))
    if found.ndim:
        return Tile(found, pointer.layout)
    return float(found) if flat.is_floating_point() else Int(int(found), flat.element_size() * 8)


def _store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    at, inside = _addresses(pointer, mask)
    memory, this = pointer.memory, me()
    require(getattr(value, "layout", pointer.layout) == pointer.layout, "layouts of address and value differ")
    memory.check(at[inside], "store")
    who = zlib.crc32(f"{this.program.index} {this.name}".encode())
    before = memory.writer[at[inside]]
    require(bool(((before == -1) | (before == who)).all()), "stores where another partition or program did")
    memory.writer[at[inside]] = who
    data = torch.as_tensor(getattr(value, "data", value)).to(memory.flat.dtype)
    memory.flat[at[inside]] = data.expand(at.shape)[inside]


def _convert_layout(x: Tile, layout: Any, assert_trivial: bool = False) -> Tile:
    del assert_trivial
    return Tile(x.data, layout)


def _allocate(dtype: Any, shape: Sequence[int], layout: Any, value: Tile | None = None) -> Shared | Barriers:
    path, line = machine.caller()
    found = re.match(r"\s*(\w+)\s*=", machine.linecache.getline(path, line))
    name = found.group(1) if found else f"line {line}"
    shape = [int(n) for n in shape]
    if isinstance(layout, hopper.mbarrier.MBarrierLayout):
        return Barriers([Barrier(f"{name}[{i}]") for i in builtins.range(shape[0])])
    data = torch.empty(shape, dtype=TORCH[dtype]).fill_(float("nan") if dtype.is_floating() else 0)
    several = len(shape) > (layout.rank if hasattr(layout, "rank") else len(layout.order))
    cells = [Cell(f"{name}[{i}]") for i in builtins.range(shape[0])] if several else [Cell(name)]
    shared = Shared(data, layout, cells, several)
    if value is not None:
        shared.store(value)
    return shared


def _warp_specialize(
    parts: Sequence[tuple], worker_num_warps: Sequence, worker_num_regs: Sequence | None = None
) -> Any:
    require(len(worker_num_warps) == len(parts) - 1, f"{len(parts)} partitions, {len(worker_num_warps)} warp counts")
    require(len(worker_num_regs or worker_num_warps) == len(parts) - 1, "partitions and register counts differ")
    this = me()
    workers = []
    for number, (function, args) in enumerate(parts[1:], 1):
        label = f"partition {number} ({function.__name__})"
        workers.append(Partition(this.program, label, partial(function, *args), this.clock))
    this.program.partitions += workers
    function, args = parts[0]
    result = function(*args)
    this.step(lambda: all(worker.done for worker in workers), lambda: "the other partitions")
    for worker in workers:
        join(this.clock, worker.clock)
    return result


def _init(barrier: Barriers, count: int) -> None:
    one = barrier.one
    require(one.count == 0, f"{one.name} is initialised twice")
    one.count = one.due = int(count)


def _wait(barrier: Barriers, phase: int, pred: bool = True, deps: Sequence = ()) -> None:
    del deps
    if not pred:
        return
    one, this = barrier.one, me()
    require(one.count > 0, f"{one.name} is not initialised")
    parity = int(phase)
    require(parity in (0, 1), f"waits for parity {parity} of {one.name}")
    this.step(lambda: one.phase & 1 != parity, lambda: f"parity {parity} of {one.describe()}")
    join(this.clock, one.released)


def _arrive(barrier: Barriers, *, count: int = 1, pred: bool = True) -> None:
    this = me()
    this.step()
    if pred:
        barrier.one.arrive(this.clock, int(count), 0)


def _expect(barrier: Barriers, num_bytes: int, pred: bool = True) -> None:
    this = me()
    this.step()
    if pred:
        barrier.one.arrive(this.clock, 1, int(num_bytes))


def _copy_to_shared(
    desc: Descriptor, coord: Sequence[int], barrier: Barriers, result: Shared, pred: bool = True
) -> None:
    this = me()
    this.step()
    if not pred:
        return
    program, one = this.program, barrier.one
    require(result.shape == desc.block_shape, f"box {desc.block_shape} into {result.shape}")
    require(result.dtype == desc.dtype and result.layout == desc.layout, "descriptor and buffer differ")
    at, inside = desc.box(coord)
    program.num_copies += 1
    actor = f"TMA copy {program.num_copies}"
    for cell in result.cells:
        cell.overwrite(actor, 1, this.clock, True)
    result.data.fill_(float("nan"))
    clock = {**this.clock, actor: 1}

    def land() -> None:
        result.data.copy_(torch.where(inside, desc.memory.flat[at], 0))
        join(one.gathered, clock)
        one.land(at.numel() * desc.memory.flat.element_size())

    program.copies.append(land)


def _operand(x: Tile | Shared, reader: str, tick: int) -> Callable[[], torch.Tensor]:
    if isinstance(x, Shared):
        for cell in x.cells:
            cell.read(reader, tick, me().clock, True)
    return lambda: x.data.float()


def _warpgroup_mma(a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False, **_: Any) -> Any:
    this = me()
    this.step()
    require(isinstance(b, Shared) and isinstance(a, (Tile, Shared)), "operands: tile or shared memory, shared memory")
    require(a.shape[1] == b.shape[0] and a.dtype == b.dtype, f"{a.dtype}{a.shape} times {b.dtype}{b.shape}")
    require(not isinstance(a, Tile) or isinstance(a.layout, gl.DotOperandLayout), "left operand is not in a dot layout")
    this.issued += 1
    reader = f"product of {this.name}"
    left, right = _operand(a, reader, this.issued), _operand(b, reader, this.issued)
    shape = [a.shape[0], b.shape[1]]

    def run() -> torch.Tensor:
        if use_acc:
            require(list(acc.data.shape) == shape, f"accumulator {list(acc.data.shape)} for {shape}")
            return acc.data + left() @ right()
        return left() @ right()

    product = Product(run, acc.layout, this.issued, a if isinstance(a, Tile) else None)
    this.products.append(product)
    return product if is_async else _warpgroup_mma_wait(0, [product, a])[0]


def _warpgroup_mma_wait(num_outstanding: int = 0, deps: Sequence | None = None) -> Any:
    this = me()
    ended = this.products[: max(len(this.products) - int(num_outstanding), 0)]
    this.step(lambda: all(x.data is not None for x in ended), lambda: "its products")
    this.products = this.products[len(ended) :]
    for registers in (x.registers for x in ended if x.registers is not None):
        kept = any(registers is dependency for dependency in deps or ())
        require(kept, "the left operand of a product is not among the deps of the wait for it")
    if ended:
        join(this.clock, {f"product of {this.name}": ended[-1].tick})
    results = []
    for x in deps or ():
        if isinstance(x, Product):
            require(x not in this.products, "uses a product that is still in flight")
            x = Tile(x.data, x.layout)
        results.append(x)
    return results[0] if len(results) == 1 else tuple(results)


def _fence() -> None:
    for cell in me().unfenced:
        cell.unfenced = False
    me().unfenced.clear()


class _Language:
    """Stands for ``gl``: simulated functions, and Gluon's own layouts, dtypes and constants."""

    arange = staticmethod(lambda a, b, layout=None: Tile(torch.arange(a, b, dtype=torch.int32), layout))
    full = staticmethod(_full)
    zeros = staticmethod(lambda shape, dtype, layout=None: _full(shape, 0, dtype, layout))
    load, store, where = staticmethod(_load), staticmethod(_store), staticmethod(_where)
    maximum = staticmethod(_pick(torch.fmax, torch.maximum, builtins.max))
    minimum = staticmethod(_pick(torch.fmin, torch.minimum, builtins.min))
    max, sum = staticmethod(_reduction(_largest)), staticmethod(_reduction(torch.sum))
    exp2, log2, exp, log = (staticmethod(_elementwise(f)) for f in (torch.exp2, torch.log2, torch.exp, torch.log))
    convert_layout = staticmethod(_convert_layout)
    allocate_shared_memory = staticmethod(_allocate)
    warp_specialize = staticmethod(_warp_specialize)
    static_range = staticmethod(_range)
    program_id = staticmethod(lambda axis: Int(me().program.index[axis]))
    num_programs = staticmethod(lambda axis: Int(me().program.grid[axis]))
    cdiv = staticmethod(lambda x, y: (x + y - 1) // y)

    def __getattr__(self, name: str) -> Any:
        value = getattr(gl, name)
        kept = isinstance(value, (gl.dtype, type)) or name == "NVMMASharedLayout"
        if not kept:
            raise fault(f"gl.{name} is not simulated")
        return value


_BARRIER = SimpleNamespace(
    MBarrierLayout=hopper.mbarrier.MBarrierLayout, init=_init, wait=_wait, arrive=_arrive, expect=_expect
)
_REPLACED = [
    (gl, _Language()),
    (hopper.mbarrier, _BARRIER),
    (hopper.tma, SimpleNamespace(async_copy_global_to_shared=_copy_to_shared)),
    (hopper.warpgroup_mma, _warpgroup_mma),
    (hopper.warpgroup_mma_wait, _warpgroup_mma_wait),
    (hopper.fence_async_shared, _fence),
]
