"""Checks every memory access of interpreted kernels: bounds, races between programs, and bytes moved.

A kernel may touch only the tensors that were passed to it (also inside tuples and descriptors). The programs of a grid
run one after another, in a shuffled order, so that results that depend on the order show. An element that one program
stores must not be loaded or stored by another program of the same launch, unless both use atomics. Races inside a
program and the order of memory operations are not checked.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_NOBODY, _SEVERAL = -1, -2


class MemoryFault(RuntimeError):
    """A program touched memory outside the kernel's tensors."""


class Race(RuntimeError):
    """Two programs touched one element, at least one of them storing, or one store wrote an element twice."""


@dataclass
class Traffic:
    """What checked kernels have moved. An element counts every time it is accessed, unless the mask leaves it out."""

    bytes_loaded: int = 0
    bytes_stored: int = 0
    atomics: int = 0
    launches: int = 0
    reachable: Callable[[], Iterable[Any]] = tuple
    """Called at every launch: the tensors that the kernel reaches by addresses in a table, not by arguments."""


# Storages from this size on come from testing.far_apart. A table of their elements would not fit in memory, and most
# of them are never touched, so only their bounds are checked.
_HUGE = 1 << 30


@dataclass
class _Allocation:
    """One storage: the number of the program that stored, loaded or atomically updated each 2-byte slot, or _NOBODY, or
    _SEVERAL."""

    start: int
    end: int
    stored: np.ndarray = field(init=False)
    loaded: np.ndarray = field(init=False)
    updated: np.ndarray = field(init=False)

    @property
    def huge(self) -> bool:
        """Whether it is too large for tables of its slots."""
        return self.end - self.start >= _HUGE

    def __post_init__(self) -> None:
        if self.huge:
            return
        # One slot for 2 bytes, the smallest element that our kernels move.
        slots = (self.end - self.start + 1) // 2
        self.stored = np.full(slots, _NOBODY, np.int32)
        self.loaded = np.full(slots, _NOBODY, np.int32)
        self.updated = np.full(slots, _NOBODY, np.int32)


