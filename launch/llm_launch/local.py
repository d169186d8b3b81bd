"""The processes of a run on this machine: starts them, ends them together, and says once why they failed."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from llm_launch.worker import EXIT_CRASH, error_path
from llm_parallel.errors import EXIT_STOPPED, EXIT_USER_ERROR, UserError
from llm_parallel.files import open_to_append, read_json
from llm_parallel.lines import note, reader_is_gone

POLL_S = 0.05
SETTLE_S = 1.0
"""Time for the other processes to end and report by themselves after one failed: theirs may be the cause."""
PR_SET_PDEATHSIG = 1
LOOPBACK = "127.0.0.1"
ON_LOOPBACK = "LLM_PARALLEL_LOOPBACK"
"""Variable that says that all processes of the run are on this machine, so that their store need not be reached from
another."""

_REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# A process that dies of these died of its own; SIGABRT and SIGTERM are also how libraries end after a peer's death.
_OWN_DEATH = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}


@dataclass
class _Worker:
    rank: int
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int
    ended: bool = False

    @property
    def status(self) -> int:
        """Exit status after the end; minus the signal's number if one ended it."""
        return self.process.returncode

    def poll(self) -> bool:
        """Whether the process has ended; what it started itself ends with it."""
        if self.ended:
            return True
        # Not reaped yet, so that its number cannot belong to another group of processes while we kill its children.
        if os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return False
        self._kill_group()
        self.process.wait()
        self.ended = True
        return True

    def terminate(self) -> None:
        """Asks the process, but not its helpers, to save and end."""
        if not self.ended:
            os.kill(self.process.pid, signal.SIGTERM)  # Popen's own would reap a process that has just ended

    def kill(self) -> None:
        """Ends the process and what it started."""
        if not self.ended:
            self._kill_group()
            self.process.wait()
            self.ended = True

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def last_log_line(self) -> str:
        """Last line that this attempt wrote into its log."""
        try:
            with self.log.open("rb") as handle:
                size = handle.seek(0, os.SEEK_END)
                handle.seek(max(self.log_start, size - 65536))
                lines = handle.read().decode("utf-8", "replace").split("\n")
        except OSError:
            return ""
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


