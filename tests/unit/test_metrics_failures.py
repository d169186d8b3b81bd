"""Sinks that cannot be written: what begins is refused, and what goes on has something to lose and goes on."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from llm_parallel.errors import UserError
from llm_parallel.jsonlines import JsonLines
from llm_parallel.metrics.history import read_history
from tests.unit.test_metrics_sinks import lines_of, metrics, record


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Writes past ``num_bytes`` of a file fit only in part and then fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


class TestFullDisk:
    def test_a_line_that_fits_in_part_is_taken_back(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        lines = JsonLines(path)
        lines.append({"step": 1})
        whole = path.read_bytes()
        with largest_file(len(whole) + 20), pytest.raises(UserError, match=r"metrics\.jsonl.*make room"):
            lines.append({"step": 2, "text": "x" * 100})
        assert path.read_bytes() == whole
        lines.append({"step": 3})
        assert [line["step"] for line in lines_of(path)] == [1, 3]

    @pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl"])
    def test_full_device_names_the_file(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).symlink_to("/dev/full")
        with pytest.raises(UserError, match=rf"{name}: No space left on device"):
            metrics(tmp_path)

    def test_tensorboard_on_a_full_disk_ends_no_run(self, tmp_path: Path) -> None:
        """It is an event, and it is tried again: what comes after the disk has room is there."""
        run = metrics(tmp_path, tensorboard=True)
        with largest_file(8000):  # Event files grow faster than metrics.jsonl, so they meet the limit first.
            for step in range(1, 13):
                run.step(record(step))
            assert len(lines_of(tmp_path / "metrics.jsonl")) == 13, "other sinks go on"
        run.step(record(99))
        run.close()
        told = [(event["event"], event.get("target")) for event in lines_of(tmp_path / "events.jsonl")[1:]]
        folder = str(tmp_path / "tensorboard")
        assert told[0] == ("degraded", folder) and told[-1] == ("restored", folder)
        assert len(list((tmp_path / "tensorboard").iterdir())) > 1

    def test_metrics_on_a_full_disk_end_no_run(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Neither events nor metrics can be written; later both can."""
        run = metrics(tmp_path)
        run.step(record(1))
        with largest_file(10):
            run.step(record(2))
            run.event("save", step=2)
            run.step(record(3))
        assert capsys.readouterr().err.count("make room") == 2, "each is said once"
        run.step(record(4))
        run.event("save", step=4)
        run.close()
        assert read_history(tmp_path).column("step").tolist() == [1, 4]
        kinds = [event["event"] for event in lines_of(tmp_path / "events.jsonl")]
        assert sorted(kinds[1:]) == ["restored", "restored", "save"]

    def test_a_deleted_folder_begins_anew(self, tmp_path: Path) -> None:
        run = metrics(tmp_path / "run")
        run.step(record(1))
        shutil.rmtree(tmp_path / "run")
        run.step(record(2))
        run.event("save", step=2)
        run.close()
        assert [line["step"] for line in lines_of(tmp_path / "run" / "metrics.jsonl")] == [2]
        assert [line["event"] for line in lines_of(tmp_path / "run" / "events.jsonl")] == ["save"]

    @pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "tensorboard"])
    def test_a_run_that_goes_on_opens_without_what_it_cannot_write(self, tmp_path: Path, name: str) -> None:
        """A run that begins is refused (above): it has nothing to lose."""
        (tmp_path / name).symlink_to("/dev/full")
        run = metrics(tmp_path, resumed_step=3, tensorboard=True)
        run.step(record(4))
        (tmp_path / name).unlink()
        run.step(record(5))
        run.close()
        assert (tmp_path / name).exists() or name == "events.jsonl"

    def test_run_dir_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "run").write_text("")
        with pytest.raises(UserError, match=r"run/metrics\.jsonl"):
            metrics(tmp_path / "run")


class TestPipe:
    @pytest.mark.processes
    def test_a_reader_that_has_gone_ends_no_run(self, tmp_path: Path) -> None:
        """As of ``pretrain … | head``: records are written on, and Python's end is quiet."""
        program = (
            "import sys; from pathlib import Path; from tests.unit.test_metrics_sinks import metrics, record\n"
            "run = metrics(Path(sys.argv[1]))\n"
            "for step in range(1, 4): run.step(record(step))\n"
            "run.close()\n"
        )
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)], stdout=writing, stderr=subprocess.PIPE, text=True
        )
        os.close(writing)
        assert done.returncode == 0 and "Traceback" not in done.stderr
        assert len(lines_of(tmp_path / "metrics.jsonl")) == 4
        told = [(event["event"], event.get("target")) for event in lines_of(tmp_path / "events.jsonl")]
        assert told == [("run_start", None), ("degraded", "standard output")]


def listening_at(port: int) -> str:
    """Address at which this process listens on a port."""
    found = [c.laddr.ip for c in psutil.Process().net_connections() if c.status == "LISTEN" and c.laddr.port == port]
    return found[0]


class TestPorts:
    def test_a_taken_port_does_not_end_a_run_that_goes_on(self, tmp_path: Path) -> None:
        """As when rank 0 is replaced and another program has its port; the port is used once it is free."""
        pytest.importorskip("prometheus_client", reason="prometheus-client is optional")
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            run = metrics(tmp_path, resumed_step=7, prometheus_port=port)
            run.step(record(8))
        run.step(record(9))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            assert "llm_parallel_train_step 9.0" in answer.read().decode()
        run.close()
        kinds = [event["event"] for event in lines_of(tmp_path / "events.jsonl")]
        assert kinds == ["run_start", "degraded", "restored"]

    def test_prometheus_listens_on_loopback_unless_asked(self, tmp_path: Path) -> None:
        pytest.importorskip("prometheus_client", reason="prometheus-client is optional")
        for host in ("127.0.0.1", "0.0.0.0"):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            asked = {} if host == "127.0.0.1" else {"prometheus_host": host}
            run = metrics(tmp_path / host, prometheus_port=port, **asked)
            assert listening_at(port) == host
            run.close()
