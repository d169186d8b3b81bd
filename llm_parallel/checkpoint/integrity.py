"""Checksums of a checkpoint's files: whether it still is as it was written.

A flipped bit in a tensor file loads without an error, and a run that starts from it is ruined. So the writer of each
tensor file leaves its size and CRC-32 beside it (``__3_0.distcp.crc32``), rank 0 those of the small files in
``checksums.json``, and before a checkpoint is loaded the processes share its files and read them once.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

import torch.distributed as dist

from llm_parallel.files import atomic_write, open_regular, read_json, read_small
from llm_parallel.parallel.groups import Groups

SUFFIX = ".crc32"
SMALL_FILES = "checksums.json"
BLOCK_BYTES = 16 << 20

Sum = tuple[int, int]
"""Size in bytes, and CRC-32."""


def checksum(path: Path) -> Sum:
    """Reads a whole file. Raises OSError."""
    size, crc = 0, 0
    with os.fdopen(open_regular(path), "rb", buffering=0) as handle:
        while block := handle.read(BLOCK_BYTES):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


def seal_file(path: Path) -> None:
    """Writes a large file's checksum beside it; its writer calls this while the file is still in the page cache."""
    size, crc = checksum(path)
    with atomic_write(path.with_name(path.name + SUFFIX)) as handle:
        handle.write(f"{size} {crc:08x}\n")


def seal_folder(folder: Path) -> None:
    """Writes the checksums of all files that have none of their own into ``checksums.json``."""
    own = {path.with_name(path.name.removesuffix(SUFFIX)) for path in folder.glob("*" + SUFFIX)}
    others = [path for path in _files(folder) if path not in own]
    sums = {str(path.relative_to(folder)): checksum(path) for path in others}
    with atomic_write(folder / SMALL_FILES) as handle:
        json.dump(sums, handle)


def expected(folder: Path) -> dict[Path, Sum | None]:
    """Every file of a checkpoint that was sealed, with its size and checksum at that time (None: the checksum itself is
    damaged); empty for a checkpoint that was never sealed. Raises OSError."""
    found: dict[Path, Sum | None] = {}
    if (folder / SMALL_FILES).exists():
        try:
            entries = read_json(folder / SMALL_FILES)
            found = {folder / name: (int(size), int(crc)) for name, (size, crc) in entries.items() if _inside(name)}
            found |= {folder / SMALL_FILES: None} if len(found) < len(entries) else {}
        except (ValueError, TypeError, AttributeError):
            found = {folder / SMALL_FILES: None}
    for path in folder.glob("*" + SUFFIX):
        try:
            size, crc = read_small(path).split()
            found[path.with_name(path.name.removesuffix(SUFFIX))] = int(size), int(crc, 16)
        except ValueError:
            found[path] = None
    return found


def _inside(name: str) -> bool:
    """Whether a name is one of a file in the folder: others are not read, whatever the list says."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def damaged_files(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """Names of files that changed after they were sealed. Only every ``parts``-th file is checked, from number ``part``
    on."""
    wrong = []
    for path, sealed in sorted(expected(folder).items())[part::parts]:
        try:
            if sealed is None or checksum(path) != sealed:
                wrong.append(path.name)
        except OSError:
            wrong.append(path.name)
    return wrong


def damage(folder: Path, groups: Groups) -> str | None:
    """What is wrong with a checkpoint, in words, or None. Every process of the job calls this and reads its share."""
    world = groups.mesh.world_size
    wrong = damaged_files(folder, groups.rank, world)
    (count,) = groups.sum_over_world(float(len(wrong)))
    if not count:
        return None
    everybody: list[list[str]] = [[] for _ in range(world)]
    dist.all_gather_object(everybody, wrong)
    names = sorted(name for part in everybody for name in part)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} changed after it was written"


def _files(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and p.suffix != SUFFIX and p.name != SMALL_FILES]
