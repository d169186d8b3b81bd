"""The sandbox in every mode that works on this machine: what is contained, what passes, and what cannot be forged."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import psutil
import pytest

from llm_parallel.errors import UserError
from llm_parallel.tasks import sandbox_confine as confine
from llm_parallel.tasks.sandbox import Limits, Running, Sandbox, SandboxFailed, Script, Tested
from llm_parallel.tasks.sandbox_worker import Worker, WorkerEnded, setups
from tests.support.attacks import CHEATS, FILES, NETWORK, PROCESSES, SLOW, TESTS, USE, Attack

pytestmark = pytest.mark.processes
LIMITS = Limits(memory_bytes=256 << 20, output_bytes=100_000)


WAYS = [
    "bwrap",
    "landlock",
    # What root falls back on, and what other users have from the beginning.
    pytest.param("bwrap 1", marks=pytest.mark.slow),
    pytest.param("landlock 1", marks=pytest.mark.slow),
    pytest.param("bwrap 2", marks=pytest.mark.slow),  # an old bubblewrap
]


def opened(way: str, limits: Limits) -> Sandbox:
    """A sandbox in a mode; with a number, in the second way to have that mode."""
    mode, _, place = way.partition(" ")
    with pytest.MonkeyPatch.context() as patch:
        if place:
            if len(list(setups([mode], limits, []))) <= int(place):
                pytest.skip("other users than root have fewer ways")
            patch.setattr("llm_parallel.tasks.sandbox.setups", lambda *given: list(setups(*given))[int(place) :])
        try:
            return Sandbox(mode, limits, workers=1)  # type: ignore[arg-type]
        except SandboxFailed as error:
            pytest.skip(f"{mode} does not work here: {error}")


ENDLESS = ("processor time", "processor time, signals caught")
"""Of the attacks on time those that compute: they end when they have had their processor time."""


@pytest.fixture(scope="module", params=WAYS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """A sandbox that leaves a program much time, on a machine that others use too."""
    with opened(request.param, LIMITS) as found:
        yield found


@pytest.fixture(scope="module", params=WAYS)
def hasty(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with opened(request.param, Limits(cpu_s=1, wall_s=1.5)) as found:
        yield found


@pytest.fixture(scope="module", params=WAYS)
def short_of_processor(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """One in which a program ends by its processor time, however little of the processor it gets."""
    with opened(request.param, Limits(cpu_s=1, wall_s=30)) as found:
        yield found


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the attacks are after."""
    folder = tmp_path_factory.mktemp("outside")
    folder.chmod(0o777)
    secret = folder / "secret"
    secret.write_text("the user's own")
    secret.chmod(0o666)
    short = Path("/tmp") / f"sandbox-{os.getpid()}"
    names = {"abstract": f"sandbox-{os.getpid()}", "datagrams": f"sandbox-{os.getpid()}-datagrams"}
    bystander = subprocess.Popen(["sleep", "600"])
    memory = SharedMemory(create=True, size=16)
    libc = ctypes.CDLL(None)
    shared = libc.shmget(0x5A4D, 4096, 0o1666)
    held = os.open(secret, os.O_RDWR)
    os.set_inheritable(held, True)
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix, socket.socket(socket.AF_UNIX) as hidden:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
            tcp.bind(("127.0.0.1", 0))
            unix.bind(str(short))
            hidden.bind("\0" + names["abstract"])
            datagrams.bind("\0" + names["datagrams"])
            for one in (tcp, unix, hidden):
                one.listen()
            for one in (tcp, unix, hidden, datagrams):
                one.setblocking(False)
            held_outside = {"secret": str(secret), "folder": str(folder), "port": tcp.getsockname()[1], **names}
            yield held_outside | {
                "socket": str(short),
                "pid": bystander.pid,
                "memory": memory.name,
                "shared": 0x5A4D,
                "listening": (tcp, unix, hidden, datagrams),
                "bystander": bystander,
            }
    libc.shmctl(shared, 0, None)
    memory.close()
    memory.unlink()
    short.unlink()
    os.close(held)
    bystander.kill()
    bystander.wait()


