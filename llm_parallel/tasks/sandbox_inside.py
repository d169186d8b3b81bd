"""What runs inside the sandbox: a supervisor, which forks a process for each program and another for its tests.

Only the standard library is imported: the text of this file is given to an interpreter that sees nothing else. The
supervisor holds no secret that a program could find in the memory that it inherits: source, input and tests come as
descriptors, which only the process that needs them reads."""

from __future__ import annotations

import ast
import atexit
import builtins
import contextlib
import gc
import importlib
import io
import json
import os
import resource
import select
import signal
import socket
import sys
import threading
import traceback
import types
from collections.abc import Callable, Mapping
from typing import Any

from llm_parallel.tasks import sandbox_confine as confine
from llm_parallel.tasks.sandbox_calls import Gone, Peer

REASON_LENGTH = 300
MOST_FILES = 1000


def main(descriptor: int) -> None:
    """Confines itself, says that it is ready, and does what the parent asks until that goes away. descriptor: the
    socket to the parent."""
    control = socket.socket(fileno=descriptor)
    settings = json.loads(control.recv(1 << 16))
    try:
        prepare(settings)
    except OSError as error:
        control.sendall(json.dumps({"problem": str(error)}).encode())
        return
    control.sendall(b"{}")
    gc.collect()
    gc.freeze()
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 4096, 8)
        if not message:
            return
        control.sendall(json.dumps(do(settings, json.loads(message), descriptors, control)).encode())


def prepare(settings: Mapping[str, Any]) -> None:
    """Gives up what the supervisor itself does not need either. Raises OSError."""
    sys.path += settings["packages"]
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]  # which an interpreter without site lacks
    with contextlib.suppress(ImportError):
        for name in settings["imports"]:
            importlib.import_module(name)
    if settings["uid"] is not None:
        confine.become(settings["uid"], settings["keep_reading"])
    confine.prctl(1, signal.SIGKILL)  # it ends with the thread that started it
    if settings["confined"]:
        confine.no_new_privileges()
    if settings["readable"] is not None:
        os.chdir("/")
        confine.install_landlock(settings["readable"])


def do(
    settings: Mapping[str, Any], job: Mapping[str, Any], descriptors: list[int], control: socket.socket
) -> dict[str, Any]:
    """Runs one program, with or without tests, and says how it ended."""
    source, given, out, err = descriptors[:4]
    verdict = descriptors[4] if job["tested"] else None
    ours, theirs = socket.socketpair() if job["tested"] else (None, None)

    def answer() -> None:
        control.close()
        for descriptor in [given, verdict] if verdict is not None else []:
            os.close(descriptor)
        if ours is not None and theirs is not None:
            ours.close()
            serve(read_all(source), theirs, settings, (out, err))
        else:
            run(read_all(source), given, settings, (out, err))

    def tester() -> None:
        assert ours is not None and theirs is not None and verdict is not None
        control.close()
        theirs.close()
        confined(settings, (out, err), None)
        test(json.loads(read_all(given)), ours, verdict)

    program = start(answer)
    examiner = start(tester) if verdict is not None else None
    for descriptor in descriptors:
        os.close(descriptor)
    for end in (ours, theirs):
        if end is not None:
            end.close()
    examined = 0
    if examiner is not None:
        crowded = wait(examiner, settings)
        if crowded:
            os.kill(examiner, signal.SIGKILL)
        _, examined = os.waitpid(examiner, 0)
        # A program that died by a limit of its own has become a zombie by now, or does so before it is killed.
        os.kill(program, signal.SIGKILL)
    elif crowded := wait(program, settings):
        os.kill(program, signal.SIGKILL)
    _, status, usage = os.wait4(program, 0)
    return {
        "exit": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
        "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "tests_signal": os.WTERMSIG(examined) if os.WIFSIGNALED(examined) else None,
        "crowded": crowded,
        "clean": used_files(settings) <= 1,
    }


