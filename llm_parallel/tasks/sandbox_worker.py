"""How a worker of the sandbox is started: what it may see, and by what it is held."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

Mode = Literal["bwrap", "landlock", "unsafe"]
MODES: tuple[Mode, ...] = ("bwrap", "landlock", "unsafe")

INSIDE = ("sandbox_confine", "sandbox_calls", "sandbox_inside")
"""Modules of this package whose text runs in the sandbox, in the order in which they import each other."""
BEFOREHAND = (
    "bisect",
    "collections",
    "copy",
    "dataclasses",
    "functools",
    "hashlib",
    "heapq",
    "inspect",
    "itertools",
    "math",
    "operator",
    "random",
    "re",
    "statistics",
    "string",
    "typing",
)
"""What programs often import; a worker does it once for all of them."""
SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
FOLDER = "/tmp"
PACKAGES = "/packages"
START_S = 60.0


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    cpu_s: processor-seconds; wall_s: seconds; memory_bytes: address space of the program, and again of its tests;
    output_bytes: standard output and error together; file_bytes: all files that it writes (``bwrap``; it can write none
    in ``landlock``); threads: of a program and its tests together. A program can never start another process."""

    cpu_s: int = 10
    wall_s: float = 30.0
    memory_bytes: int = 1 << 30
    output_bytes: int = 1 << 20
    file_bytes: int = 16 << 20
    threads: int = 32


@dataclass(frozen=True)
class Setup:
    """One way to start workers. command: what stands before the interpreter's own arguments; settings: what the
    supervisor is told; readable: files and folders that it may read."""

    mode: Mode
    command: tuple[str, ...]
    settings: Mapping[str, Any]


def setups(modes: Sequence[str], limits: Limits, packages: Sequence[str]) -> Iterator[Setup]:
    """Ways to start workers in the given modes, the best of each mode first."""
    packages = [os.path.realpath(folder) for folder in packages]
    root = os.geteuid() == 0
    for mode in modes:
        if mode == "bwrap":
            for folder in (FOLDER, None):  # before 0.7, bubblewrap cannot limit the size of a folder
                for own_user in (True, False) if root else (False,):
                    yield _bwrap(limits, packages, own_user, folder)
        elif mode == "landlock":
            for own_user in (True, False) if root else (False,):
                yield _landlock(limits, packages, own_user)
        else:
            yield Setup("unsafe", (), _settings(limits, packages, confined=False))


