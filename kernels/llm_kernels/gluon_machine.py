"""The machine on which gluon_simulator runs a kernel: values, memories, barriers, and the scheduler.

Partitions of ``warp_specialize``, TMA copies and asynchronous products run one at a time, in an order drawn from a
seed. A copy may land at any moment before its barrier completes; a product may read its operands at any moment before
the wait for it. Vector clocks (Flanagan & Freund 2009, doi 10.1145/1542476.1542490) also find accesses to shared memory
that happened in a harmless order in this run, but that no barrier, wait or fence orders.

These are faults: such races, shared memory that is read before it was written, a deadlock, more arrivals at a barrier
than it counts, an index or an address out of bounds, an address that two partitions or programs store to, 32-bit
overflow, layouts that do not match, and copies or products that are unfinished when a program ends. A partition is
simulated as one thread: races between its own warps, registers, bank conflicts and speed are not simulated.
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


# Files of the simulator, whose lines a fault must not name.
INTERNAL = {__file__}


class SimulationError(Exception):
    """A fault of the kernel; the message has the partition and the line of the kernel."""


class Stopped(BaseException):
    """Ends the thread of a partition after a fault in another one."""


def caller() -> tuple[str, int]:
    """File and line of the kernel's statement that is running."""
    frame: Any = sys._getframe(1)
    while frame.f_code.co_filename in INTERNAL:
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def fault(message: str) -> SimulationError:
    """The error with this message, the partition and the line."""
    path, line = caller()
    name = getattr(threading.current_thread(), "partition", None)
    source = linecache.getline(path, line).strip()
    return SimulationError(f"{name.name + ': ' if name else ''}{message} (line {line}: {source})")


def require(condition: bool, message: str) -> None:
    """Raises a fault with this message unless the condition holds."""
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
        """The number in another dtype; floating-point scalars are Python floats."""
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
        """The sizes of the dims."""
        return list(self.data.shape)

    @property
    def dtype(self) -> Any:
        """The language's dtype."""
        return GLUON[self.data.dtype]

    @property
    def type(self) -> Tile:
        """The tile itself, which has the attribute ``layout`` that a type has in Gluon."""
        return self

    def to(self, dtype: Any, bitcast: bool = False) -> Tile:
        """Rounded to nearest even, or the same bits as another dtype."""
        return Tile(self.data.view(TORCH[dtype]) if bitcast else self.data.to(TORCH[dtype]), self.layout)

    def __neg__(self) -> Tile:
        return Tile(-self.data, self.layout)

    def __invert__(self) -> Tile:
        return Tile(~self.data, self.layout)

    def __getitem__(self, key: tuple) -> Tile:
        """``x[:, None]`` or ``x[None, :]``, in the parent of the slice's layout."""
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
    """A global tensor: its storage, which elements of the storage belong to the tensor, and who stored each of them."""

    def __init__(self, tensor: torch.Tensor) -> None:
        length = tensor.untyped_storage().nbytes() // tensor.element_size()
        self.flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage(), 0, (length,), (1,))
        self.owned = torch.zeros(length, dtype=torch.bool)
        self.owned.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
        self.writer = torch.full((length,), -1, dtype=torch.int64)
        self.start = tensor.storage_offset()

    def check(self, at: torch.Tensor, what: str) -> None:
        """Raises a fault unless all these elements belong to the tensor."""
        inside = (at >= 0) & (at < len(self.flat))
        wrong = at[~inside | ~self.owned[at.clamp(0, len(self.flat) - 1)]]
        if len(wrong):
            raise fault(f"{what} at element {int(wrong[0]) - self.start}, outside the tensor")


class Pointer:
    """An address in a global tensor, or a tile of addresses."""

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
        """The addresses of the block at ``coord``, and which of them lie inside the descriptor's shape."""
        at, inside = torch.tensor(self.memory.start), torch.tensor(True)
        for start, length, size, stride in zip(coord, self.block_shape, self.sizes, self.strides, strict=True):
            places = torch.arange(length) + int(start)
            at = at.unsqueeze(-1) + places * stride
            inside = inside.unsqueeze(-1) & (places >= 0) & (places < size)
        self.memory.check(at[inside], "TMA")
        return at.clamp(0, len(self.memory.flat) - 1), inside


class Cell:
    """One buffer in shared memory: its last writer and the readers since then, each with its tick, and whether the last
    write still needs a fence before the async proxy may read it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.write: tuple[Any, int] | None = None
        self.reads: dict[Any, int] = {}
        self.unfenced = False

    def read(self, reader: Any, tick: int, clock: dict, asynchronous: bool) -> None:
        """Records a read. Raises a fault unless the reader's ``clock`` knows of the last write."""
        require(self.write is not None, f"reads {self.name}, which nothing has written")
        actor, at = self.write or (None, 0)
        require(clock.get(actor, 0) >= at, f"reads {self.name} without having waited for its write by {actor}")
        require(not (asynchronous and self.unfenced), f"reads {self.name} by the async proxy without a fence")
        self.reads[reader] = tick

    def overwrite(self, writer: Any, tick: int, clock: dict, asynchronous: bool) -> None:
        """Records a write. Raises a fault unless the writer's ``clock`` knows of the last write and all reads since."""
        for actor, at in [*self.reads.items(), *([self.write] if self.write else [])]:
            if clock.get(actor, 0) < at:
                raise fault(f"overwrites {self.name} while {actor} may still use it")
        self.write, self.reads, self.unfenced = (writer, tick), {}, not asynchronous