def start(work: Callable[[], None]) -> int:
    """A child that does ``work`` and ends. It dies with the supervisor."""
    supervisor = os.getpid()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        with contextlib.suppress(OSError):
            confine.prctl(1, signal.SIGKILL)
        if os.getppid() == supervisor:
            work()
            code = 0
    except BaseException:
        with contextlib.suppress(BaseException):
            os.write(2, traceback.format_exc(limit=3).encode(errors="replace"))
    finally:
        os._exit(code)


def wait(process: int, settings: Mapping[str, Any]) -> bool:
    """Waits for a child without taking its status. Returns whether the private folder holds too many files by then."""
    if settings["folder"] is None:
        os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
        return False
    handle = None
    poller = select.poll()
    try:
        with contextlib.suppress(OSError):  # before Linux 5.3 the poll is nothing but a pause
            handle = os.pidfd_open(process)
            poller.register(handle, select.POLLIN)
        while os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            if used_files(settings) > MOST_FILES:
                return True
            poller.poll(50)
        return False
    finally:
        if handle is not None:
            os.close(handle)


def used_files(settings: Mapping[str, Any]) -> int:
    """Files and folders in the private folder, itself included."""
    if settings["folder"] is None:
        return 0
    found = os.statvfs(settings["folder"])
    return found.f_files - found.f_ffree


def read_all(descriptor: int) -> str:
    """The text of a file that is open, which is then closed."""
    with os.fdopen(descriptor, "rb") as file:
        file.seek(0)
        return file.read().decode("utf-8", "surrogatepass")


def confined(settings: Mapping[str, Any], outputs: tuple[int, int], given: int | None) -> None:
    """Standard streams, limits and the filter of system calls of a child."""
    null = os.open(os.devnull, os.O_RDONLY) if given is None else given
    os.dup2(null, 0)
    os.dup2(outputs[0], 1)
    os.dup2(outputs[1], 2)
    for descriptor in {null, *outputs} - {0, 1, 2}:
        os.close(descriptor)
    for name, value in settings["limits"].items():
        soft, hard = value
        limit = getattr(resource, name)
        most = resource.getrlimit(limit)[1]
        if most != resource.RLIM_INFINITY:
            soft, hard = min(soft, most), min(hard, most)
        resource.setrlimit(limit, (soft, hard))
    if settings["confined"]:
        confine.prctl(4, 0)  # other processes of this user cannot read its memory
        confine.install_filter(settings["folder"] is not None)
    # Python's own streams were those of the supervisor.
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0)), encoding="utf-8", errors="surrogateescape")
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w")), encoding="utf-8", errors="replace")
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(io.FileIO(2, "w")), encoding="utf-8", errors="replace", line_buffering=True
    )
    for name in ("stdin", "stdout", "stderr"):
        setattr(sys, f"__{name}__", getattr(sys, name))
    signal.signal(signal.SIGINT, signal.default_int_handler)


def namespace(name: str) -> dict[str, Any]:
    """The globals of a new module that ``sys.modules`` knows, as dataclasses and the like expect."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    return module.__dict__


def compiled(sources: str) -> types.CodeType:
    """The first of the sources (a list as JSON) that is Python. Raises what is wrong with the first if none is."""
    texts = json.loads(sources)
    for text in texts:
        with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
            return compile(text, "<program>", "exec")
    return compile(texts[0], "<program>", "exec")


def run(sources: str, given: int, settings: Mapping[str, Any], outputs: tuple[int, int]) -> None:
    """Runs a program as a script: the exit status is Python's."""
    confined(settings, outputs, given)
    code = 0
    try:
        exec(compiled(sources), namespace("__main__"))
    except SystemExit as ended:
        code = exit_status(ended)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(code)


def exit_status(ended: SystemExit) -> int:
    """What ``sys.exit`` was called with, as Python makes a status of it."""
    if ended.code is None or isinstance(ended.code, int):
        return (ended.code or 0) & 0xFF
    sys.stderr.write(f"{ended.code}\n")
    return 1


