"""Checkpoints in memory: after a step each process copies its share of the optimizer state into its node's memory and
to a partner node, while the next step computes; after a fault any layout restores the state from the copies that are
left.

The method is Gemini's (Wang et al. 2023, SOSP), with two slots for each process: a process enters the reduction of step
s + 1 only when its copy of step s is complete on both nodes. So when any process has finished step s + 1, the copies of
step s are complete everywhere, and the slot of step s - 1 may be overwritten.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from llm_launch.copy_files import PLANES, CopyFile, copy_name, parse_copy_name
from llm_launch.copy_transfer import CopySender, RemoteCopy
from llm_parallel.checkpoint.optimizer import (
    allocate_moments,
    apply_configured_settings,
    engines_of,
    moments_in_fp32,
    optimizer_steps,
    set_optimizer_steps,
    settings_changed,
    settings_in_use,
)
from llm_parallel.checkpoint.pieces import Piece, held_pieces, weights_follow
from llm_parallel.checkpoint.state import TrainState
from llm_parallel.errors import UserError
from llm_parallel.model.tensors import Role, kind_of
from llm_parallel.parallel.engine import POLICY, Models, Network, network_of

PARTNER_TIMEOUT_S = 60.0
SOON_S = 0.1


class CopyLost(RuntimeError):
    """Copies that should hold the state are missing, damaged or cannot be read. copy: kind ("own" or "kept") and rank
    of the one that is to blame, if it is one."""

    def __init__(self, message: str, copy: tuple[str, int] | None = None) -> None:
        super().__init__(message)
        self.copy = copy


def checksum(numbers: np.ndarray) -> int:
    """Sum of the bits of fp32 numbers, as whole numbers of 64 bits: as fast as memory is read, and another one when a
    bit of the copy has changed."""
    pairs = numbers.size // 2
    whole = int(np.frombuffer(numbers, dtype=np.uint64, count=pairs).sum(dtype=np.uint64)) if pairs else 0
    rest = int(np.frombuffer(numbers[2 * pairs :], dtype=np.uint32)[0]) if numbers.size % 2 else 0
    return (whole + rest) % 2**64


class MemoryCopies:
    """One process's copies of all models that it trains, in one generation of a run.

    ``partner``: address of the node that keeps the second copy, or None; ``origin``: what the launcher's next start
    must know of this generation."""

    def __init__(
        self,
        models: Models,
        folder: Path,
        generation: int,
        partner: tuple[str, int] | None,
        secret: str,
        origin: dict[str, Any] | None = None,
    ) -> None:
        self._engines = engines_of(models)
        for engine in self._engines.values():
            allocate_moments(engine)
        self._held = held_pieces(models, divided=True)
        numbers = sum(held.piece.stop - held.piece.start for held in self._held)
        groups = network_of(models[POLICY]).groups
        rank, self._on_gpu = groups.rank, groups.platform.is_cuda
        header = {
            "generation": generation,
            "rank": rank,
            "numbers": numbers,
            "index": [held.piece for held in self._held],
            "origin": origin,
        }
        self._file = CopyFile.create(folder / "own" / copy_name(generation, rank), header)
        self._slots = [_planes(self._file, slot) for slot in range(2)]
        self._secret = secret
        self._sender = CopySender(partner, secret, self._file) if partner else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="copy")
        self._running: Future[None] | None = None
        self._step = -1
        self.bytes_per_copy = PLANES * 4 * numbers

    def start(self, state: TrainState) -> None:
        """Begins the copy of the state after ``state.step``, which must not change before ``finish``."""
        self.finish()
        record = {
            "train": state.record(),
            "optimizer_steps": {name: optimizer_steps(engine) for name, engine in self._engines.items()},
            "settings": settings_in_use(self._engines[POLICY]),
            "base": _fingerprint(self._engines[POLICY].network),
        }
        self._step = state.step
        device_done = None
        if self._on_gpu:
            device_done = torch.cuda.Event()
            device_done.record()
        self._running = self._thread.submit(self._copy, state.step, record, device_done)

    def finish(self, waiting: Callable[[bool], None] = lambda _: None) -> None:
        """Waits until the last copy is complete on this node and, as long as the partner node takes it, on that one.
        ``waiting`` is told when that takes long, and when it is over."""
        if self._running is None:
            return
        running, self._running = self._running, None
        running.result()
        sender = self._sender
        if sender is None or sender.failure is not None or sender.wait(self._step, SOON_S):
            return
        waiting(True)
        try:
            sender.wait(self._step, PARTNER_TIMEOUT_S)
        finally:
            waiting(False)

    @property
    def partner_failure(self) -> str | None:
        """Why the partner node gets no more copies; None as long as it does."""
        return self._sender.failure if self._sender is not None else None

    def send_to(self, partner: tuple[str, int]) -> None:
        """Sends copies to another node from now on; called when no copy is being made."""
        if self._sender is not None:
            self._sender.close()
        self._sender = CopySender(partner, self._secret, self._file)

    def close(self) -> None:
        """Ends the threads; the files stay."""
        self._thread.shutdown(wait=True)
        if self._sender is not None:
            self._sender.close()

    @torch.no_grad()
    def _copy(self, step: int, record: dict[str, Any], device_done: Any) -> None:
        complete = self._file.steps()
        slot = next(slot for slot in range(2) if complete.get(max(complete, default=-1)) != slot)
        self._file.begin(slot)
        if device_done is not None:
            with torch.cuda.stream(torch.cuda.Stream()):
                device_done.wait()
                self._copy_planes(slot)
                torch.cuda.current_stream().synchronize()
        else:
            self._copy_planes(slot)
        planes = [plane.numpy() for plane in self._slots[slot]]
        ranges = [slice(held.piece.at, held.piece.at + held.piece.stop - held.piece.start) for held in self._held]
        record["checksums"] = [[checksum(plane[where]) for plane in planes] for where in ranges]
        self._file.commit(slot, step, record)
        if self._sender is not None and self._sender.failure is None:
            self._sender.send(step, slot)

    def _copy_planes(self, slot: int) -> None:
        targets = self._slots[slot]
        for held in self._held:
            where = slice(held.piece.at, held.piece.at + held.high - held.low)
            for target, plane in zip(targets, held.planes):
                target[where].copy_(plane)


def _fingerprint(network: Network) -> str | None:
    """Of the weights under adapters, if there are any; the copies hold adapters alone."""
    return network.base.fingerprint if network.base is not None else None


def _planes(file: CopyFile, slot: int) -> torch.Tensor:
    """The memory of ``slot`` as fp32 [3, numbers]: weights and both moments."""
    return torch.frombuffer(
        file.map, dtype=torch.float32, count=PLANES * file.numbers, offset=file.data_offset(slot)
    ).view(PLANES, file.numbers)


class Source(Protocol):
    """One process's share of the state in the memory of a node."""

    index: list[Piece]
    state: dict[str, Any]

    def read(self, number: int) -> np.ndarray:
        """fp32 [3, stop - start]: the numbers of the piece ``index[number]``, whose checksums are right. Raises
        CopyLost."""

    def close(self) -> None:
        """Ends the connection, if there is one."""


