"""Writing files so that a reader, or the next start after a crash, never sees half of one."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shlex
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from llm_parallel.errors import UserError
from llm_parallel.lines import note

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)
"""Errors of a place that a user can mend or avoid."""
SMALL_BYTES = 64 << 20
"""More than any file that is read as a whole by its name: a run folder's records, a cache's answers."""


def fsync_dir(path: Path) -> None:
    """Makes the renames inside directory ``path`` durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Opens a temporary file beside ``path``; on a clean exit it is flushed, synced and renamed to ``path``.

    A file that was at ``path`` stays as it was if the body raises or the process dies. ``mode`` is "w" (UTF-8) or "wb".
    The folder may be one that everyone may write to: a link that another user put in the place of the temporary file is
    not followed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(fd, mode, encoding=None if "b" in mode else "utf-8") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
        fsync_dir(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_in_whole(target: Path) -> Iterator[Path]:
    """A hidden folder beside ``target`` to write into, which becomes ``target`` on a clean exit, and is removed if the
    body raises. What a process left there that died is removed at the next start.

    Raises UserError if ``target`` is not empty, another process is writing it, the place cannot be written to, or the
    disk is full."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is not empty; give a new folder")
    making = target.with_name(f".{target.name}.making")
    try:
        making.mkdir(parents=True, exist_ok=True)
        held = f"another process is writing {target}; wait for it, or give another folder"
        with locked(making, held):
            if not making.is_dir():  # the other one finished between our opening the folder and locking it
                raise UserError(held)
            try:
                for left in making.iterdir():
                    shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
                yield making
                if target.exists():
                    target.rmdir()
                making.rename(target)
                fsync_dir(target.parent)
            finally:
                shutil.rmtree(making, ignore_errors=True)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise UserError(f"{target} cannot be written ({error.strerror}); make room, or give another folder") from None


@contextmanager
def locked(path: Path, held: str) -> Iterator[None]:
    """Holds the lock file ``path``, or a folder that is there, while the body runs, so that only one process at a time
    runs it. The file is never deleted: a process that still has it open and one that creates it again would both enter.
    Raises UserError with the text ``held`` if another process holds the lock, and UserError if another user put a link
    or a file there."""
    fd = open_own(path, os.O_RDONLY | os.O_DIRECTORY if path.is_dir() else os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(held) from None
        yield
    finally:
        os.close(fd)


@contextmanager
def turn(path: Path) -> Iterator[None]:
    """Holds the lock file ``path`` while the body runs, and waits for it first: processes enter one after the other."""
    fd = open_own(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def open_own(path: Path, flags: int) -> int:
    """Opens ``path`` and returns its descriptor. Raises UserError if it is a symbolic link, or belongs to another user
    in a folder that everyone may write to."""
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if path.is_symlink():
            raise UserError(f"{path} is a symbolic link where LLM Parallel needs its own file; remove it") from None
        raise error
    refuse_strangers(path, os.fstat(fd), fd)
    return fd


def refuse_strangers(path: Path, found: os.stat_result, fd: int | None = None) -> None:
    """Raises UserError, after closing ``fd``, if the file at ``path``, with the status ``found``, belongs to another
    user and lies in a folder that everyone may write to: it may have been put there to be taken for ours."""
    shared = bool(path.parent.stat().st_mode & stat.S_IWOTH)
    if shared and found.st_uid not in (0, os.getuid()):
        if fd is not None:
            os.close(fd)
        raise UserError(
            f"{path} belongs to user {found.st_uid} and lies in a folder that everyone may write to; choose a folder of"
            " your own"
        )


def read_small(path: Path, most: int = SMALL_BYTES) -> bytes:
    """Content of a file that a program of ours wrote, in a folder in which somebody else may have put another. Raises
    OSError if it is no regular file (a reader would wait for ever at a pipe, and a device may have no end) or has more
    than ``most`` bytes, as a sparse file can without taking room."""
    fd = open_regular(path)
    with os.fdopen(fd, "rb") as handle:
        content = handle.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    return content


def read_json(path: Path) -> Any:
    """The value in such a file. Raises OSError as ``read_small`` does, and ValueError if it is not JSON."""
    try:
        return json.loads(read_small(path).decode("utf-8"))
    except RecursionError:
        raise ValueError(f"{path} has lists within lists beyond measure") from None


def open_regular(path: Path) -> int:
    """Descriptor to read a regular file. Raises OSError if something else has its name; it is not waited for."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return fd


def open_to_append(path: Path, flags: int = os.O_WRONLY) -> int:
    """Descriptor of a log. Raises PermissionError if a link of another user is in its place, which would have our lines
    written to any file of ours. A link of this user's own is followed. A pipe that nobody reads is an OSError."""
    flags |= os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EMLINK):
            raise
        link, target, again = path.lstat(), path.parent / path.readlink(), path.lstat()
        if link.st_uid not in (0, os.getuid()) or not os.path.samestat(link, again):
            text = f"it is a symbolic link of user {link.st_uid}"
            raise PermissionError(errno.EPERM, text, str(path)) from None
        fd = os.open(target, flags, 0o644)
    os.set_blocking(fd, True)
    return fd


def refuse_planted(folder: Path) -> None:
    """Raises UserError if a link in a run folder is another user's, or another user could replace the folder itself,
    because it lies in a folder of his that he made where everyone may write. Says it if everyone may write to it."""
    resolved = folder.resolve()
    for place in (resolved, *resolved.parents[:-1]):
        refuse_strangers(place, place.stat())
    with os.scandir(folder) as entries:
        for entry in entries:
            owner = entry.stat(follow_symlinks=False).st_uid
            if entry.is_symlink() and owner not in (0, os.getuid()):
                raise UserError(f"{entry.path} is a symbolic link of user {owner}; remove it, or give another run_dir")
    mode = stat.S_IMODE(resolved.stat().st_mode)
    if mode & stat.S_IWOTH:
        note(
            f"run_dir = {folder}: every user of this machine may change the run and its checkpoints (mode {mode:04o});"
            f" `chmod o-w {shlex.quote(str(folder))}` ends that"
        )


def refuse_outside(path: Path, folder: Path) -> None:
    """Raises UserError if ``path``, a file of a folder that somebody else may have made, lies outside of it, is a link
    that leads out, or is a pipe or a device: a model's folder could otherwise have any of this user's files read,
    copied and sent on. Links of Hugging Face's cache, from a revision to its blobs, are what they should be."""
    base, found = folder.resolve(), path.resolve()
    roots = [base, base.parent.parent / "blobs"] if base.parent.name == "snapshots" else [base]
    if not any(found.is_relative_to(root) for root in roots):
        raise UserError(f"{path} leads to {found}, outside {folder}; put the file itself there if it belongs there")
    if found.exists() and not (found.is_file() or found.is_dir()):
        raise UserError(f"{path} is no file but a pipe, a socket or a device, at which a reader may wait for ever")


def copy_inside(source: Path, target: Path, ignore: Callable[[str, list[str]], set[str]] | None = None) -> None:
    """Copies a folder that somebody else may have made, over what is in ``target``. Raises UserError for a link that
    leads out of it."""

    def checked(folder: str, names: list[str]) -> set[str]:
        left_out = ignore(folder, names) if ignore is not None else set()
        for name in set(names) - left_out:
            refuse_outside(Path(folder) / name, source)
        return left_out

    shutil.copytree(source, target, dirs_exist_ok=True, ignore=checked)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
