"""Memory copies: copies of the training state in a node's memory, in files of two slots, one of which is always whole.

They lie in ROOT/llm-parallel-USER-RUN-IDENTITY/NODE/own and kept, which are private to the user (private.py). No run
takes another's copies: a run's identity is a hash of a random number in its run folder and of that folder's path, and
every file holds it.

A worker copies its share of the optimizer state (fp32 weights and both AdamW moments) into its own file after a step;
the file outlives the worker. The agent of a partner node keeps a second copy, which outlives the node.

    header   JSON, padded to a page: run, generation, rank, numbers, index (only workers interpret it)
    2 slots  1 MiB of state each: step + 1 (0 while the slot is being written), length, JSON (by zlib if it is longer)
    2 slots  3 * numbers fp32 values each: weights, first moments, second moments
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import re
import secrets
import struct
import time
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from llm_launch.private import lock_is_refused, names_in, open_own_file, private_folder, remove_below
from llm_parallel.errors import UserError
from llm_parallel.files import atomic_write, read_small

RUN_ID_NAME = "run_id"
"""File of the run folder with the run's random number."""
MAGIC = b"LLMVAULT1\n"
"""First bytes of every file of this format."""
PAGE = 4096
STATE_BYTES = 1 << 20
PLANES = 3
STALE_S = 3600.0
"""When another run begins on a node, it removes copies whose agent has shown no life for so long."""
SLOT_HEAD = struct.Struct("<QQ")
HEAD = struct.Struct(f"<{len(MAGIC)}sQ")


def run_identity(run_dir: Path) -> str:
    """Hexadecimal digits that differ for every run, also for a copy of its run folder and for an earlier run in the
    same folder. Writes the random number that they are derived from into the run folder if there is none."""
    number = run_number(run_dir)
    if number is None:
        with atomic_write(run_dir / RUN_ID_NAME) as handle:
            handle.write(secrets.token_hex(16) + "\n")
        number = run_number(run_dir)
    return hashlib.sha256(f"{number} {run_dir.resolve()}".encode()).hexdigest()[:32]


def run_number(run_dir: Path) -> str | None:
    """The random number in a run folder; None if it has none. Raises OSError if it cannot be read."""
    try:
        text = read_small(run_dir / RUN_ID_NAME).decode(errors="replace").strip()
    except FileNotFoundError:
        return None
    return text if re.fullmatch(r"[0-9a-f]{32}", text) else None


def run_folder(root: Path, run_dir: Path) -> Path:
    """Folder of a run's copies in the memory file system ``root``, which runs of several users may share."""
    readable = re.sub(r"[^A-Za-z0-9._-]", "-", run_dir.resolve().name)[:40]
    return root / f"{_prefix()}{readable}-{run_identity(run_dir)}"


def make_run_folder(root: Path, run_dir: Path) -> None:
    """Makes a run's folder on this node if it is not there. Raises UserError if it is not private to this user."""
    with private_folder(root, run_folder(root, run_dir).name, make=True):
        pass


def _prefix() -> str:
    return f"llm-parallel-{os.getuid()}-"


def forget_run(root: Path, run_dir: Path) -> None:
    """Removes a run's copies on all nodes that share ``root``."""
    folder = run_folder(root, run_dir)
    with private_folder(root, make=False) as parent:
        remove_below(parent, folder.name)


def copy_name(generation: int, rank: int) -> str:
    """File name of the copy of ``rank``'s share in ``generation``."""
    return f"g{generation:06d}_r{rank:06d}"


def parse_copy_name(name: str) -> tuple[int, int] | None:
    """Generation and rank of a file name, or None if it is of something else."""
    generation, _, rank = name.partition("_r")
    if not (generation.startswith("g") and generation[1:].isdecimal() and rank.isdecimal()):
        return None
    return int(generation[1:]), int(rank)