Part = tuple[Source, int, Piece]
"""A source, and one of its pieces with its number there."""


class LocalSource:
    """A share in this node's memory."""

    def __init__(self, path: Path, step: int) -> None:
        self._path, parsed = path, parse_copy_name(path.name)
        self._which = (path.parent.name, parsed[1]) if parsed else None
        try:
            self._file = CopyFile.open(path)
            slot = self._file.steps()[step]
        except (OSError, ValueError, KeyError) as error:
            raise CopyLost(f"{path} has no copy of step {step}", self._which) from error
        self.index = [Piece.read(values) for values in self._file.header["index"]]
        self.state = self._file.state(slot)
        numbers = np.frombuffer(self._file.data(slot), dtype=np.float32)
        self._planes = numbers.reshape(PLANES, self._file.numbers)

    def read(self, number: int) -> np.ndarray:
        """fp32 [3, stop - start]."""
        piece = self.index[number]
        numbers = self._planes[:, piece.at : piece.at + piece.stop - piece.start]
        _verify(self, number, numbers, str(self._path), self._which)
        return numbers

    def close(self) -> None:
        """Nothing to end."""


class RemoteSource:
    """A share in another node's memory."""

    def __init__(self, address: tuple[str, int], secret: str, kind: str, generation: int, rank: int, step: int) -> None:
        try:
            self._copy = RemoteCopy(address, secret, kind, generation, rank)
            self.state, _ = self._copy.read(step, 0, 0)
        except OSError as error:
            raise CopyLost(f"the copy of rank {rank} at {address[0]} cannot be read ({error})", (kind, rank)) from error
        self._which, self._where = (kind, rank), f"the {kind} copy of rank {rank} at {address[0]}"
        self._step, self._numbers = step, self._copy.header["numbers"]
        self._last: tuple[int, np.ndarray] | None = None
        self.index = [Piece.read(values) for values in self._copy.header["index"]]

    def read(self, number: int) -> np.ndarray:
        """fp32 [3, stop - start]. A piece that several others need parts of comes once, if they follow each other."""
        if self._last is None or self._last[0] != number:
            piece, planes = self.index[number], []
            count = piece.stop - piece.start
            for plane in range(PLANES):
                start = 4 * (plane * self._numbers + piece.at)
                try:
                    _, data = self._copy.read(self._step, start, start + 4 * count)
                except OSError as error:
                    raise CopyLost(f"{self._where} cannot be read any more ({error})", self._which) from error
                planes.append(np.frombuffer(data, dtype=np.float32))
            if any(plane.size != count for plane in planes):
                raise CopyLost(f"{self._where} is cut off", self._which)
            numbers = np.stack(planes)
            _verify(self, number, numbers, self._where, self._which)
            self._last = (number, numbers)
        return self._last[1]

    def close(self) -> None:
        """Ends the connection."""
        self._copy.close()