def check_outside(outside: dict[str, Any]) -> None:
    """Nothing outside has changed, and nobody has called."""
    assert Path(outside["secret"]).read_text() == "the user's own"
    assert Path(outside["secret"]).stat().st_mtime > 1
    assert [path.name for path in Path(outside["folder"]).iterdir()] == ["secret"]
    assert outside["bystander"].poll() is None
    for listening in outside["listening"]:
        with pytest.raises(BlockingIOError):
            listening.recv(1) if listening.type == socket.SOCK_DGRAM else listening.accept()


@pytest.mark.parametrize("name", [*FILES, *NETWORK, *PROCESSES, *USE])
def test_attacks_do_not_get_through(
    name: str, sandbox: Sandbox, outside: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_THE_USER", "1")
    attack: Attack = {**FILES, **NETWORK, **PROCESSES, **USE}[name]
    if "libc.syscall" in attack.source and platform.machine() != "x86_64":
        pytest.skip("its system calls have other numbers here")
    result = sandbox.run(Script(attack.source.format(**outside) if "{" in attack.source else attack.source))
    assert "THROUGH" not in result.output, result
    assert result.mode == sandbox.mode
    if attack.status is not None:
        assert result.status == attack.status, result
    check_outside(outside)
    assert sandbox.run(Tested("def f(x): return x * x", TESTS)).status == "passed", "and the next program runs"


@pytest.mark.parametrize("name", [name for name in SLOW if name not in ENDLESS])
def test_attacks_on_time_end(name: str, hasty: Sandbox) -> None:
    check_that_it_ends(SLOW[name], hasty)


@pytest.mark.parametrize("name", ENDLESS)
def test_attacks_on_processor_time_end(name: str, short_of_processor: Sandbox) -> None:
    check_that_it_ends(SLOW[name], short_of_processor)


def check_that_it_ends(attack: Attack, sandbox: Sandbox) -> None:
    result = sandbox.run(Script(attack.source))
    assert "THROUGH" not in result.output
    assert result.status == attack.status, result


@pytest.mark.parametrize("name", CHEATS)
def test_a_wrong_program_does_not_pass(name: str, sandbox: Sandbox) -> None:
    result = sandbox.run(Tested(CHEATS[name], TESTS, entry_point="f" if len(name) % 2 else None))
    assert result.status in ("failed", "memory", "crashed") and result.passed == 0 and result.reason, result
    again = sandbox.run(Tested("def f(x): return x * x", TESTS))
    assert (again.status, again.passed, again.total) == ("passed", 2, 2)


def test_every_allowed_call_has_its_number() -> None:
    """The tables against the headers of the C library's package, where they are installed."""

    def numbers(header: str) -> dict[str, int]:
        path = Path("/usr/include") / header
        if not path.exists():
            pytest.skip(f"{path} is not installed (linux-libc-dev)")
        return {one[1]: int(one[2]) for one in re.finditer(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text())}

    x86, generic = numbers("x86_64-linux-gnu/asm/unistd_64.h"), numbers("asm-generic/unistd.h")
    conditional = {name: of for name, (of, _) in confine.CONDITIONAL.items()}
    for name, (first, second) in {**confine.PLAIN, **confine.FILES, **conditional, "clone3": confine.CLONE3}.items():
        assert x86[name] == first, name
        assert generic.get("fstatat" if name == "newfstatat" else name) == second, name


def test_a_filter_fits_the_kernel() -> None:
    for machine in range(2):
        for files in (True, False):
            program = confine.filter_program(4321, files, machine)
            assert len(program) % 8 == 0 and len(program) // 8 < 4096


def test_too_many_files_end_a_program() -> None:
    with opened("bwrap", LIMITS) as sandbox:
        assert sandbox.run(Script(USE["files by the million"].source)).status == "output"
        assert sandbox.run(Script("import os; assert os.listdir('/tmp') == []")).status == "passed"
        assert sandbox.run(Script("open('/tmp/left', 'w').write('x')")).status == "passed"
        assert sandbox.run(Script("import os; assert os.listdir('/tmp') == []")).status == "passed", "a new folder"


def test_what_works_in_a_program(sandbox: Sandbox) -> None:
    source = """
import asyncio, collections, threading, decimal, json, sqlite3, zoneinfo, contextlib, os, signal
found = []
thread = threading.Thread(target=found.append, args=(1,)); thread.start(); thread.join()
async def two(): await asyncio.sleep(0); return 2
found.append(asyncio.run(two()))
with contextlib.redirect_stdout(open(os.devnull, "w")): print("not seen")
os.kill(os.getpid(), 0)
signal.setitimer(signal.ITIMER_REAL, 0)
base = sqlite3.connect(":memory:"); base.execute("create table t (a)")
print(found, zoneinfo.ZoneInfo("UTC"), decimal.Decimal(1) / 8)
exit(0)
"""
    result = sandbox.run(Script(source))
    assert (result.status, result.output) == ("passed", "[1, 2] UTC 0.125\n"), result


def test_a_script_has_input_output_and_status(sandbox: Sandbox) -> None:
    result = sandbox.run(Script("import sys\nfor line in sys.stdin: print(line.strip()[::-1])", given="abc\nd\u00e4\n"))
    assert (result.status, result.exit, result.output) == ("passed", 0, "cba\n\u00e4d\n")
    failed = sandbox.run(Script("import sys; print('so far'); sys.exit('no')"))
    assert (failed.status, failed.exit, failed.reason, failed.output) == ("failed", 1, "no", "so far\n")
    raised = sandbox.run(Script("1 / 0"))
    assert (raised.status, raised.reason) == ("failed", "ZeroDivisionError: division by zero")
    assert "<program>" in raised.messages


VALUES = """
import collections, datetime, decimal, enum, fractions, math
class Colour(enum.IntEnum): red = 1
class Pair:
    def __init__(self, a, b): self.a, self.b = a, b
    def total(self): return self.a + self.b
def pairs(p): return [Pair(*one) for one in p]
def best(p): return max(one.total() for one in p)
def same(x): return x
def all_of_it():
    return [None, True, 1, -(1 << 80), 0.1, float("inf"), 1j, "\\ud800", b"\\0", [], (1, [2]), {1: {"a"}},
        frozenset([1]), range(3), collections.Counter("aa"), collections.OrderedDict(a=1), Colour.red,
        decimal.Decimal("0.10"), fractions.Fraction(1, 3), datetime.date(2026, 1, 2), datetime.timedelta(1),
        collections.namedtuple("P", "x y")(1, 2), collections.deque([1])]
def mapped(): return map(str, range(3))
def keys(): return {"a": 1}.keys()
def sort(x): x.sort()
def add(x, key): x[key] = 1
def apply(f, x): return f(x) + 1
def fails(): raise ValueError("no")
def own():
    class Own(Exception): pass
    raise Own("mine")
limit = 7
"""

COMPARED = """
import collections, datetime, decimal, fractions
from decimal import Decimal
assert all_of_it() == [None, True, 1, -(1 << 80), 0.1, float("inf"), 1j, "\\ud800", b"\\0", [], (1, [2]), {1: {"a"}},
    frozenset([1]), range(3), {"a": 2}, {"a": 1}, 1, Decimal("0.10"), fractions.Fraction(1, 3),
    datetime.date(2026, 1, 2), datetime.timedelta(1), (1, 2), collections.deque([1])]
assert [type(x) for x in all_of_it()][-2] is tuple
assert same(all_of_it()) == all_of_it()
assert math.isnan(same(float("nan")))
assert list(mapped()) == ["0", "1", "2"]
assert set(keys()) == {"a"} and keys() == {"a": 2}.keys()
x = [3, 1, 2]
sort(x)
assert x == [1, 2, 3]
d = {}
add(d, "k")
assert d == {"k": 1}
assert apply(lambda v: v * 2, 4) == 9
assert best([Pair(1, 2), Pair(3, 4)]) == 7
assert Pair(1, 2).total() == 3 and Pair(1, 2).a == 1
assert best(pairs([(1, 2)])) == 3
assert limit == 7
try:
    fails()
except ValueError as error:
    assert str(error) == "no"
else:
    assert False
try:
    own()
except Exception as error:
    assert "Own: mine" in str(error)
assert isinstance(same([1]), list)
"""


def test_values_cross_as_what_they_are(sandbox: Sandbox) -> None:
    result = sandbox.run(Tested(VALUES, COMPARED))
    assert result.status == "passed", result
    assert result.total == COMPARED.count("assert") == result.passed + 1, "one of them must not be reached"


def test_assertions_are_counted(sandbox: Sandbox) -> None:
    tests = (
        "def check(f):\n    assert f(1) == 1\n    assert f(2) == 3\n    for n in (3, 4):\n        assert f(n) == n\n"
    )
    tests += "check(candidate)\n"
    job = Tested("def g(x): return x", tests, entry_point="g", stop_early=False)
    result = sandbox.run(job)
    assert (result.status, result.passed, result.total, result.share) == ("failed", 3, 4, 0.75)
    early = sandbox.run(Tested("def g(x): return x", tests, entry_point="g"))
    assert (early.status, early.passed, early.total) == ("failed", 1, 3)
    late = sandbox.run(Tested("import os\ndef g(x): return x if x < 4 else os._exit(0)", tests, "", "g", False))
    assert (late.status, late.passed, late.total, late.reason) == (
        "failed",
        2,
        4,
        "AssertionError",
    )


def test_setup_and_names(sandbox: Sandbox) -> None:
    setup = "import math\ndef helper(x): return x + 1\ndef f(x):\n    'Doubles.'\n"
    assert sandbox.run(Tested("def f(x): return 2 * x", "assert helper(f(2)) == 5", setup, "f")).status == "passed"
    lies = "class math:\n    isclose = staticmethod(lambda *a: True)\ndef f(x): return 0"
    assert sandbox.run(Tested(lies, "assert math.isclose(f(2), 4)")).status == "failed", "the tests have Python's own"


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (Tested("x = 1", "assert (1"), "the tests are no Python"),
        (Tested("x = 1", "assert x == 1", setup="import nothing_like_this"), "what stands before the tests raises"),
    ],
)
def test_tests_that_are_none_are_an_error(job: Tested, said: str, sandbox: Sandbox) -> None:
    with pytest.raises(SandboxFailed, match=said):
        sandbox.run(job)
    assert sandbox.run(Tested("x = 1", "assert x == 1")).status == "passed"


