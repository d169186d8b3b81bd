"""The machine under gluon_simulator: values, memories, barriers, and partitions in an order drawn from a seed.

Partitions of ``warp_specialize``, TMA copies and asynchronous products run one at a time in an order drawn from a seed.
A copy lands at any moment before its barrier completes, a product reads its operands at any moment before its wait.
Vector clocks (Flanagan & Freund 2009, doi 10.1145/1542476.1542490) find what no order of the run happened to show:
accesses to shared memory that no barrier, wait or fence puts in order. Faults: such races, shared memory read before
it was written, deadlock, a barrier that gets more than it counts, an index or an address out of bounds, an address
stored by two partitions or programs, 32-bit overflow, layouts that do not match, work in flight when a program ends.
A partition is one thread of control: races among its own warps, registers, bank conflicts and speed are not seen.
"""

from __future__ import annotations

import linecache
import operator
import random
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from triton.experimental.gluon import language as gl

TORCH = {
    gl.int1: torch.bool, gl.int32: torch.int32, gl.int64: torch.int64, gl.float32: torch.float32,
    gl.bfloat16: torch.bfloat16, gl.float16: torch.float16,
}  # fmt: skip
GLUON = {value: key for key, value in TORCH.items()}


# Files whose lines are not the kernel's.
INTERNAL = {__file__}


class SimulationError(Exception):
    """What the kernel did wrong, with the line of the kernel."""


class Stopped(BaseException):
    """Ends a partition's thread after a fault elsewhere."""


def caller() -> tuple[str, int]:
    """File and line of the kernel that runs now."""
    frame: Any = sys._getframe(1)
    while frame.f_code.co_filename in INTERNAL:
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def fault(message: str) -> SimulationError:
    """The error, with partition and line."""
    path, line = caller()
    name = getattr(threading.current_thread(), "partition", None)
    source = linecache.getline(path, line).strip()
    return SimulationError(f"{name.name + ': ' if name else ''}{message} (line {line}: {source})")


def require(condition: bool, message: str) -> None:
    """Raises the fault unless the condition holds."""
    if not condition:
        raise fault(message)


class Int(int):
    """A scalar of 32 bits, or of 64 after ``to(gl.int64)``. Division goes towards zero, overflow is a fault."""

    bits: int

    def __new__(cls, value: int, bits: int = 32) -> Int:
        self = super().__new__(cls, value)
        self.bits = bits
        require(-(1 << bits - 1) <= self < 1 << bits - 1, f"{int(value)} does not fit in {bits} bits")
        return self

    def to(self, dtype: Any) -> Any:
        """As in the language; floats are Python's."""
        return Int(self, dtype.primitive_bitwidth) if dtype.is_int() else float(self)


def _truncated(x: int, y: int) -> int:
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


def _int_operator(function: Callable, swap: bool) -> Callable:
    def method(self: Int, other: Any) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        x, y = (int(other), int(self)) if swap else (int(self), int(other))
        return Int(function(x, y), max(self.bits, getattr(other, "bits", 32)))

    return method


for _name, _function in {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "floordiv": _truncated,
    "mod": lambda x, y: x - y * _truncated(x, y),
}.items():  # fmt: skip
    setattr(Int, f"__{_name}__", _int_operator(_function, False))
    setattr(Int, f"__r{_name}__", _int_operator(_function, True))


class Tile:
    """A tensor in registers."""

    def __init__(self, data: torch.Tensor, layout: Any) -> None:
        self.data, self.layout = data, layout

    @property
    def shape(self) -> list[int]:
        """Sizes."""
        return list(self.data.shape)

    @property
    def dtype(self) -> Any:
        """The language's dtype."""
        return GLUON[self.data.dtype]

    @property
    def type(self) -> Tile:
        """What has ``layout``: the tile itself."""
        return self

    def to(self, dtype: Any, bitcast: bool = False) -> Tile:
        """Rounded to nearest even, or the same bits as another dtype."""
        return Tile(self.data.view(TORCH[dtype]) if bitcast else self.data.to(TORCH[dtype]), self.layout)

    def __neg__(self) -> Tile:
        return Tile(-self.data, self.layout)

    def __invert__(self) -> Tile:
        return Tile(~self.data, self.layout)

    def __getitem__(self, key: tuple) -> Tile:
        """``x[:, None]`` and ``x[None, :]``: a slice back in its parent's layout."""
        dim = key.index(None)
        require(self.layout is None or self.layout.dim == dim, f"{self.layout} is expanded along dimension {dim}")
        return Tile(self.data[key], self.layout and self.layout.parent)