def _verify(source: Source, number: int, numbers: np.ndarray, where: str, which: tuple[str, int] | None) -> None:
    """Raises CopyLost if a piece is not as it was copied."""
    noted = source.state.get("checksums")
    if noted is not None and [checksum(plane) for plane in numbers] != noted[number]:
        raise CopyLost(f"{where} has changed since it was made: checksums of {source.index[number].key} differ", which)


class Assembler:
    """Assembles the pieces of one layout from the pieces of another. A source is opened only if those before it do not
    hold what is wanted: of a hundred replicas' shares a process needs its own, or two others' after a change of their
    number."""

    def __init__(self, openers: Sequence[Callable[[], Source]]) -> None:
        self._unopened = list(reversed(openers))
        self.opened: list[Source] = []
        self._by_key: dict[str, dict[tuple, list[Part]]] = defaultdict(lambda: defaultdict(list))

    def _open_until_held(self, wanted: Piece) -> None:
        while self._unopened and not _covers(self._by_key[wanted.key].get(wanted.box, ()), wanted):
            self._open_next()

    def _open_next(self) -> None:
        source = self._unopened.pop()()
        self.opened.append(source)
        for number, piece in enumerate(source.index):
            self._by_key[piece.key][piece.box].append((source, number, piece))

    def state(self) -> dict[str, Any]:
        """What every source holds besides its numbers, such as counters. A source is opened for it even if this process
        needs no numbers."""
        if not self.opened:
            self._open_next()
        return self.opened[0].state

    def read(self, wanted: Piece) -> np.ndarray:
        """fp32 [3, stop - start]. Raises CopyLost if part of it is in no source."""
        self._open_until_held(wanted)
        boxes = self._by_key[wanted.key]
        same = boxes.get(wanted.box)
        if same is not None:
            numbers = _range_of(same, wanted.start, wanted.stop)
        else:
            numbers = self._from_other_boxes(boxes, wanted)
        missing = np.isnan(numbers)
        if missing.any():
            # The last rows of these only round the vocabulary up, to a number that depends on the layout.
            if kind_of(wanted.tensor).role is not Role.VOCABULARY or same is not None:
                raise CopyLost(f"part of {wanted.key} is in no copy")
            numbers = np.where(missing, np.float32(0), numbers)
        return numbers

    def _from_other_boxes(self, boxes: dict[tuple, list[Part]], wanted: Piece) -> np.ndarray:
        whole = np.full((PLANES, *wanted.shape), np.nan, dtype=np.float32)
        for (_, offset, shape), parts in boxes.items():
            low = [max(a, b) for a, b in zip(wanted.offset, offset)]
            high = [min(a + n, b + m) for a, n, b, m in zip(wanted.offset, wanted.shape, offset, shape)]
            if any(a >= b for a, b in zip(low, high)):
                continue
            box = _range_of(parts, 0, int(np.prod(shape))).reshape(PLANES, *shape)
            there = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset))
            here = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, wanted.offset))
            whole[(slice(None),) + here] = box[(slice(None),) + there]  # noqa: RUF005  (Python 3.10)
        return whole.reshape(PLANES, -1)[:, wanted.start : wanted.stop]