def test_a_mode_that_does_not_work_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="has no mode 'docker'; it has auto, bwrap, landlock, unsafe"):
        Sandbox("docker")  # type: ignore[arg-type]
    monkeypatch.setattr("llm_parallel.tasks.sandbox_worker.shutil.which", lambda _: None)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SandboxFailed, match=r"bwrap: .*install bubblewrap"):
        Sandbox("bwrap")
    with opened("landlock", LIMITS), Sandbox(workers=1) as found:
        assert found.mode == "landlock" and "bwrap" in found.refused


def test_without_protection_limits_hold(tmp_path: Path) -> None:
    with Sandbox("unsafe", Limits(cpu_s=1, memory_bytes=256 << 20, output_bytes=1000), workers=1) as sandbox:
        assert sandbox.run(Tested("def f(x): return x * x", TESTS)).mode == "unsafe"
        assert sandbox.run(Script("x = bytearray(1 << 30)")).status == "memory"
        assert sandbox.run(Script("while True: print('x' * 100)")).status == "output"
        assert sandbox.run(Script("while True: pass")).status == "timeout"
        assert sandbox.run(Script(f"open({str(tmp_path / 'x')!r}, 'w')")).status == "passed"


def test_many_programs_at_once_have_their_own_results(sandbox: Sandbox) -> None:
    with Sandbox(sandbox.mode, LIMITS, workers=3) as three:
        jobs = [Script(f"print({number})") for number in range(12)]
        assert [one.output for one in three.run_many(jobs)] == [f"{number}\n" for number in range(12)]


