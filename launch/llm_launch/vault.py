"""Copies of training state in a node's memory: files of two slots each, so that one is always whole.

A worker copies its share of the optimizer state (fp32 weights and both AdamW moments) into its own file after a step;
the file outlives the worker. The agent of a partner node keeps a second copy, which outlives the node.

    header   JSON, padded to a page: generation, rank, numbers, index (whose meaning is the worker's)
    2 slots  1 MiB of state each: step + 1 (0 while the slot is being written), length, JSON
    2 slots  3 * numbers fp32 values each: weights, first moments, second moments
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import shutil
import struct
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from llm_parallel.errors import UserError

MAGIC = b"LLMVAULT1\n"
PAGE = 4096
STATE_BYTES = 1 << 20
PLANES = 3
STALE_S = 3600.0
"""Age from which on the copies of a run that nobody keeps alive here are removed when another run begins."""
SLOT_HEAD = struct.Struct("<QQ")
HEAD = struct.Struct(f"<{len(MAGIC)}sQ")


def run_folder(root: Path, run_dir: Path) -> Path:
    """Folder of a run's copies in the memory file system ``root``, which runs of several users may share."""
    run_id = run_dir.resolve().as_posix().strip("/").replace("/", "-")[-80:]
    return root / f"llm-parallel-{os.getuid()}" / run_id


def vault_name(generation: int, rank: int) -> str:
    """File name of the copy of ``rank``'s share in ``generation``."""
    return f"g{generation:06d}_r{rank:06d}"


def parse_vault_name(name: str) -> tuple[int, int] | None:
    """Generation and rank of a file name, or None if it is of something else."""
    generation, _, rank = name.partition("_r")
    if not (generation.startswith("g") and generation[1:].isdecimal() and rank.isdecimal()):
        return None
    return int(generation[1:]), int(rank)


class VaultFile:
    """One file, mapped into memory."""

    def __init__(self, path: Path, header: dict[str, Any], header_bytes: int, writable: bool) -> None:
        self.path, self.header, self.header_bytes = path, header, header_bytes
        self.numbers: int = header["numbers"]
        self.data_bytes = PLANES * 4 * self.numbers
        self.slot_bytes = _aligned(self.data_bytes)
        with path.open("r+b" if writable else "rb") as handle:
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            self.map = mmap.mmap(handle.fileno(), self.size(header_bytes, self.numbers), access=access)

    @staticmethod
    def size(header_bytes: int, numbers: int) -> int:
        """Bytes of the whole file."""
        return header_bytes + 2 * STATE_BYTES + 2 * _aligned(PLANES * 4 * numbers)

    @classmethod
    def create(cls, path: Path, header: dict[str, Any]) -> VaultFile:
        """A new file whose slots are empty. ``header`` has ``numbers``.

        Raises UserError if the memory file system has no room (found now: a later write would kill the process)."""
        data = json.dumps(header, separators=(",", ":")).encode()
        header_bytes = _aligned(HEAD.size + len(data))
        size = cls.size(header_bytes, header["numbers"])
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with temporary.open("w+b") as handle:
                os.posix_fallocate(handle.fileno(), 0, size)
                handle.write(HEAD.pack(MAGIC, len(data)) + data)
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise UserError(
                f"elastic.replica_dir: {path.parent} has no room for {size / 2**20:.0f} MiB of in-memory replica"
                f" ({error.strerror}); name a larger memory file system or a local disk, or set"
                " elastic.replicate_every_steps=0"
            ) from None
        return cls(path, header, header_bytes, writable=True)

    @classmethod
    def open(cls, path: Path) -> VaultFile:
        """An existing file, to read. Raises OSError or ValueError if it is none."""
        with path.open("rb") as handle:
            magic, length = HEAD.unpack(handle.read(HEAD.size))
            if magic != MAGIC:
                raise ValueError(f"{path} is no replica")
            header = json.loads(handle.read(length))
        return cls(path, header, _aligned(HEAD.size + length), writable=False)

    def state_offset(self, slot: int) -> int:
        """Where the state of ``slot`` begins."""
        return self.header_bytes + slot * STATE_BYTES

    def data_offset(self, slot: int) -> int:
        """Where the numbers of ``slot`` begin."""
        return self.header_bytes + 2 * STATE_BYTES + slot * self.slot_bytes

    def steps(self) -> dict[int, int]:
        """Complete steps held, and the slot of each."""
        found = {}
        for slot in range(2):
            mark, _ = SLOT_HEAD.unpack_from(self.map, self.state_offset(slot))
            if mark:
                found[mark - 1] = slot
        return found

    def data(self, slot: int) -> memoryview:
        """The numbers of ``slot`` as bytes."""
        offset = self.data_offset(slot)
        return memoryview(self.map)[offset : offset + self.data_bytes]

    def state(self, slot: int) -> dict[str, Any]:
        """What was committed beside the numbers of ``slot``."""
        offset = self.state_offset(slot)
        _, length = SLOT_HEAD.unpack_from(self.map, offset)
        return json.loads(self.map[offset + SLOT_HEAD.size : offset + SLOT_HEAD.size + length])

    def begin(self, slot: int) -> None:
        """Declares ``slot`` incomplete; its numbers may be overwritten after this."""
        SLOT_HEAD.pack_into(self.map, self.state_offset(slot), 0, 0)

    def commit(self, slot: int, step: int, state: dict[str, Any]) -> None:
        """Declares ``slot`` to hold ``step``."""
        data = json.dumps(state, separators=(",", ":")).encode()
        assert len(data) <= STATE_BYTES - SLOT_HEAD.size
        offset = self.state_offset(slot)
        self.map[offset + SLOT_HEAD.size : offset + SLOT_HEAD.size + len(data)] = data
        SLOT_HEAD.pack_into(self.map, offset, step + 1, len(data))


def _aligned(size: int) -> int:
    return -(-size // PAGE) * PAGE


def inventory(folder: Path) -> list[dict[str, Any]]:
    """What a node's folder holds: ``[{"kind": "own"|"kept", "generation", "rank", "steps": [...]}]``."""
    found = []
    for kind in ("own", "kept"):
        for path in sorted((folder / kind).glob("g*_r*")):
            parsed = parse_vault_name(path.name)
            if parsed is None:
                continue
            try:
                steps = sorted(VaultFile.open(path).steps())
            except (OSError, ValueError):
                continue
            if steps:
                found.append({"kind": kind, "generation": parsed[0], "rank": parsed[1], "steps": steps})
    return found


def forget_all_but(folder: Path, kept: Collection[int]) -> None:
    """Removes the copies of other generations."""
    for path in folder.glob("*/g*_r*"):
        parsed = parse_vault_name(path.name)
        if parsed is not None and parsed[0] not in kept:
            path.unlink(missing_ok=True)


def keep_alive(folder: Path) -> None:
    """Says that the agent of this node's ``folder`` lives; more often than every ``STALE_S``."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.utime(folder)


def forget_stale(folder: Path) -> None:
    """Removes what other runs of this user left beside the run of ``folder``: those that were killed and never came
    back would hold the node's memory for ever."""
    for other in folder.parent.parent.glob("*/*"):
        with contextlib.suppress(OSError):
            if other.parent != folder.parent and time.time() - other.stat().st_mtime > STALE_S:
                forget(other)


def forget(folder: Path) -> None:
    """Removes a node's folder, and its run's when that is the last one."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()
