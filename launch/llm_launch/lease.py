"""The right to train in a run folder: two runs in one folder would log steps twice and overwrite each other's
state.

A lock file decides among the processes of one machine (``flock``, which ends with its process). Machines that share the
folder may not share locks, so the holder also writes a record that it counts up every few seconds; a process
of another machine that wants the folder watches the record by its own clock and takes over when it stands still. A
holder that finds another's record in place of its own, after having been stopped or cut off for that long, ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType

from llm_launch.variables import number_in
from llm_parallel.errors import UserError
from llm_parallel.files import atomic_write, open_own, read_json, refuse_planted
from llm_parallel.lines import note

RECORD_NAME, LOCK_NAME = "lease.json", ".lease.lock"
RECORD_BYTES = 512
BEAT_S = 5.0
DEAD_BEATS = 3.5
"""Beats that a holder may miss: a shared file system may stall for seconds."""


@dataclass(frozen=True)
class Holder:
    """Who holds a run folder. boot: of its machine's kernel; job, start: of SLURM, empty and 0 outside; beats: counted
    up as long as it lives."""

    host: str
    pid: int
    boot: str
    since: str
    token: str
    job: str = ""
    start: int = 0
    beats: int = 0

    def describe(self) -> str:
        """For a sentence."""
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"

    def encode(self) -> bytes:
        """The record: one line of ``RECORD_BYTES``."""
        return json.dumps(asdict(self)).encode().ljust(RECORD_BYTES - 1) + b"\n"


class Lease:
    """The right to train in ``run_dir``, as a context. Entering makes the folder; it raises UserError if another
    process has it, if it cannot be written, and if a stranger made it in a folder that everyone may write to."""

    def __init__(
        self,
        run_dir: Path,
        environment: Mapping[str, str] = os.environ,
        lost: Callable[[str], None] | None = None,
    ) -> None:
        self.path, self._lock_path = run_dir / RECORD_NAME, run_dir / LOCK_NAME
        self.holder = Holder(
            os.uname().nodename[:200],
            os.getpid(),
            _boot(),
            datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
            secrets.token_hex(8),
            environment.get("SLURM_JOB_ID", "")[:40],
            number_in(environment, "SLURM_RESTART_COUNT", 0),
        )
        self._lost = lost or _end_at_once
        self._over = threading.Event()
        self._lock: int | None = None
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            refuse_planted(folder)
            self._lock = self._take_lock()
            self._take()
        except OSError as error:
            self._let_go()
            raise UserError(
                f"run_dir = {folder} cannot be written ({error.strerror}); give a folder that can be"
            ) from None
        except BaseException:
            self._let_go()
            raise
        self._thread.start()
        return self

    def _take(self) -> None:
        found = read_holder(self.path)
        if found is None and self.path.exists():  # read while it was written
            time.sleep(BEAT_S / 5)
            found = read_holder(self.path)
        if found is not None and self._may_live(found):
            raise _in_use(self.path.parent, found)
        with atomic_write(self.path, "wb") as handle:
            handle.write(self.holder.encode())

    def _let_go(self) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(timeout=BEAT_S)  # a file system that stalls holds nobody up
        with contextlib.suppress(OSError):
            found = read_holder(self.path)
            if found is not None and found.token == self.holder.token:
                self.path.unlink()
        self._let_go()

    def _take_lock(self) -> int:
        """Descriptor of the lock file, locked where locks are."""
        fd = open_own(self._lock_path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(fd)
                raise _in_use(self.path.parent, read_holder(self.path)) from None
        return fd

    def _may_live(self, found: Holder) -> bool:
        """Whether the holder of a record may still train; if that is unknown, waits for a sign of life."""
        if found.boot == self.holder.boot:
            return False  # it would have the lock
        if found.job and found.job == self.holder.job and found.start < self.holder.start:
            return False  # SLURM starts a job again when its last start has ended
        wait_s = DEAD_BEATS * BEAT_S
        note(f"{self.path} names {found.describe()}; watching for {wait_s:.0f} s whether that run is alive")
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline:
            time.sleep(BEAT_S / 5)
            now = read_holder(self.path)
            if now is None and not self.path.exists():
                return False
            if now is not None and now != found:
                return True
        return False

    def _beat(self) -> None:
        """Counts up, and ends this process when another one has taken the folder."""
        wait_s = BEAT_S / 5  # of two that took a dead holder's place at the same moment, one learns it soon
        while not self._over.wait(wait_s):
            wait_s = BEAT_S
            with contextlib.suppress(OSError):
                found = read_holder(self.path)
                if found is not None and found.token != self.holder.token:
                    self._lost(
                        f"run_dir = {self.path.parent} was taken over by {found.describe()}; this run ends, and its"
                        " last saved state stays"
                    )
                    return
                self._lock_again()
                self.holder = replace(self.holder, beats=self.holder.beats + 1)
                self._write(new=found is None)

    def _lock_again(self) -> None:
        """Makes and takes the lock file anew if somebody has deleted it, with the run folder perhaps: a lock on a file
        that has no name keeps nobody out."""
        assert self._lock is not None
        if os.fstat(self._lock).st_nlink and self._lock_path.exists():
            return
        fd = open_own(self._lock_path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)  # another process was faster; its record tells this one to end
            return
        os.close(self._lock)
        self._lock = fd

    def _write(self, new: bool) -> None:
        """In place: a reader on another machine would see a file that was replaced only later."""
        fd = os.open(
            self.path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW | (os.O_CREAT | os.O_EXCL if new else 0), 0o644
        )
        try:
            os.pwrite(fd, self.holder.encode(), 0)
            os.fsync(fd)
        finally:
            os.close(fd)


def refuse_if_held(run_dir: Path) -> None:
    """Raises UserError if a process of this machine holds ``run_dir``; says it if one of another machine may. Takes
    nothing."""
    found = read_holder(run_dir / RECORD_NAME)
    if found is None:
        return
    if found.boot != _boot():
        if not found.job:  # what SLURM knows of its jobs says more
            note(f"run_dir = {run_dir} is in use by {found.describe()}, or that run was killed; a second is refused")
        return
    with contextlib.suppress(OSError):
        fd = open_own(run_dir / LOCK_NAME, os.O_RDWR)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(run_dir, found) from None
        finally:
            os.close(fd)


def _in_use(run_dir: Path, found: Holder | None) -> UserError:
    who = found.describe() if found is not None else "another process"
    return UserError(
        f"run_dir = {run_dir} is in use by {who}; end that run first, or give another run_dir (if it is certainly gone,"
        f" remove {run_dir / RECORD_NAME} and start again)"
    )


def read_holder(path: Path) -> Holder | None:
    """The holder that a record names; None if there is none, or it is damaged."""
    try:
        return Holder(**read_json(path))
    except (OSError, ValueError, TypeError):
        return None


def _boot() -> str:
    """What tells this machine, since it was switched on, from all others."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return os.uname().nodename


def _end_at_once(text: str) -> None:
    note(text)
    os._exit(1)