def test_a_worker_that_was_killed_is_replaced(sandbox: Sandbox) -> None:
    sandbox.run(Script("pass"))
    (idle,) = sandbox._idle
    os.killpg(idle._process.pid, signal.SIGKILL)
    idle._process.wait()
    assert sandbox.run(Script("print(1)")).output == "1\n"


def test_programs_end_with_whoever_runs_them(sandbox: Sandbox, tmp_path: Path) -> None:
    """A program that sleeps is gone when the process that asked for it is killed."""
    source = (
        "import os, threading\n"
        "from llm_parallel.tasks.sandbox import Sandbox, Script\n"
        f"sandbox = Sandbox({sandbox.mode!r}, workers=1)\n"
        "sandbox.run(Script('pass'))\n"
        "threading.Thread(target=sandbox.run, args=(Script('import time; time.sleep(600)'),), daemon=True).start()\n"
        "while sandbox._idle: pass\n"
        f"open({str(tmp_path / 'told')!r}, 'w').write(str(os.getpid()))\n"
        "threading.Event().wait()\n"
    )
    with subprocess.Popen([sys.executable, "-c", source]) as asking:
        while not (tmp_path / "told").exists() and asking.poll() is None:
            psutil.Process(asking.pid).cpu_percent(0.05)
        started = psutil.Process(asking.pid).children(recursive=True)
        assert started
        asking.kill()
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not alive