def _bwrap(limits: Limits, packages: Sequence[str], own_user: bool, folder: str | None) -> Setup:
    """Namespaces made by bubblewrap. own_user: root's way, without a namespace of users: the worker becomes a user of
    its own; otherwise it stays the user that started it, under another name and without any right. folder: where
    programs may write; None: nowhere."""
    program = shutil.which("bwrap") or ""
    options = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    if own_user:
        options += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        options += ["--unshare-user", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL"]
    seen = readable()
    inside = [f"{PACKAGES}/{number}" for number in range(len(packages))]
    folders = {str(folder) for path in (*seen, *inside, *DEVICES) for folder in Path(path).parents}
    for parent in sorted(folders - {"/", *filter(os.path.islink, SYSTEM), *seen}):
        options += ["--perms", "0755", "--dir", parent]  # what bwrap makes by itself is for root alone
    for path in seen:
        if Path(path).is_symlink():
            options += ["--symlink", str(Path(path).readlink()), path]
        elif Path(path).exists():
            options += ["--ro-bind", path, path]
    for path, name in zip(packages, inside):  # which may lie in what the private folder hides
        options += ["--ro-bind", path, name]
    for device in DEVICES:
        options += ["--dev-bind", device, device]
    if folder is not None:
        options += ["--perms", "1777", "--size", str(limits.file_bytes), "--tmpfs", folder]
    # The tree itself is a tmpfs too, without a limit.
    options += ["--remount-ro", "/", "--chdir", folder or "/", "--die-with-parent", "--"]
    counted_apart = own_user or kernel() >= (5, 14)
    settings = _settings(limits, inside, confined=True, counted_apart=counted_apart)
    settings |= {"folder": folder, "uid": own_uid() if own_user else None}
    return Setup("bwrap", (program, *options), settings)


def _landlock(limits: Limits, packages: Sequence[str], own_user: bool) -> Setup:
    """Landlock and seccomp. own_user: root becomes a user of whom there is no other process."""
    settings = _settings(limits, packages, confined=True, counted_apart=own_user)
    settings["readable"] = [*readable(), *packages, *DEVICES]
    if own_user:
        settings |= {"uid": own_uid(), "keep_reading": not all(map(open_to_all, [*readable(), *packages]))}
    return Setup("landlock", (), settings)


def _settings(
    limits: Limits, packages: Sequence[str], *, confined: bool, counted_apart: bool = False
) -> dict[str, Any]:
    """What the supervisor is told. counted_apart: the system counts the worker's threads apart from those of the user
    that started it."""
    most = limits.threads + 3 + (0 if counted_apart else threads_of_user())
    once = {
        "RLIMIT_AS": limits.memory_bytes,
        "RLIMIT_FSIZE": limits.file_bytes,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
        "RLIMIT_NPROC": most,
    }
    seconds = max(math.ceil(limits.cpu_s), 1)
    return {
        "confined": confined,
        "packages": list(packages),
        "imports": list(BEFOREHAND),
        "folder": None,
        "readable": None,
        "uid": None,
        "keep_reading": False,
        "limits": {"RLIMIT_CPU": [seconds, seconds + 1], **{name: [value, value] for name, value in once.items()}},
    }


def interpreter() -> str:
    """The interpreter itself, not the link of a virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def readable() -> list[str]:
    """The interpreter, its library, and shared libraries of the system."""
    shared = sysconfig.get_config_var("DESTSHARED")
    libraries = [os.path.realpath(path) for path in (Path(os.__file__).parent, shared) if path]
    if sys.base_prefix not in ("/usr", "/"):
        libraries.append(os.path.realpath(f"{sys.base_prefix}/lib"))
    return list(dict.fromkeys([interpreter(), *libraries, *SYSTEM]))


def open_to_all(path: str) -> bool:
    """Whether every user can reach a file or folder and read it."""
    here = Path(path)
    if not here.exists():
        return True
    return all(folder.stat().st_mode & 0o001 for folder in here.resolve().parents) and bool(here.stat().st_mode & 0o004)


def own_uid() -> int:
    """A user that nobody is: from the upper end of the numbers that this system, or container, has."""
    ranges = [[int(word) for word in line.split()] for line in Path("/proc/self/uid_map").read_text().splitlines()]
    first, _, count = max(ranges, key=lambda one: one[2])
    most = min(first + count, 1 << 31)
    return most - 2 - secrets.randbelow(max(min(count // 8, 1 << 24), 1))


def kernel() -> tuple[int, int]:
    """The version of the kernel."""
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int("".join(digit for digit in minor if digit.isdigit()) or 0)


def threads_of_user() -> int:
    """Threads of this user's processes, which a limit on them counts too."""
    found, own = 0, os.getuid()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if process.stat().st_uid == own:
                found += sum(1 for _ in (process / "task").iterdir())
    return found


def program() -> str:
    """The text that the interpreter gets: the modules of ``INSIDE``, without the package that they stand in."""
    here = Path(__file__).parent
    package = __name__.rpartition(".")[0]
    texts = {f"{package}.{name}": (here / f"{name}.py").read_text(encoding="utf-8") for name in INSIDE}
    parents = [package.rpartition(".")[0], package]
    return (
        f"import sys, types\nfor name in {parents!r}: sys.modules[name] = types.ModuleType(name)\n"
        f"for name, text in {texts!r}.items():\n"
        "    module = sys.modules[name] = types.ModuleType(name)\n"
        "    setattr(sys.modules[name.rpartition('.')[0]], name.rpartition('.')[2], module)\n"
        "    exec(compile(text, name, 'exec'), module.__dict__)\n"
        "module.main(int(sys.argv.pop()))\n"
    )


class WorkerEnded(Exception):
    """A worker has ended instead of running a program."""


class Worker:
    """One worker. Raises OSError if the system cannot start it."""

    def __init__(self, setup: Setup) -> None:
        if setup.command and not setup.command[0]:
            raise OSError("bubblewrap (the program bwrap) is not installed")
        self.setup = setup
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the worker
        python = [interpreter(), "-I", "-S", "-B", "-X", "utf8", "-c", program(), str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                [*setup.command, *python],
                stdin=subprocess.DEVNULL,
                stdout=self._messages,
                stderr=self._messages,
                env={},
                close_fds=True,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def problem(self) -> str:
        """Waits until it is ready; why it is not, or nothing."""
        self.control.settimeout(START_S)
        try:
            self.control.send(json.dumps(dict(self.setup.settings)).encode())
            reply = json.loads(self.control.recv(1 << 16) or b"null")
        except TimeoutError:
            return f"it was not ready after {START_S:g} s"
        except OSError:
            reply = None
        if reply is None:
            return self._said() or "it ended at once"
        self.control.settimeout(None)
        return str(reply.get("problem", ""))

    def _said(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._messages.seek(0)
        lines = self._messages.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else ""

    def ask(self, job: Mapping[str, Any], descriptors: Sequence[int]) -> None:
        """Gives it a program. Raises WorkerEnded."""
        try:
            socket.send_fds(self.control, [json.dumps(job).encode()], list(descriptors))
        except ConnectionError:
            raise WorkerEnded from None

    def reply(self) -> dict[str, Any]:
        """What it says of the program; empty if it has ended instead."""
        try:
            return json.loads(self.control.recv(1 << 16) or b"{}")
        except ConnectionError:
            return {}

    def is_busy(self) -> bool:
        """Whether a program wants to compute, and does not sleep or wait."""
        with contextlib.suppress(psutil.Error):
            inside = psutil.Process(self._process.pid).children(recursive=True)
            parents = {process.ppid() for process in inside}
            states = (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)
            return any(process.status() in states for process in inside if process.pid not in parents)
        return False

    def kill(self) -> None:
        """Ends it and everything in it."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self.control.close()
        self._process.wait()
        self._messages.close()
