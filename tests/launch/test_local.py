"""The launcher with real processes: every way in which a run can end."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_launch import launch_local
from llm_launch.local import available_cores
from llm_parallel.errors import UserError

IMPORTS = """
import json, os, signal, sys, time
from pathlib import Path
rank, here = int(os.environ["RANK"]), Path(sys.argv[1])
def fail(error):
    from llm_launch import report_error
    sys.exit(report_error(here / "logs", rank, error))
def ready():
    (here / f"pid_{rank}").write_text(str(os.getpid()))
def rest():
    time.sleep(600)
    (here / f"rested_{rank}").touch()
def end_of(other):
    path = here / f"pid_{other}"
    while not (path.exists() and path.read_text()): time.sleep(0.01)
    while Path("/proc", path.read_text()).exists(): time.sleep(0.01)
"""


def environment(**more: str) -> dict[str, str]:
    """This process's environment, less what could steer the launcher, plus the way to our packages."""
    kept = {name: value for name, value in os.environ.items() if name not in ("MASTER_PORT", "OMP_NUM_THREADS")}
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **more}


def write_worker(folder: Path, body: str) -> list[str]:
    (folder / "worker.py").write_text(IMPORTS + body)
    return [str(folder / "worker.py"), str(folder)]


def run(folder: Path, processes: int, body: str, grace_s: float = 0.3, **more: str) -> int:
    argv = write_worker(folder, body)
    return launch_local(processes, argv, folder / "logs", env=environment(**more), grace_s=grace_s)


def pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in sorted(folder.glob("pid_*"))]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.02)


@contextlib.contextmanager
def launcher(folder: Path, processes: int, body: str, **options):
    """The launcher in a process of its own, so that it can be sent signals; yields when all workers are ready."""
    argv = write_worker(folder, body)
    call = f"launch_local({processes}, {argv!r}, Path({str(folder / 'logs')!r}), grace_s=0.5)"
    # Under nohup this process ignores SIGHUP, and a launcher that it starts would too.
    heard = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)"
    code = f"{heard}; import sys; from pathlib import Path; from llm_launch import launch_local; sys.exit({call})"
    process = subprocess.Popen([sys.executable, "-c", code], env=environment(), **options)
    try:
        wait_until(lambda: len(list(folder.glob("pid_*"))) == processes and all(pids_written(folder)))
        yield process
    finally:
        process.kill()
        process.wait()


def pids_written(folder: Path) -> list[bool]:
    return [bool(path.read_text()) for path in folder.glob("pid_*")]