def binary(function: Callable, x: Any, y: Any) -> Any:
    """An elementwise operation of tiles of one layout, or of a tile and a scalar."""
    if isinstance(x, Pointer) or isinstance(y, Pointer):
        return NotImplemented
    tiles = [t for t in (x, y) if isinstance(t, Tile)]
    same = len(tiles) < 2 or tiles[0].layout == tiles[1].layout
    require(same, f"layouts differ: {', '.join(str(t.layout) for t in tiles)}")
    x, y = (t.data if isinstance(t, Tile) else int(t) if isinstance(t, Int) else t for t in (x, y))
    return Tile(function(x, y), tiles[0].layout)


for _name in ("add", "sub", "mul", "truediv", "lt", "le", "gt", "ge", "eq", "ne", "and_", "or_", "xor"):
    _function = getattr(operator, _name)
    setattr(Tile, f"__{_name.strip('_')}__", lambda x, y, f=_function: binary(f, x, y))
    setattr(Tile, f"__r{_name.strip('_')}__", lambda x, y, f=_function: binary(lambda a, b: f(b, a), x, y))


class Memory:
    """A global tensor: its storage, which elements of that are the tensor's, and who stored them."""

    def __init__(self, tensor: torch.Tensor) -> None:
        length = tensor.untyped_storage().nbytes() // tensor.element_size()
        self.flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage(), 0, (length,), (1,))
        self.owned = torch.zeros(length, dtype=torch.bool)
        self.owned.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
        self.writer = torch.full((length,), -1, dtype=torch.int64)
        self.start = tensor.storage_offset()

    def check(self, at: torch.Tensor, what: str) -> None:
        """Faults unless all these elements are the tensor's."""
        inside = (at >= 0) & (at < len(self.flat))
        wrong = at[~inside | ~self.owned[at.clamp(0, len(self.flat) - 1)]]
        if len(wrong):
            raise fault(f"{what} at element {int(wrong[0]) - self.start}, outside the tensor")


class Pointer:
    """Addresses in a global tensor, one or a tile of them."""

    def __init__(self, memory: Memory, offset: torch.Tensor, layout: Any = None) -> None:
        self.memory, self.offset, self.layout = memory, offset, layout

    @property
    def dtype(self) -> Any:
        """The language's pointer type."""
        return gl.pointer_type(GLUON[self.memory.flat.dtype])

    def __add__(self, other: Any) -> Pointer:
        if isinstance(other, Tile):
            return Pointer(self.memory, self.offset + other.data.to(torch.int64), other.layout)
        return Pointer(self.memory, self.offset + int(other), self.layout)

    __radd__ = __add__