class Shared:
    """A view of shared memory; ``cells`` are the buffers that it covers."""

    def __init__(self, data: torch.Tensor, layout: Any, cells: list[Cell], whole: bool = False) -> None:
        self.data, self.layout, self.cells, self.whole = data, layout, cells, whole
        self.shape, self.dtype = list(data.shape), GLUON[data.dtype]

    @property
    def type(self) -> Shared:
        """The view itself, which has the attribute ``layout`` that a type has in Gluon."""
        return self

    def index(self, i: int) -> Shared:
        """The view of buffer ``i``."""
        require(0 <= i < len(self.data), f"index {int(i)} of {self.cells[0].name} of {len(self.data)}")
        return Shared(self.data[int(i)], self.layout, self.cells[i : i + 1] if self.whole else self.cells)

    def permute(self, order: Sequence[int]) -> Shared:
        """The same memory with its dimensions in another order."""
        return Shared(self.data.permute(*order), self.layout, self.cells)

    def load(self, layout: Any) -> Tile:
        """Loads into registers."""
        this = me()
        this.step()
        for cell in self.cells:
            cell.read(this.name, this.clock[this.name], this.clock, False)
        return Tile(self.data.clone(), layout)

    def store(self, value: Tile) -> None:
        """Stores from registers. Products and TMA copies may use the memory only after a fence."""
        this = me()
        this.step()
        same = self.shape == value.shape and self.dtype == value.dtype
        require(same, f"stores {value.dtype}{value.shape} in {self.dtype}{self.shape}")
        for cell in self.cells:
            cell.overwrite(this.name, this.clock[this.name], this.clock, False)
            this.unfenced.append(cell)
        self.data.copy_(value.data)


class Barrier:
    """An mbarrier: the arrivals and bytes still due in this phase; the clocks that its arrivals have brought
    (``gathered``), and those of the last completed phase (``released``), which a wait passes on."""

    def __init__(self, name: str) -> None:
        self.name, self.count, self.due, self.bytes, self.phase = name, 0, 0, 0, 0
        self.gathered: dict[Any, int] = {}
        self.released: dict[Any, int] = {}

    def arrive(self, clock: dict, count: int, num_bytes: int) -> None:
        """``count`` arrivals by a partition with this clock, which also announce ``num_bytes`` more bytes."""
        require(self.count > 0, f"{self.name} is not initialised")
        require(self.due >= count, f"{self.name} gets more than its {self.count} arrivals in a phase")
        self.due -= count
        join(self.gathered, clock)
        self.land(-num_bytes)

    def describe(self) -> str:
        """Name and state, for error messages."""
        return f"{self.name} (phase {self.phase}, {self.due} of {self.count} arrivals and {self.bytes} bytes due)"

    def land(self, num_bytes: int) -> None:
        """``num_bytes`` bytes have landed. The phase completes when no bytes and no arrivals are due."""
        self.bytes -= num_bytes
        if self.due == 0 and self.bytes == 0:
            join(self.released, self.gathered)
            self.due, self.phase, self.gathered = self.count, self.phase + 1, {}


class Barriers:
    """A view of an array of mbarriers."""

    def __init__(self, items: list[Barrier]) -> None:
        self.items = items

    def index(self, i: int) -> Barriers:
        """The view of barrier ``i``."""
        require(0 <= i < len(self.items), f"index {int(i)} of {self.items[0].name} of {len(self.items)}")
        return Barriers([self.items[i]])

    @property
    def one(self) -> Barrier:
        """The only barrier of this view."""
        require(len(self.items) == 1, f"{len(self.items)} barriers where one is wanted")
        return self.items[0]


def join(into: dict, other: dict) -> None:
    """Adds what the clock ``other`` knows to the clock ``into``."""
    for actor, tick in other.items():
        into[actor] = max(into.get(actor, 0), tick)


class Product:
    """An asynchronous product. ``data``: the result, once it has run; ``registers``: its left operand, if that is in
    registers, which must be kept until the wait for it."""

    def __init__(self, run: Callable[[], torch.Tensor], layout: Any, tick: int, registers: Tile | None) -> None:
        self.run, self.layout, self.tick, self.registers = run, layout, tick, registers
        self.data: torch.Tensor | None = None


class Partition:
    """The warps of one partition: a thread that runs only when the scheduler tells it to."""

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
        """Lets others run until ``ready`` and the scheduler chooses this partition; then advances its clock."""
        self.ready, self.blocked_on = ready or (lambda: True), blocked_on
        self.program.back.release()
        self.go.acquire()
        if self.program.stopping:
            raise Stopped
        self.ready, self.blocked_on = (lambda: True), str
        self.clock[self.name] += 1


def me() -> Partition:
    """The partition that is running."""
    return threading.current_thread().partition  # type: ignore[attr-defined]


class Program:
    """One program of the grid: its partitions, and the copies and products in flight."""

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
        """Runs all partitions, copies and products to their end. Raises SimulationError for a fault."""
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