class CopyFile:
    """One file, mapped into memory."""

    def __init__(self, path: Path, header: dict[str, Any], header_bytes: int, writable: bool) -> None:
        self.path, self.header, self.header_bytes = path, header, header_bytes
        self.numbers: int = header["numbers"]
        self.data_bytes = PLANES * 4 * self.numbers
        self.slot_bytes = _aligned(self.data_bytes)
        fd = open_own_file(path, os.O_RDWR if writable else os.O_RDONLY)
        try:
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            self.map = mmap.mmap(fd, self.size(header_bytes, self.numbers), access=access)
        finally:
            os.close(fd)

    @staticmethod
    def size(header_bytes: int, numbers: int) -> int:
        """Bytes of the whole file."""
        return header_bytes + 2 * STATE_BYTES + 2 * _aligned(PLANES * 4 * numbers)

    @classmethod
    def create(cls, path: Path, header: dict[str, Any]) -> CopyFile:
        """A new file whose slots are empty. ``header`` has ``numbers``; the run is that of the folder.

        Raises UserError if the memory file system has no room (found now: a later write would kill the process), or
        another user made the folder; ValueError for a header of another run."""
        run = _run_of(path)
        if header.setdefault("run", run) != run:
            raise ValueError(f"a copy of the run {header['run']} is not kept in {path}")
        data = json.dumps(header, separators=(",", ":")).encode()
        header_bytes = _aligned(HEAD.size + len(data))
        size = cls.size(header_bytes, header["numbers"])
        root, names = path.parents[3], path.parts[-4:-1]
        temporary = f".{path.name}.{os.getpid()}.tmp"
        try:
            with private_folder(root, *names, make=True) as folder:
                try:
                    _write_new(folder, temporary, HEAD.pack(MAGIC, len(data)) + data, size)
                    os.replace(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
                finally:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(temporary, dir_fd=folder)
        except OSError as error:
            raise UserError(
                f"elastic.replica_dir: {path.parent} has no room for {size / 2**20:.0f} MiB of a memory copy"
                f" ({error.strerror}); name a larger memory file system or a local disk, or set"
                " elastic.replicate_every_steps=0"
            ) from None
        return cls(path, header, header_bytes, writable=True)

    @classmethod
    def open(cls, path: Path) -> CopyFile:
        """An existing file, to read. Raises OSError or ValueError if it is none."""
        with os.fdopen(open_own_file(path, os.O_RDONLY), "rb") as handle:
            head = handle.read(HEAD.size)
            magic, length = HEAD.unpack(head) if len(head) == HEAD.size else (b"", 0)
            if magic != MAGIC:
                raise ValueError(f"{path} is no memory copy")
            header = json.loads(handle.read(length))
        if header.get("run") != _run_of(path):
            raise ValueError(f"{path} is a copy of another run, {header.get('run')}")
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
        """The JSON object that was committed with the numbers of ``slot``."""
        offset = self.state_offset(slot)
        _, length = SLOT_HEAD.unpack_from(self.map, offset)
        data = self.map[offset + SLOT_HEAD.size : offset + SLOT_HEAD.size + length]
        return json.loads(data if data.startswith(b"{") else zlib.decompress(data))

    def begin(self, slot: int) -> None:
        """Declares ``slot`` incomplete; its numbers may be overwritten after this."""
        SLOT_HEAD.pack_into(self.map, self.state_offset(slot), 0, 0)

    def commit(self, slot: int, step: int, state: dict[str, Any]) -> None:
        """Declares ``slot`` to hold ``step``."""
        data = json.dumps(state, separators=(",", ":")).encode()
        if len(data) > STATE_BYTES - SLOT_HEAD.size:  # a run of thousands of sources, changed many times
            data = zlib.compress(data)
        assert len(data) <= STATE_BYTES - SLOT_HEAD.size
        offset = self.state_offset(slot)
        self.map[offset + SLOT_HEAD.size : offset + SLOT_HEAD.size + len(data)] = data
        SLOT_HEAD.pack_into(self.map, offset, step + 1, len(data))


def _aligned(size: int) -> int:
    return -(-size // PAGE) * PAGE


def _run_of(path: Path) -> str:
    """Name of the run's folder, of a path RUN/NODE/own/FILE: what the header's ``run`` has to be."""
    return path.parents[2].name


def _write_new(folder: int, name: str, head: bytes, size: int) -> None:
    """A new file of ``size`` bytes in ``folder``, where nothing of that name may be."""
    fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    with os.fdopen(fd, "w+b") as handle:
        os.posix_fallocate(fd, 0, size)
        handle.write(head)


def inventory(folder: Path) -> list[dict[str, Any]]:
    """What a node's folder holds: ``[{"kind": "own"|"kept", "generation", "rank", "steps": [...], "origin"}]``, where
    origin is what the launcher said of the generation, or None."""
    found = []
    for kind in ("own", "kept"):
        for name in _names_in(folder / kind):
            parsed = parse_copy_name(name)
            if parsed is None:
                continue
            try:
                file = CopyFile.open(folder / kind / name)
            except (OSError, ValueError):
                continue
            if steps := sorted(file.steps()):
                which = {"kind": kind, "generation": parsed[0], "rank": parsed[1]}
                found.append({**which, "steps": steps, "origin": file.header.get("origin")})
    return found


def _names_in(folder: Path) -> list[str]:
    """What a private folder holds, in order; nothing if there is none, or it is not private."""
    with contextlib.suppress(OSError, UserError), _opened(folder) as fd:
        return sorted(names_in(fd))
    return []


def forget_all_but(folder: Path, kept: Collection[int]) -> None:
    """Removes the copies of other generations."""
    for kind in ("own", "kept"):
        with contextlib.suppress(OSError, UserError), _opened(folder / kind) as fd:
            for name in names_in(fd):
                parsed = parse_copy_name(name)
                if parsed is not None and parsed[0] not in kept:
                    remove_below(fd, name)


def _opened(folder: Path) -> contextlib.AbstractContextManager[int]:
    """Descriptor of a private folder RUN/NODE or RUN/NODE/kind of a root."""
    depth = 3 if folder.name in ("own", "kept") else 2
    return private_folder(folder.parents[depth - 1], *folder.parts[-depth:], make=False)


class Claim:
    """A node's folder as its agent holds it: a lock, which ends with the process, shows other runs that it lives. The
    folder's time shows how long ago a run that has no agent any more had one."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._fd = folder, -1

    def renew(self) -> None:
        """Makes the folder if it is not there, locks it, and sets its time; to be called every so often. Raises
        UserError if another user made the folder, and OSError."""
        if self._fd >= 0 and not os.fstat(self._fd).st_nlink:
            self.close()  # somebody has removed it
        if self._fd < 0:
            with private_folder(self._folder.parents[1], *self._folder.parts[-2:], make=True) as fd:
                self._fd = os.dup(fd)
            with contextlib.suppress(OSError):  # a file system without locks: the time alone tells
                fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        os.utime(self._fd)

    def close(self) -> None:
        """Gives the lock back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def forget_stale(folder: Path) -> None:
    """Removes copies that other runs of this user left beside the run of ``folder``: one that was killed and never came
    back would hold the node's memory for ever. Those of a run whose agent holds them are left alone, however old they
    seem after a machine has slept or a clock was set, and so is whatever is not certainly this user's own."""
    root = folder.parents[1]
    try:
        runs = [folder.name for folder in root.iterdir() if folder.name.startswith(_prefix())]
    except OSError:
        return
    for run in runs:
        with contextlib.suppress(OSError, UserError), private_folder(root, run, make=False) as fd:
            for node in names_in(fd) if run != folder.parent.name else ():
                age_s = time.time() - os.stat(node, dir_fd=fd, follow_symlinks=False).st_mtime
                if age_s > STALE_S and not _is_held(fd, node):
                    remove_below(fd, node)
        _remove_if_empty(root, run)


def _is_held(parent: int, name: str) -> bool:
    """Whether a process holds the folder ``name``."""
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    return lock_is_refused(fd, fcntl.LOCK_EX)


def forget(folder: Path) -> None:
    """Removes a node's folder, and its run's when that is the last one."""
    root, run, node = folder.parents[1], *folder.parts[-2:]
    with contextlib.suppress(OSError, UserError), private_folder(root, run, make=False) as fd:
        remove_below(fd, node)
    _remove_if_empty(root, run)


def _remove_if_empty(root: Path, run: str) -> None:
    with contextlib.suppress(OSError), private_folder(root, make=False) as parent:
        os.rmdir(run, dir_fd=parent)