@dataclass
class _Signals:
    """Requests to end that came while the workers ran."""

    received: list[int] = field(default_factory=list)

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Collects the signals inside the block instead of ending the launcher; an ignored one (nohup) stays so."""
        wanted = [number for number in _REQUESTS if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._note) for number in wanted}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received.append(number)


def meeting_here() -> tuple[str, int] | None:
    """Address and port at which the processes of ``launch_local`` meet, by the environment that it gave this one; None
    if it did not start this process."""
    if not os.environ.get(ON_LOOPBACK):
        return None
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def launch_local(
    num_processes: int,
    argv: Sequence[str],
    log_dir: Path,
    *,
    env: Mapping[str, str] | None = None,
    grace_s: float = 10.0,
    at_once: int | None = None,
) -> int:
    """Runs ``python ARGV`` ``num_processes`` times as the ranks of one run, and returns the exit status for the whole.

    ``argv`` is what follows the interpreter, for example ``["-m", "llm_parallel.worker", path]``. ``env`` is
    the environment to start from (this process's if not given); ``MASTER_PORT`` in it is used if free.
    ``at_once``: how many compute at the same time and share the cores; all if None.

    Rank 0 writes its standard output to this terminal; its errors and all that the others write go to
    ``log_dir/rank_N.log`` (appended). If one process fails, the others get SIGTERM and after ``grace_s`` seconds
    SIGKILL, and one message says why: the sentence of a UserError (status 2), else the rank, the last line of its error
    and its log (status 1). SIGTERM, SIGHUP and the first SIGINT are passed on as SIGTERM, so that the workers save; the
    next SIGINT kills. If this process dies, the workers die too (Linux).

    Returns 0 if all processes did; ``EXIT_STOPPED`` if some ended with that and the others with 0; 128 plus the
    signal's number if they were ended on request without finishing.
    Raises UserError if ``log_dir`` cannot be written or ``MASTER_PORT`` is in use.
    """
    assert num_processes > 0
    base = dict(os.environ if env is None else env)
    _prepare_log_dir(log_dir)
    with _held_port(base.get("MASTER_PORT")) as port:
        common = {
            **base,
            **worker_defaults(base, at_once or num_processes),
            "MASTER_ADDR": LOOPBACK,
            "MASTER_PORT": str(port),
            ON_LOOPBACK: "1",
        }
        signals = _Signals()
        workers: list[_Worker] = []
        with signals.caught():
            try:
                for rank in range(num_processes):
                    workers.append(_start(rank, num_processes, argv, log_dir, common))
                failed = _wait(workers, signals, grace_s)
            finally:
                for worker in workers:
                    worker.kill()
    if failed:
        return _explain(workers, failed, log_dir)
    statuses = {worker.status for worker in workers}
    if statuses <= {0, EXIT_STOPPED}:
        return max(statuses)
    last = signal.Signals(signals.received[-1])
    note(f"ended by {last.name} before all processes could finish")
    return 128 + last


def _prepare_log_dir(log_dir: Path) -> None:
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        for old in log_dir.glob("error_rank_*.json"):
            old.unlink()
    except OSError as error:
        raise UserError(f"log folder {log_dir} cannot be written ({error.strerror}); choose another run_dir") from None


@contextlib.contextmanager
def _held_port(wanted: str | None) -> Iterator[int]:
    """A free port that stays ours until rank 0 listens on it, and after.

    The socket is bound with SO_REUSEADDR and does not listen: torch's store, which sets that option too, can still
    listen on the port, while the kernel gives it to nobody else as long as the socket is open.
    """
    if wanted is not None and not (wanted.isdecimal() and 0 < int(wanted) < 65536):
        raise UserError(f"environment variable MASTER_PORT = {wanted!r} must be a number from 1 to 65535")
    family, address = (socket.AF_INET6, "::") if socket.has_dualstack_ipv6() else (socket.AF_INET, "0.0.0.0")
    with socket.socket(family, socket.SOCK_STREAM) as holder:
        if family == socket.AF_INET6:
            holder.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            holder.bind((address, int(wanted or 0)))
        except OSError as error:
            raise UserError(
                f"port MASTER_PORT = {wanted} cannot be used ({error.strerror}); unset MASTER_PORT to have a free one"
                " chosen, or name a free one"
            ) from None
        yield holder.getsockname()[1]


def worker_defaults(base: Mapping[str, str], num_processes: int) -> dict[str, str]:
    """Settings that workers on one machine need unless the user chose others."""
    defaults = {
        "OMP_NUM_THREADS": str(max(1, available_cores() // num_processes)),
        "PYTHONUNBUFFERED": "1",  # the last lines before a kill are the ones that matter
        "PYTHONFAULTHANDLER": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # megatron-core's tensor-parallel overlap relies on the order of launches
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # without it train.deterministic is refused by cuBLAS
    }
    if sys.platform == "linux":
        defaults["GLOO_SOCKET_IFNAME"] = "lo"  # host names that do not resolve stop gloo otherwise
    return {name: value for name, value in defaults.items() if name not in base}


def available_cores() -> int:
    """CPU cores that this process may use: its affinity, or the quota of its control group if that is less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


def _start(rank: int, num_processes: int, argv: Sequence[str], log_dir: Path, common: Mapping[str, str]) -> _Worker:
    environment = {
        **common,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
    }
    log = log_dir / f"rank_{rank}.log"
    try:
        handle = os.fdopen(open_to_append(log), "ab")
    except OSError as error:
        raise UserError(f"log {log} cannot be written ({error.strerror}); choose another run_dir") from None
    with handle:
        process = subprocess.Popen(
            [sys.executable, *argv],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=None if rank == 0 else handle,
            stderr=handle,
            start_new_session=True,  # Ctrl-C reaches the launcher alone, which decides what the workers get
            preexec_fn=_die_with_parent(os.getpid()),
        )
        return _Worker(rank, process, log, handle.tell())


def _die_with_parent(parent: int) -> Any:
    """What a worker does before it becomes Python: asks the kernel for SIGKILL when the launcher dies."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # looked up here: little is safe between fork and exec

    def set_up() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)

    return set_up


def _wait(workers: list[_Worker], signals: _Signals, grace_s: float) -> list[_Worker]:
    """Waits for the end of all; returns the workers that failed, in the order in which that was seen."""
    failed: list[_Worker] = []
    passed_on, unheard = 0, False
    terminate_at = kill_at = math.inf
    while running := [worker for worker in workers if not worker.ended]:
        if time.monotonic() >= kill_at:
            for worker in running:
                worker.kill()
            break
        if time.monotonic() >= terminate_at:
            terminate_at = math.inf
            for worker in running:
                worker.terminate()
        ended_badly = [worker for worker in running if worker.poll() and worker.status not in (0, EXIT_STOPPED)]
        if not signals.received:
            failed += ended_badly
        else:  # one that SIGTERM ended before it could handle it did as it was told
            failed += [worker for worker in ended_badly if worker.status != -signal.SIGTERM]
        if ended_badly and kill_at == math.inf:  # the others may wait for it in a collective for ever
            terminate_at = time.monotonic() + SETTLE_S
            kill_at = terminate_at + grace_s
        if not unheard and reader_is_gone(1):  # nobody reads the output any more: save and end
            unheard = True
            signals.received.append(signal.SIGPIPE)
        if len(signals.received) > passed_on:
            passed_on = len(signals.received)
            if signals.received.count(signal.SIGINT) > 1:
                kill_at = -math.inf
            else:
                for worker in workers:
                    worker.terminate()
        time.sleep(POLL_S)
    return failed


def _explain(workers: list[_Worker], failed: list[_Worker], log_dir: Path) -> int:
    """Prints the one message about the failure that came first, and returns the exit status of the run."""
    reports = [report for worker in workers if (report := _read_report(log_dir, worker.rank))]
    reports.sort(key=lambda report: report["time"])
    user = next((report["message"] for report in reports if report["kind"] == "user"), None)
    if user is None and not reports:
        user = next((worker.last_log_line() for worker in failed if worker.status == EXIT_USER_ERROR), None)
    if user:
        note(user)
        return EXIT_USER_ERROR
    dead = next((worker for worker in failed if worker.status < 0 and -worker.status in _OWN_DEATH), None)
    if dead is None and reports:
        culprit = workers[reports[0]["rank"]]
        reason = "failed: " + reports[0]["message"].splitlines()[-1]
    else:
        culprit = dead or failed[0]
        reason = _how_it_ended(culprit)
    note(f"rank {culprit.rank} of {len(workers)} {reason} (log: {culprit.log})")
    return EXIT_CRASH


def _how_it_ended(worker: _Worker) -> str:
    if worker.status >= 0:
        how = f"ended with status {worker.status}"
    else:
        how = f"was ended by {signal.Signals(-worker.status).name}"
        if worker.status == -signal.SIGKILL:
            how += ", as the kernel does when memory runs out"
    line = worker.last_log_line()
    return how + (f"; its last line was: {line}" if line else "")


def _read_report(log_dir: Path, rank: int) -> dict[str, Any] | None:
    try:
        return read_json(error_path(log_dir, rank))
    except (OSError, ValueError):
        return None