class Descriptor:
    """A host TensorDescriptor as the kernel sees it."""

    def __init__(self, host: Any) -> None:
        self.memory, self.sizes, self.strides = Memory(host.base), list(host.shape), list(host.strides)
        self.block_shape, self.layout = list(host.block_shape), host.layout
        self.dtype = GLUON[host.base.dtype]

    def box(self, coord: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Addresses of a box and which of them are inside the described shape."""
        at, inside = torch.tensor(self.memory.start), torch.tensor(True)
        for start, length, size, stride in zip(coord, self.block_shape, self.sizes, self.strides, strict=True):
            places = torch.arange(length) + int(start)
            at = at.unsqueeze(-1) + places * stride
            inside = inside.unsqueeze(-1) & (places >= 0) & (places < size)
        self.memory.check(at[inside], "TMA")
        return at.clamp(0, len(self.memory.flat) - 1), inside


class Cell:
    """One buffer: who wrote it last and who read it since, by clock, and whether a write awaits a proxy fence."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.write: tuple[Any, int] | None = None
        self.reads: dict[Any, int] = {}
        self.unfenced = False

    def read(self, reader: Any, tick: int, clock: dict, asynchronous: bool) -> None:
        """Faults unless the last write is known to ``clock``; notes the read."""
        require(self.write is not None, f"reads {self.name}, which nothing has written")
        actor, at = self.write or (None, 0)
        require(clock.get(actor, 0) >= at, f"reads {self.name} without having waited for its write by {actor}")
        require(not (asynchronous and self.unfenced), f"reads {self.name} by the async proxy without a fence")
        self.reads[reader] = tick

    def overwrite(self, writer: Any, tick: int, clock: dict, asynchronous: bool) -> None:
        """Faults unless every use since the last write is known to ``clock``; notes the write."""
        for actor, at in [*self.reads.items(), *([self.write] if self.write else [])]:
            if clock.get(actor, 0) < at:
                raise fault(f"overwrites {self.name} while {actor} may still use it")
        self.write, self.reads, self.unfenced = (writer, tick), {}, not asynchronous


class Shared:
    """A view of shared memory; ``cells`` are the buffers it touches."""

    def __init__(self, data: torch.Tensor, layout: Any, cells: list[Cell], whole: bool = False) -> None:
        self.data, self.layout, self.cells, self.whole = data, layout, cells, whole
        self.shape, self.dtype = list(data.shape), GLUON[data.dtype]

    @property
    def type(self) -> Shared:
        """What has ``layout``: the view itself."""
        return self

    def index(self, i: int) -> Shared:
        """One buffer of several."""
        require(0 <= i < len(self.data), f"index {int(i)} of {self.cells[0].name} of {len(self.data)}")
        return Shared(self.data[int(i)], self.layout, self.cells[i : i + 1] if self.whole else self.cells)

    def permute(self, order: Sequence[int]) -> Shared:
        """The same memory with its dimensions in another order."""
        return Shared(self.data.permute(*order), self.layout, self.cells)

    def load(self, layout: Any) -> Tile:
        """To registers."""
        this = me()
        this.step()
        for cell in self.cells:
            cell.read(this.name, this.clock[this.name], this.clock, False)
        return Tile(self.data.clone(), layout)

    def store(self, value: Tile) -> None:
        """From registers; products and copies need a fence after it."""
        this = me()
        this.step()
        same = self.shape == value.shape and self.dtype == value.dtype
        require(same, f"stores {value.dtype}{value.shape} in {self.dtype}{self.shape}")
        for cell in self.cells:
            cell.overwrite(this.name, this.clock[this.name], this.clock, False)
            this.unfenced.append(cell)
        self.data.copy_(value.data)


class Barrier:
    """An mbarrier: arrivals and bytes still due in this phase, and what is known to whom waits for the last one."""

    def __init__(self, name: str) -> None:
        self.name, self.count, self.due, self.bytes, self.phase = name, 0, 0, 0, 0
        self.gathered: dict[Any, int] = {}
        self.released: dict[Any, int] = {}

    def arrive(self, clock: dict, count: int, num_bytes: int) -> None:
        """So many arrivals fewer are due, and so many bytes more."""
        require(self.count > 0, f"{self.name} is not initialised")
        require(self.due >= count, f"{self.name} gets more than its {self.count} arrivals in a phase")
        self.due -= count
        join(self.gathered, clock)
        self.land(-num_bytes)

    def describe(self) -> str:
        """Name and state, for messages."""
        return f"{self.name} (phase {self.phase}, {self.due} of {self.count} arrivals and {self.bytes} bytes due)"

    def land(self, num_bytes: int) -> None:
        """So many bytes fewer are due; the phase ends when none are, nor arrivals."""
        self.bytes -= num_bytes
        if self.due == 0 and self.bytes == 0:
            join(self.released, self.gathered)
            self.due, self.phase, self.gathered = self.count, self.phase + 1, {}


class Barriers:
    """A view of an array of mbarriers."""

    def __init__(self, items: list[Barrier]) -> None:
        self.items = items

    def index(self, i: int) -> Barriers:
        """One of them."""
        require(0 <= i < len(self.items), f"index {int(i)} of {self.items[0].name} of {len(self.items)}")
        return Barriers([self.items[i]])

    @property
    def one(self) -> Barrier:
        """The only one."""
        require(len(self.items) == 1, f"{len(self.items)} barriers where one is wanted")
        return self.items[0]


def join(into: dict, other: dict) -> None:
    """Makes what one clock knows known to another."""
    for actor, tick in other.items():
        into[actor] = max(into.get(actor, 0), tick)


class Product:
    """An asynchronous product; ``data`` once it has run, ``registers`` the operand that must live until then."""

    def __init__(self, run: Callable[[], torch.Tensor], layout: Any, tick: int, registers: Tile | None) -> None:
        self.run, self.layout, self.tick, self.registers = run, layout, tick, registers
        self.data: torch.Tensor | None = None


class Partition:
    """Warps of one role: a thread that runs only when it is told to."""

    def __init__(self, program: Program, name: str, body: Callable[[], Any], clock: dict) -> None:
        self.program, self.name, self.clock = program, name, {**clock, name: 1}
        self.go = threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.blocked_on: Callable[[], str] = str
        self.done = False
        self.issued = 0
        self.products: list[Product] = []
        self.unfenced: list[Cell] = []
        self.weight = program.order.random() ** 2 + 0.02
        self.thread = threading.Thread(target=self._main, args=(body,), daemon=True)
        self.thread.partition = self  # type: ignore[attr-defined]
        self.thread.start()

    def _main(self, body: Callable[[], Any]) -> None:
        self.go.acquire()
        try:
            if not self.program.stopping:
                body()
                require(not self.products, "ends with products in flight")
        except Stopped:
            pass
        except BaseException as error:
            self.program.error = self.program.error or error
        self.done = True
        self.program.back.release()

    def step(self, ready: Callable[[], bool] | None = None, blocked_on: Callable[[], str] = str) -> None:
        """Lets others run, at least until ``ready``; then the next tick of this partition's clock."""
        self.ready, self.blocked_on = ready or (lambda: True), blocked_on
        self.program.back.release()
        self.go.acquire()
        if self.program.stopping:
            raise Stopped
        self.ready, self.blocked_on = (lambda: True), str
        self.clock[self.name] += 1


def me() -> Partition:
    """The partition that runs now."""
    return threading.current_thread().partition  # type: ignore[attr-defined]


class Program:
    """One program of the grid: its partitions and all that is in flight."""

    def __init__(self, index: tuple[int, ...], grid: tuple[int, ...], seed: int) -> None:
        self.index, self.grid = index, grid
        self.order = random.Random(f"{seed} {index}")
        self.back = threading.Semaphore(0)
        self.stopping = False
        self.error: BaseException | None = None
        self.partitions: list[Partition] = []
        self.barriers: list[Barrier] = []
        self.copies: list[Callable[[], None]] = []
        self.num_copies = 0
        self.agent_weight = self.order.random() ** 2 + 0.02

    def run(self, body: Callable[[], Any]) -> None:
        """Runs everything to its end. Raises SimulationError."""
        self.partitions.append(Partition(self, "main", body, {}))
        while self.error is None and not all(p.done for p in self.partitions):
            choices: list[tuple[float, Any]] = [(p.weight, p) for p in self.partitions if not p.done and p.ready()]
            choices += [(self.agent_weight, copy) for copy in self.copies]
            waiting = (next((x for x in p.products if x.data is None), None) for p in self.partitions)
            choices += [(self.agent_weight, product) for product in waiting if product]
            if not choices:
                blocked = "; ".join(f"{p.name} waits for {p.blocked_on()}" for p in self.partitions if not p.done)
                self.error = SimulationError(f"deadlock in program {self.index}: {blocked}")
                break
            chosen = self.order.choices([x for _, x in choices], [w for w, _ in choices])[0]
            if isinstance(chosen, Partition):
                chosen.go.release()
                self.back.acquire()
            elif isinstance(chosen, Product):
                chosen.data = chosen.run()
            else:
                self.copies.remove(chosen)
                chosen()
        if self.error is None and self.copies:
            self.error = SimulationError(f"program {self.index} ends with {len(self.copies)} TMA copies in flight")
        self.stopping = True
        for partition in self.partitions:
            if not partition.done:
                partition.go.release()
                partition.thread.join()
        if self.error is not None:
            raise self.error
