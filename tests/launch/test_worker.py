"""What a worker reads from its environment, and how it reports."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_launch.worker import WorkerEnv, first_host, report_error, worker_environment
from llm_parallel.errors import UserError

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
    "SLURM_STEP_NODELIST": "gpu[07-08,11]",
}


def test_started_by_nobody():
    assert worker_environment({}) is None


def test_in_a_batch_script_but_not_under_srun():
    """sbatch sets SLURM_PROCID=0 and SLURM_NTASKS in the script, which is not one of the tasks."""
    assert worker_environment({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) is None


def test_torchrun():
    found = worker_environment(
        {
            "RANK": "9",
            "LOCAL_RANK": "1",
            "WORLD_SIZE": "16",
            "LOCAL_WORLD_SIZE": "8",
            "MASTER_ADDR": "node1",
            "MASTER_PORT": "29500",
        }
    )
    assert found == WorkerEnv(9, 1, 16, 8, "node1", 29500)


def test_srun():
    found = worker_environment(SLURM)
    assert found is not None
    assert found == WorkerEnv(9, 1, 11, 3, "gpu07", found.master_port)
    assert 20000 <= found.master_port < 32768


def test_srun_port_is_the_same_for_all_tasks_and_differs_between_steps():
    def port(**changes: str) -> int:
        found = worker_environment({**SLURM, **changes})
        assert found is not None
        return found.master_port

    assert port() == port(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0")
    assert len({port(), port(SLURM_STEP_ID="3"), port(SLURM_JOB_ID="4712")}) == 3
    assert port(MASTER_PORT="1234") == 1234


@given(job=st.integers(0, 2**32 - 1), step=st.integers(0, 10**6))
def test_srun_port_is_always_below_the_kernels_own_range(job, step):
    found = worker_environment({**SLURM, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
    assert found is not None
    assert 1024 < found.master_port < 32768


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("localhost", "localhost"),
        ("n1,n2", "n1"),
        ("gpu[003-007,9],login1", "gpu003"),
        ("gpu[9,3-4]", "gpu9"),
        ("rack[1-2]node[01-16]", "rack1node01"),
        ("a-b-[5]x,c", "a-b-5x"),
        ("node-1-[02-03].cluster.org", "node-1-02.cluster.org"),
    ],
)
def test_first_host(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_PORT"),
        ({**SLURM, "SLURM_LOCALID": ""}, "SLURM_LOCALID"),
        ({**SLURM, "SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "4(y2)"}, "SLURM_STEP_TASKS_PER_NODE"),
    ],
)
def test_broken_environment_is_a_user_error_that_names_the_variable(environment, named):
    with pytest.raises(UserError, match=named):
        worker_environment(environment)


def test_export_is_read_back(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores them
    here = WorkerEnv(3, 1, 8, 2, "node7", 2222)
    here.export()
    assert worker_environment(os.environ) == here


def _raised(error: Exception) -> Exception:
    try:
        raise error
    except type(error) as caught:
        return caught


def test_report_of_a_user_error(tmp_path, capsys):
    assert report_error(tmp_path, 3, _raised(UserError("a is b"))) == 2
    report = json.loads((tmp_path / "error_rank_3.json").read_text())
    assert (report["rank"], report["kind"], report["message"]) == (3, "user", "a is b")
    assert capsys.readouterr().err == "a is b\n"


def test_report_of_a_crash(tmp_path, capsys):
    assert report_error(tmp_path, 0, _raised(RuntimeError("boom"))) == 1
    report = json.loads((tmp_path / "error_rank_0.json").read_text())
    assert (report["kind"], report["message"]) == ("crash", "RuntimeError: boom")
    assert "_raised" in report["traceback"]
    assert "Traceback" in capsys.readouterr().err


def test_report_where_nothing_can_be_written(tmp_path, capsys):
    (tmp_path / "logs").write_text("a file")
    assert report_error(tmp_path / "logs", 0, RuntimeError("boom")) == 1
    assert "RuntimeError: boom" in capsys.readouterr().err