def _covers(parts: Sequence[Part], wanted: Piece) -> bool:
    """Whether ranges of the same box hold all of ``wanted``."""
    reached = wanted.start
    for start, stop in sorted((piece.start, piece.stop) for _, _, piece in parts):
        if start <= reached:
            reached = max(reached, stop)
    return reached >= wanted.stop


def _range_of(parts: list[Part], start: int, stop: int) -> np.ndarray:
    """fp32 [3, stop - start] of a box from those of its ranges that are there; NaN where none is."""
    numbers = np.full((PLANES, stop - start), np.nan, dtype=np.float32)
    for source, number, piece in parts:
        low, high = max(start, piece.start), min(stop, piece.stop)
        if low < high:
            numbers[:, low - start : high - start] = source.read(number)[:, low - piece.start : high - piece.start]
    return numbers


@torch.no_grad()
def restore(
    models: Models, openers: Sequence[Callable[[], Source]], changed: Callable[[list[str]], None] = lambda _: None
) -> TrainState:
    """Restores freshly built engines from the state that the sources hold together, whatever layout saved it. Sources
    are opened in order, as far as they are needed, and closed. The configured settings of the optimizer apply;
    ``changed`` is called with those that differ from the copies', as ``field old → new``.

    Every process of the job calls this. Raises CopyLost if something is missing.
    """
    engines = engines_of(models)
    for engine in engines.values():
        allocate_moments(engine)
    assembler = Assembler(openers)
    try:
        with moments_in_fp32(models, take=True):
            for held in held_pieces(models, divided=False):
                for plane, numbers in zip(held.planes, assembler.read(held.piece)):
                    plane.copy_(torch.from_numpy(np.ascontiguousarray(numbers)))
        for engine in engines.values():
            weights_follow(engine)
        record = assembler.state()
    finally:
        for source in assembler.opened:
            source.close()
    before, now = record.get("base"), _fingerprint(engines[POLICY].network)
    if before != now:
        raise UserError(
            f"checkpoint.load is another model (fingerprint {now}) than when the run began ({before}); put that back"
        )
    for name, engine in engines.items():
        set_optimizer_steps(engine, record["optimizer_steps"][name])
        apply_configured_settings(engine)
    changed(settings_changed(record.get("settings", {}), settings_in_use(engines[POLICY])))
    return TrainState.from_record(record["train"])