def serve(sources: str, calls: socket.socket, settings: Mapping[str, Any], outputs: tuple[int, int]) -> None:
    """Runs a program, then whatever of it the tests call."""
    confined(settings, outputs, None)
    values = namespace("answer")
    peer = Peer(calls, values, open_to_others=True)

    def load() -> None:
        exec(compiled(sources), values)

    peer.reply(load)
    peer.serve()


def test(job: Mapping[str, Any], calls: socket.socket, verdict: int) -> None:
    """Runs the tests of a program that another process serves, and writes what came of each assertion, a line of JSON
    each; the last has ``done``."""

    def say(**words: Any) -> None:
        os.write(verdict, json.dumps(words).encode() + b"\n")

    peer = Peer(calls, {}, open_to_others=False)
    outcomes = Outcomes(say, job["stop_early"])
    values = namespace("tests")
    try:
        tree = ast.parse(job["tests"])
        exec(compile(job["setup"], "<setup>", "exec"), values)
    except (SyntaxError, ValueError) as error:
        say(broken=f"the tests are no Python: {error}"[:REASON_LENGTH], done=True)
        return
    except Exception as error:
        text = f"what stands before the tests raises {type(error).__name__}: {error}"
        say(broken=text[:REASON_LENGTH], done=True)
        return
    say(total=sum(isinstance(node, ast.Assert) for node in ast.walk(tree)))
    try:
        peer.result()
        fill(values, peer, tree, job["entry_point"])
        values[COUNTED] = outcomes
        code = compile(ast.fix_missing_locations(Counting().visit(tree)), "<tests>", "exec")
        exec(code, values)
    except Enough:
        pass
    except BaseException as error:
        outcomes.failed(error)
    say(done=True)


def fill(values: dict[str, Any], peer: Peer, tree: ast.Module, entry_point: str | None) -> None:
    """Gives the tests the names that they use and neither define nor get from Python: modules of the standard library,
    and what the program defines."""
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    for name in used & set(sys.stdlib_module_names) - values.keys() - {entry_point}:
        values[name] = importlib.import_module(name)
    wanted = sorted(name for name in used if name not in values and not hasattr(builtins, name))
    if entry_point is not None:
        wanted.append(entry_point)
    found = peer.names(sorted(set(wanted) - {COUNTED}))
    if not found:  # a program may be asked to write Python's own sum anew; otherwise tests have Python's
        found = peer.names(sorted(name for name in used - values.keys() if hasattr(builtins, name)))
    if entry_point is not None:
        if entry_point not in found:
            raise NameError(f"the program does not define {entry_point}")
        values.setdefault("candidate", found[entry_point])
        values["candidate"] = found[entry_point]
    values.update(found)


COUNTED = "_outcomes_of_the_tests"


class Enough(BaseException):
    """The first failure ends the tests."""


class Outcomes:
    """Counts assertions: ``with outcomes: assert …``."""

    def __init__(self, say: Callable[..., None], stop_early: bool) -> None:
        self._say, self._stop_early, self._gone = say, stop_early, False

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        if error is None:
            self._say(ok=True)
            return False
        if isinstance(error, Enough) or not isinstance(error, Exception):
            return False
        self.failed(error)
        return True

    def failed(self, error: BaseException) -> None:
        """An assertion that does not hold, or what keeps the tests from going on."""
        kind, text = type(error).__name__, str(error)
        self._say(ok=False, kind=kind, reason=f"{kind}: {text}"[:REASON_LENGTH] if text else kind)
        if self._stop_early or isinstance(error, Gone):
            raise Enough


class Counting(ast.NodeTransformer):
    """Puts each assertion into ``with outcomes``."""

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        """The assertion, counted."""
        counted = ast.withitem(ast.Name(COUNTED, ast.Load()))
        return ast.copy_location(ast.With([counted], [node]), node)