def test_every_rank_knows_its_place(tmp_path):
    body = '(here / f"env_{rank}").write_text(json.dumps(dict(os.environ)))'
    assert run(tmp_path, 3, body) == 0
    found = [json.loads((tmp_path / f"env_{rank}").read_text()) for rank in range(3)]
    for rank, env in enumerate(found):
        assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"]) == (
            str(rank),
            str(rank),
            "3",
            "3",
        )
        assert env["MASTER_ADDR"] == "127.0.0.1"
        assert env["OMP_NUM_THREADS"] == str(max(1, available_cores() // 3))
    assert len({env["MASTER_PORT"] for env in found}) == 1
    assert 0 < int(found[0]["MASTER_PORT"]) < 65536


def test_settings_of_the_user_are_kept(tmp_path):
    body = '(here / "env").write_text(os.environ["OMP_NUM_THREADS"] + os.environ["GLOO_SOCKET_IFNAME"])'
    assert run(tmp_path, 1, body, OMP_NUM_THREADS="7", GLOO_SOCKET_IFNAME="eth9") == 0
    assert (tmp_path / "env").read_text() == "7eth9"


def test_cores_respect_affinity():
    code = (
        "import os; cores = sorted(os.sched_getaffinity(0)); os.sched_setaffinity(0, cores[:1]);"
        "from llm_launch.local import available_cores; print(available_cores())"
    )
    out = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "1"


def test_output_of_rank_0_is_the_terminals_and_of_others_in_logs(tmp_path, capfd):
    body = 'print("out of", rank); print("err of", rank, file=sys.stderr)'
    assert run(tmp_path, 2, body) == 0
    seen = capfd.readouterr()
    assert seen.out == "out of 0\n"
    assert seen.err == ""
    assert (tmp_path / "logs/rank_0.log").read_text() == "err of 0\n"
    assert sorted((tmp_path / "logs/rank_1.log").read_text().splitlines()) == ["err of 1", "out of 1"]


def test_logs_of_earlier_attempts_are_kept(tmp_path):
    assert run(tmp_path, 1, 'print("first", file=sys.stderr)') == 0
    assert run(tmp_path, 1, 'print("second", file=sys.stderr)') == 0
    assert (tmp_path / "logs/rank_0.log").read_text() == "first\nsecond\n"


def test_rank_0_sees_a_terminal(tmp_path):
    """Progress bars draw themselves only on a terminal."""
    controller, terminal = pty.openpty()
    try:
        with launcher(tmp_path, 2, "ready(); print(sys.stdout.isatty(), rank)", stdout=terminal) as process:
            assert process.wait(300) == 0
        assert os.read(controller, 100) == b"True 0\r\n"
        assert (tmp_path / "logs/rank_1.log").read_text() == "False 1\n"
    finally:
        os.close(controller)
        os.close(terminal)


def test_user_error_is_one_sentence_and_status_2(tmp_path, capfd):
    body = """
from llm_parallel.errors import UserError
ready()
if rank == 1:
    while len(list(here.glob("pid_*"))) < 3: time.sleep(0.01)
    fail(UserError("train.steps = 0 must be a whole number over 0"))
rest()
"""
    assert run(tmp_path, 3, body) == 2
    assert not list(tmp_path.glob("rested_*")), "nobody waited for the others' end"
    assert capfd.readouterr().err == "train.steps = 0 must be a whole number over 0\n"
    assert not any(is_alive(pid) for pid in pids(tmp_path))


def test_user_error_on_every_rank_is_said_once(tmp_path, capfd):
    body = 'from llm_parallel.errors import UserError\nfail(UserError("no such file"))'
    assert run(tmp_path, 3, body) == 2
    assert capfd.readouterr().err == "no such file\n"


def test_crash_names_rank_error_and_log_and_stuck_ranks_are_killed(tmp_path, capfd):
    body = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # stuck in a collective
ready()
if rank == 1:
    while len(list(here.glob("pid_*"))) < 2: time.sleep(0.01)
    try:
        [][3]
    except IndexError as error:
        fail(error)
rest()
"""
    assert run(tmp_path, 2, body) == 1
    assert not list(tmp_path.glob("rested_*")), "nobody waited for the others' end"
    log = tmp_path / "logs/rank_1.log"
    assert capfd.readouterr().err == f"rank 1 of 2 failed: IndexError: list index out of range (log: {log})\n"
    assert "[][3]" in log.read_text()
    report = json.loads((tmp_path / "logs/error_rank_1.json").read_text())
    assert (report["rank"], report["kind"]) == (1, "crash")
    assert "[][3]" in report["traceback"]
    assert not any(is_alive(pid) for pid in pids(tmp_path))


def test_the_first_crash_is_named_not_its_consequence(tmp_path, capfd):
    """Rank 0 sees its peer vanish and ends at once; rank 1, the cause, is slow to end after its report."""
    body = """
from llm_launch import report_error
if rank == 1:
    report_error(here / "logs", rank, ZeroDivisionError("the cause"))
    (here / "reported").touch()
    end_of(0)
    os._exit(1)
ready()
while not (here / "reported").exists(): time.sleep(0.01)
fail(ConnectionError("peer closed"))
"""
    assert run(tmp_path, 2, body, grace_s=3.0) == 1
    assert capfd.readouterr().err.startswith("rank 1 of 2 failed: ZeroDivisionError: the cause")


def test_user_error_wins_over_the_crash_of_a_peer(tmp_path, capfd):
    body = """
from llm_launch import report_error
from llm_parallel.errors import UserError
if rank == 0:
    ready()
    report_error(here / "logs", rank, ConnectionError("peer closed"))
    os._exit(1)
end_of(0)
fail(UserError("the disk is full"))
"""
    assert run(tmp_path, 2, body, grace_s=5.0) == 2
    assert capfd.readouterr().err == "the disk is full\n"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_death_by_signal_is_named_before_what_it_caused(tmp_path, capfd, number):
    body = f"""
if rank == 0:
    print("about to go", file=sys.stderr)
    ready()
    os.kill(os.getpid(), {int(number)})
end_of(0)
fail(ConnectionError("peer closed"))
"""
    assert run(tmp_path, 2, body, grace_s=5.0) == 1
    message = capfd.readouterr().err
    assert message.startswith(f"rank 0 of 2 was ended by {number.name}")
    assert "peer closed" not in message
    assert str(tmp_path / "logs/rank_0.log") in message


def test_crash_without_a_report_shows_the_last_line_of_this_attempts_log(tmp_path, capfd):
    assert run(tmp_path, 1, "raise ValueError('old')") == 1
    assert "ended with status 1; its last line was: ValueError: old" in capfd.readouterr().err
    assert run(tmp_path, 1, "os._exit(7)") == 1
    message = capfd.readouterr().err
    assert "ended with status 7 (log:" in message
    assert "old" not in message


def test_reports_of_an_earlier_attempt_are_not_shown(tmp_path, capfd):
    assert run(tmp_path, 2, "fail(KeyError('old'))") == 1
    capfd.readouterr()
    assert run(tmp_path, 1, "raise ValueError('new')") == 1
    assert "ValueError: new" in capfd.readouterr().err
    assert not list((tmp_path / "logs").glob("error_*"))


def test_helpers_of_a_worker_end_with_it(tmp_path):
    body = """
import subprocess
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
(here / "pid_helper").write_text(str(helper.pid))
"""
    assert run(tmp_path, 1, body) == 0
    wait_until(lambda: not any(is_alive(pid) for pid in pids(tmp_path)))


SAVES = """
def save(*_):
    time.sleep(0.3)
    (here / f"saved_{rank}").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
ready()
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_request_to_end_reaches_every_worker_and_a_clean_end_is_status_0(tmp_path, number):
    with launcher(tmp_path, 2, SAVES) as process:
        process.send_signal(number)
        assert process.wait(300) == 0
    assert len(list(tmp_path.glob("saved_*"))) == 2


def test_saving_may_take_longer_than_the_grace_period(tmp_path):
    """The grace period (0.5 s here) is for failures; a save after SIGTERM has the time it needs."""
    with launcher(tmp_path, 2, SAVES.replace("0.3", "1.5")) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 0
    assert len(list(tmp_path.glob("saved_*"))) == 2


def test_workers_that_cannot_handle_sigterm_yet_give_status_143(tmp_path):
    """During imports; the other rank, already waiting for its peer, is not left behind."""
    body = "if rank == 0: signal.signal(signal.SIGTERM, signal.SIG_IGN)\nready()\ntime.sleep(60)"
    with launcher(tmp_path, 2, body, stderr=subprocess.PIPE, text=True) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 128 + signal.SIGTERM
        assert process.stderr.read() == "ended by SIGTERM before all processes could finish\n"
        assert not any(is_alive(pid) for pid in pids(tmp_path))


def test_second_interrupt_kills(tmp_path):
    body = 'signal.signal(signal.SIGTERM, lambda *_: (here / f"told_{rank}").touch())\nready()\nwhile True: rest()'
    with launcher(tmp_path, 2, body, stderr=subprocess.DEVNULL) as process:
        process.send_signal(signal.SIGINT)
        wait_until(lambda: len(list(tmp_path.glob("told_*"))) == 2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == 128 + signal.SIGINT
        assert not any(is_alive(pid) for pid in pids(tmp_path))


def test_workers_die_with_a_killed_launcher(tmp_path):
    body = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nready()\ntime.sleep(60)"
    with launcher(tmp_path, 2, body) as process:
        assert all(is_alive(pid) for pid in pids(tmp_path))
        process.kill()
        wait_until(lambda: not any(is_alive(pid) for pid in pids(tmp_path)))


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_port_in_use_is_refused_before_anything_starts(tmp_path, address):
    with socket.socket() as taken:
        taken.bind((address, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"MASTER_PORT = {port} cannot be used"):
            run(tmp_path, 1, "ready()", MASTER_PORT=str(port))
    assert not pids(tmp_path)


@pytest.mark.parametrize("port", ["http", "0", "70000", "-1"])
def test_impossible_port_is_refused(tmp_path, port):
    with pytest.raises(UserError, match="must be a number from 1 to 65535"):
        run(tmp_path, 1, "ready()", MASTER_PORT=port)


def test_the_chosen_port_is_held_until_a_listener_comes(tmp_path):
    """Nobody else can bind it, yet a socket with SO_REUSEADDR, as torch's store has, can listen on it."""
    body = """
import socket
port = int(os.environ["MASTER_PORT"])
stranger = socket.socket()
try:
    stranger.bind(("0.0.0.0", port))
    sys.exit("a stranger took the port")
except OSError:
    pass
with socket.socket() as store:
    store.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    store.bind(("0.0.0.0", port))
    store.listen()
"""
    assert run(tmp_path, 1, body) == 0


@pytest.mark.gloo
def test_torch_meets_at_the_held_port(tmp_path):
    body = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([rank + 1.0])
dist.all_reduce(total)
(here / f"sum_{rank}").write_text(str(total.item()))
dist.destroy_process_group()
"""
    assert run(tmp_path, 2, body, OMP_NUM_THREADS="1") == 0
    assert {path.read_text() for path in tmp_path.glob("sum_*")} == {"3.0"}


def test_log_folder_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(UserError, match="log folder"):
        run(tmp_path, 1, "ready()")


def test_signal_handlers_are_put_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    assert run(tmp_path, 1, "") == 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == before


def test_launcher_does_not_import_torch():
    code = "import sys, llm_launch; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment()).returncode == 0


@pytest.mark.parametrize(("statuses", "expected"), [((3, 3), 3), ((0, 3), 3), ((0, 0), 0), ((3, 1), 1)])
def test_a_run_that_was_stopped_is_neither_done_nor_failed(
    statuses: tuple[int, int], expected: int, tmp_path: Path
) -> None:
    assert run(tmp_path, 2, f"sys.exit({statuses}[rank])\n") == expected
