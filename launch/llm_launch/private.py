"""Folders that no other user of the machine can make first, look into or redirect, below folders that all may write to.

The copies of a run's state lie in a memory file system that every user of the node may write to. A user who
makes a folder of ours there first, or a symbolic link in its place, could choose which files we write, read or delete.
So our folders are made with mode 0700 and checked whenever they are opened, and nothing is opened or deleted through a
link: every name is looked up in a descriptor of the folder before it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from llm_parallel.errors import UserError

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_NOFOLLOW | os.O_CLOEXEC


def check_root(root: Path) -> None:
    """Raises UserError if another user could replace folders that are made in ``root``: because everyone may write to
    it, or to one that it is in, without the sticky bit, or because a stranger made it."""
    field = "elastic.replica_dir"
    resolved = root.resolve()
    shared = False
    for folder in [*reversed(resolved.parents), resolved]:
        try:
            found = folder.stat()
        except OSError as error:
            raise UserError(f"{field} = {root} cannot be used ({error.strerror}); name a folder that exists") from None
        if shared and found.st_uid not in (0, os.getuid()):
            raise UserError(
                f"{field} = {root}: {folder} belongs to user {found.st_uid}, who could read and change what this run"
                " keeps there; name a folder of your own"
            )
        shared = bool(found.st_mode & stat.S_IWOTH)
        if shared and not found.st_mode & stat.S_ISVTX:
            raise UserError(
                f"{field} = {root}: every user may replace what is in {folder} (mode {stat.S_IMODE(found.st_mode):04o},"
                " no sticky bit); name a folder of your own, or have it made 1777"
            )


def _problem(found: os.stat_result) -> str | None:
    """Why a folder is not private."""
    if not stat.S_ISDIR(found.st_mode):
        return "is no folder but a symbolic link" if stat.S_ISLNK(found.st_mode) else "is no folder"
    if found.st_uid != os.getuid():
        return f"belongs to user {found.st_uid}"
    if stat.S_IMODE(found.st_mode) & 0o077:
        return f"has the mode {stat.S_IMODE(found.st_mode):04o}, with which other users get in"
    return None


def _refuse(path: Path, problem: str) -> UserError:
    return UserError(
        f"{path} {problem}, so another user of this machine may have made it, and no memory copies of the training"
        " state are kept there; have it removed, or set elastic.replica_dir to a folder of your own"
    )


def _enter(parent: int, name: str, path: Path, make: bool) -> int:
    if make:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=parent)
    problem = _problem(os.stat(name, dir_fd=parent, follow_symlinks=False))
    if problem is not None:
        raise _refuse(path, problem)
    fd = os.open(name, _FOLDER, dir_fd=parent)
    problem = _problem(os.fstat(fd))  # of what is open now, whatever happened to the name meanwhile
    if problem is not None:
        os.close(fd)
        raise _refuse(path, problem)
    return fd


@contextlib.contextmanager
def private_folder(root: Path, *names: str, make: bool) -> Iterator[int]:
    """Descriptor of the folder ``root/names[0]/names[1]/…``, each part of which below ``root`` is private to this user;
    with ``make`` those that are missing are made, and ``root`` is checked too.

    Raises FileNotFoundError if one is missing, UserError if one is another user's or open to others."""
    if make:
        check_root(root)
    fd, path = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), root
    try:
        for name in names:
            path = path / name
            inner = _enter(fd, name, path, make)
            os.close(fd)
            fd = inner
        yield fd
    finally:
        os.close(fd)


def open_own_file(path: Path, flags: int) -> int:
    """Descriptor of a file of this user's that is no link. Raises OSError, PermissionError if it is another's."""
    fd = os.open(path, flags | _FILE | os.O_NONBLOCK)
    found = os.fstat(fd)
    if found.st_uid != os.getuid() or not stat.S_ISREG(found.st_mode):
        os.close(fd)
        raise PermissionError(f"{path} is not a file of this user's")
    return fd


def names_in(folder: int) -> list[str]:
    """What is in an open folder."""
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries]


def remove_below(parent: int, name: str) -> None:
    """Removes ``name`` in the folder ``parent``, and what is in it if it is a folder. A link is removed, and what it
    points to stays. What cannot be removed is left."""
    with contextlib.suppress(OSError):
        if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
            os.unlink(name, dir_fd=parent)
            return
        fd = os.open(name, _FOLDER, dir_fd=parent)
        try:
            for inner in names_in(fd):
                remove_below(fd, inner)
        finally:
            os.close(fd)
        os.rmdir(name, dir_fd=parent)


def lock_is_refused(fd: int, kind: int) -> bool:
    """Whether another process holds a lock that forbids one of ``kind`` (fcntl.LOCK_SH or LOCK_EX) on an open file,
    which is closed by this call, and the lock with it."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    finally:
        os.close(fd)
    return False