class _Checker:
    def __init__(self, shuffle: bool, seed: int) -> None:
        self.shuffle, self.random = shuffle, random.Random(seed)
        self.traffic = Traffic()
        self.allocations: list[_Allocation] = []
        self.program, self.place = 0, (0, 0, 0)
        self.order: list[int] = []

    def begin(self, tensors: list[Any]) -> None:
        """Called before the first program of a launch, with the tensors that the launch may touch."""
        self.traffic.launches += 1
        self.order = []
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        self.allocations = [_Allocation(start, start + size) for start, size in storages.items() if size]

    def enter(self, x: int, y: int, z: int, grid: tuple[int, int, int]) -> tuple[int, int, int]:
        """Called before program (x, y, z); returns the program that runs instead of it, another one if shuffled."""
        number = (x * grid[1] + y) * grid[2] + z
        if self.shuffle:
            if not self.order:
                self.order = list(range(grid[0] * grid[1] * grid[2]))
                self.random.shuffle(self.order)
            number = self.order[number]
        self.program = number
        self.place = (number // (grid[1] * grid[2]), number // grid[2] % grid[1], number % grid[2])
        return self.place

    def touch(self, kind: str, pointers: Any, mask: Any) -> None:
        """Checks and counts one access."""
        addresses = np.asarray(pointers.data)
        if mask is not None:
            addresses = addresses[np.broadcast_to(np.asarray(mask.data, dtype=bool), addresses.shape)]
        addresses = addresses.astype(np.int64).reshape(-1)
        element = getattr(pointers.dtype.scalar, "element_ty", None) or pointers.get_element_ty()
        size = max(element.primitive_bitwidth, 8) // 8
        self._count(kind, addresses.size, size)
        if kind == "store" and np.unique(addresses).size != addresses.size:
            raise Race(f"one store writes an element twice in program {self.place}")
        left = addresses
        for allocation in self.allocations:
            inside = (left >= allocation.start) & (left + size <= allocation.end)
            if inside.any():
                if not allocation.huge:
                    self._race(kind, allocation, (left[inside] - allocation.start) // 2)
                left = left[~inside]
            if not left.size:
                return
        nearest = min((int(left[0]) - a.end for a in self.allocations), key=abs, default=0)
        raise MemoryFault(
            f"{kind} of {left.size} element(s) out of bounds in program {self.place}: the first is {nearest:+d} bytes "
            "from the end of the nearest tensor"
        )

    def _count(self, kind: str, elements: int, size: int) -> None:
        if kind == "load":
            self.traffic.bytes_loaded += elements * size
        elif kind == "store":
            self.traffic.bytes_stored += elements * size
        else:
            self.traffic.atomics += elements

    def _race(self, kind: str, of: _Allocation, slots: np.ndarray) -> None:
        against = {
            "load": [(of.stored, "stores")],
            "store": [(of.stored, "stores"), (of.loaded, "loads"), (of.updated, "updates atomically")],
            "atomic": [(of.stored, "stores")],
        }[kind]
        for table, verb in against:
            others = table[slots]
            bad = (others != _NOBODY) & (others != self.program)
            if bad.any():
                raise Race(
                    f"{kind} in program {self.place} of an element that program {int(others[bad][0])} of the same "
                    f"launch {verb}"
                )
        table = {"load": of.loaded, "store": of.stored, "atomic": of.updated}[kind]
        table[slots] = np.where((table[slots] == _NOBODY) | (table[slots] == self.program), self.program, _SEVERAL)


def _tensors(arguments: Any) -> Iterator[Any]:
    if isinstance(arguments, (tuple, list)):
        for item in arguments:
            yield from _tensors(item)
    elif hasattr(arguments, "block_shape") and hasattr(arguments, "base"):
        yield from _tensors(arguments.base)
    elif hasattr(arguments, "untyped_storage"):
        yield arguments


@contextmanager
def check_memory_accesses(shuffle: bool = True, seed: int = 0) -> Iterator[Traffic]:
    """Checks every interpreted kernel that is launched inside the ``with`` block; yields the counts of what they move.

    shuffle: run the programs of a launch in an order drawn from ``seed``. Raises MemoryFault or Race, wrapped in
    Triton's InterpreterError.
    """
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    state = _Checker(shuffle, seed)
    names = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas", "set_grid_idx")
    saved = {name: getattr(builder, name) for name in names}
    saved_init = executor._init_args_hst

    def load(self, pointers, mask, *rest):
        state.touch("load", pointers, mask)
        return saved["create_masked_load"](self, pointers, mask, *rest)

    def store(self, pointers, value, mask, *rest):
        state.touch("store", pointers, mask)
        return saved["create_masked_store"](self, pointers, value, mask, *rest)

    def update(self, operation, pointers, value, mask, *rest):
        state.touch("atomic", pointers, mask)
        return saved["create_atomic_rmw"](self, operation, pointers, value, mask, *rest)

    def compare_and_swap(self, pointers, *rest):
        state.touch("atomic", pointers, None)
        return saved["create_atomic_cas"](self, pointers, *rest)

    def set_grid_idx(self, x, y, z):
        return saved["set_grid_idx"](self, *state.enter(x, y, z, self.grid_dim))

    def init_arguments(self, arguments, keywords):
        on_host, keywords_on_host = saved_init(self, arguments, keywords)
        state.begin(list(_tensors([list(on_host), list(keywords_on_host.values()), list(state.traffic.reachable())])))
        return on_host, keywords_on_host

    replacements = (load, store, update, compare_and_swap, set_grid_idx)
    for name, replacement in zip(names, replacements):
        setattr(builder, name, replacement)
    executor._init_args_hst = init_arguments
    try:
        yield state.traffic
    finally:
        for name, original in saved.items():
            setattr(builder, name, original)
        executor._init_args_hst = saved_init