def test_where_namespaces_are_forbidden_the_next_mode_holds() -> None:
    """As in a container whose root has no rights and may make no namespace."""
    tools = [shutil.which(name) for name in ("unshare", "setpriv")]
    shell = "echo 0 > /proc/sys/user/max_user_namespaces && exec setpriv --bounding-set=-all --inh-caps=-all"
    program = (
        "from llm_parallel.tasks.sandbox import Sandbox, Script\n"
        "with Sandbox(workers=1) as sandbox:\n"
        "    print(sandbox.mode, sandbox.refused)\n"
        "    print(sandbox.run(Script('open(\"/etc/passwd\")')).reason)\n"
        "    print(sandbox.run(Script('import os; os.fork()')).reason)\n"
        "    print(sandbox.run(Script('print(1)')).output)\n"
    )
    command = ["unshare", "-Ur", "sh", "-c", f'{shell} "$@"', "sh", sys.executable, "-c", program]
    if None in tools or subprocess.run([*command[:4], shell + " true"], capture_output=True).returncode:
        pytest.skip("unshare and setpriv cannot make such a place here")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert lines[0].startswith("landlock {'bwrap': ") and "namespace" in lines[0]
    assert lines[1].startswith("PermissionError") and lines[2].startswith("PermissionError") and lines[3] == "1"


def test_a_program_that_gets_no_processor_is_not_its_fault(monkeypatch: pytest.MonkeyPatch, sandbox: Sandbox) -> None:
    """Wall time ends what sleeps; what wants to compute has its processor-seconds, or the sandbox fails."""
    sleeping = Script("import time; time.sleep(60)")
    monkeypatch.setattr(sandbox, "limits", replace(sandbox.limits, wall_s=0.02))
    assert sandbox.run(sleeping).status == "timeout"
    monkeypatch.setattr(Worker, "is_busy", lambda worker: True)
    with pytest.raises(SandboxFailed, match=r"got less than 10 processor-seconds in 0\.2 s; the machine is too busy"):
        sandbox.run(sleeping)


def test_who_wants_to_compute_is_seen(sandbox: Sandbox) -> None:
    worker = sandbox._start(sandbox._setup)
    try:
        while worker.is_busy():  # it tidies its memory before it waits
            pass
        spinning = Running(Script("while True: pass"), Limits(cpu_s=5), worker)

        def work() -> None:
            with suppress(WorkerEnded):
                spinning.result()

        thread = threading.Thread(target=work)
        thread.start()
        while not worker.is_busy():
            pass
    finally:
        worker.kill()
    thread.join()
