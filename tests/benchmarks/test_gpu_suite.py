"""The GPU suite keeps its results when a stage fails, hangs or is cut short, and goes on where it was cut short. These
tests run its parent process with stages that end in every possible way; test_gpu_rehearsal.py rehearses the real
stages."""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.gpu import counters, files, kernel_tests, machine, operators, packages, plan, report, suite
from benchmarks.gpu.suite import Suite, deadlines, run_suite
from benchmarks.gpu_suite import parse
from tests.benchmarks import fake_stages

FAKE = "tests.benchmarks.fake_stages"


def stages(*names: str, seconds: float = 10.0) -> list[plan.Stage]:
    return [plan.Stage(name, seconds, f"{FAKE}:{name}", "") for name in names]


def states(folder: Path) -> dict[str, str]:
    return {name: record["state"] for name, record in json.loads((folder / "suite.json").read_text()).items()}


def test_a_stage_that_fails_costs_its_own_rows(tmp_path: Path) -> None:
    """A stage raises, dies or loses the GPU: its saved rows stay, the other stages run, and three files are written."""
    names = ["raising", "good", "dying", "dying_in_one", "lost_twice", "always_lost", "without_time"]
    one = Suite(tmp_path / "out", tmp_path / "work", 120.0, stages(*names))
    assert run_suite(one) == 1
    assert states(tmp_path / "out") == {
        "raising": "failed", "good": "done", "dying": "failed", "dying_in_one": "done", "lost_twice": "done",
        "always_lost": "failed", "without_time": "partly",
    }  # fmt: skip
    found = json.loads((tmp_path / "out" / "suite.json").read_text())
    assert [len(found[name]["result"].get("rows", [])) for name in names] == [1, 1, 1, 2, 3, 0, 1]
    assert found["raising"]["problem"] == "ValueError: no such thing"
    assert found["dying"]["problem"] == "its process ended with 7"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["details.tar.gz", "suite.json", "summary.md"]
    text = (tmp_path / "out" / "summary.md").read_text()
    assert "| raising | failed | 0 | ValueError: no such thing |" in text
    assert "| without_time | partly | 0 | no time for: the other |" in text


def test_a_stage_that_hangs_is_ended_with_its_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "GRACE_S", 0.1)
    monkeypatch.setattr(suite, "RESERVE_S", 0.0)
    mark = f"mark{random.random()}"
    # Shares of 1 and 9: the hanging stage has 4 of the 40 seconds.
    two = [*stages("hanging", seconds=1.0), *stages("good", seconds=9.0)]
    assert run_suite(Suite(tmp_path / "out", tmp_path / "work", 40.0, two, options={"mark": mark})) == 1
    assert states(tmp_path / "out") == {"hanging": "cut", "good": "done"}
    assert len(json.loads((tmp_path / "out" / "suite.json").read_text())["hanging"]["result"]["rows"]) == 1
    assert not fake_stages.is_running(mark)


CUT = """
import sys
from pathlib import Path
from benchmarks.gpu.suite import Suite, run_suite, stop_on_signal
from tests.benchmarks.test_gpu_suite import stages
stop_on_signal()
run_suite(Suite(Path(sys.argv[1]) / "out", Path(sys.argv[1]) / "work", 120.0, stages("good", "slow", "without_time")))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_cut_at_any_moment_it_has_what_was_done(how: signal.Signals, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(plan.ROOT)}
    process = subprocess.Popen([sys.executable, "-c", CUT, str(tmp_path)], env=env, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)  # fmt: skip
    patience = time.monotonic() + 60
    record: dict[str, Any] = {}
    while record.get("slow", {}).get("state") != "running":  # its row is saved then, or a moment later
        assert process.poll() is None and time.monotonic() < patience
        record = files.read(tmp_path / "out" / "suite.json") or {}
        time.sleep(0.05)
    process.send_signal(how)
    process.wait(timeout=20)
    assert states(tmp_path / "out")["good"] == "done"
    assert (tmp_path / "out" / "summary.md").read_text().startswith("# ")
    before = (tmp_path / "work" / "good.json").read_bytes()
    # Started again on what is there, it does the rest alone, and then what there was no time for.
    functions = {"good": "good", "slow": "good", "without_time": "without_time"}
    rest = [plan.Stage(name, 10.0, f"{FAKE}:{function}", "") for name, function in functions.items()]
    run_suite(Suite(tmp_path / "out", tmp_path / "work", 120.0, rest))
    assert states(tmp_path / "out") == {"good": "done", "slow": "done", "without_time": "partly"}
    assert (tmp_path / "work" / "good.json").read_bytes() == before
    run_suite(Suite(tmp_path / "out", tmp_path / "work", 120.0, rest))
    assert states(tmp_path / "out")["without_time"] == "done"


def test_a_resumed_run_takes_over_what_came_home(tmp_path: Path) -> None:
    files.write(tmp_path / "suite.json", {"step": {"state": "done"}, "tests": {"state": "cut"}, "other": {"state": ""}})
    files.write(tmp_path / "tests.json", {"state": "failed"})
    files.take_over(tmp_path, tmp_path / "suite.json")
    assert files.records(tmp_path) == {"step": {"state": "done"}, "tests": {"state": "failed"}}
    files.forget(tmp_path)
    assert files.records(tmp_path) == {} and not (tmp_path / "suite.json").exists()


def test_time_is_dealt_by_share() -> None:
    found = deadlines(stages("good", "slow", seconds=10.0) + stages("hanging", seconds=20.0), now=100.0, end=180.0)
    assert found == {"good": 120.0, "slow": 140.0, "hanging": 180.0}
    # A second run of 4 minutes with the last stages alone gives each more than its share.
    last = deadlines(plan.STAGES[-2:], now=0.0, end=228.0)
    assert last["tuning"] == 228.0 and last["compiled"] > plan.STAGES[-2].seconds
    assert deadlines(plan.STAGES, now=0.0, end=525.0)["tuning"] == pytest.approx(525.0)
    for stage in plan.STAGES:
        module, function = stage.function.split(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_the_readme_lists_the_stages() -> None:
    """In their order, each with its share of a whole run in seconds."""
    rows = re.findall(r"^\| (\w+) \| .* \| (\d+) \|$", (plan.ROOT / "benchmarks/README.md").read_text(), re.MULTILINE)
    ends = list(deadlines(plan.STAGES, now=0.0, end=plan.BUDGET_S - suite.RESERVE_S).items())
    seconds = [(name, str(round(end - before))) for (name, end), (_, before) in zip(ends, [("", 0.0), *ends])]
    assert rows == seconds


def test_the_archive_keeps_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three files of noise, which does not compress, the largest is left out; a long one is cut."""
    monkeypatch.setattr(files, "MOST_BYTES", 60_000)
    monkeypatch.setattr(files, "MEMBER_BYTES", 50_000)
    home = tmp_path / "home.tar.gz"
    (tmp_path / "details").mkdir()
    for name, size in (("a.log", 10_000), ("details/b", 45_000), ("details/c", 90_000)):
        (tmp_path / name).write_bytes(random.randbytes(size))
    files.pack(tmp_path, home)
    assert home.stat().st_size <= 60_000
    with tarfile.open(home) as archive:
        assert {member.name: member.size for member in archive} == {"a.log": 10_000, "details/b": 45_000}
    monkeypatch.setattr(files, "MOST_BYTES", 200_000)
    files.pack(tmp_path, home)
    with tarfile.open(home) as archive:
        assert {member.name: member.size for member in archive}["details/c"] == 50_000


def test_nvidia_smi_is_read() -> None:
    line = (
        "NVIDIA H200, 580.159.03, P0, 345 MHz, 3201 MHz, 1980 MHz, 3201 MHz, 76.21 W, 700.00 W, 31, 0 %, "
        "143771 MiB, 1 MiB, Enabled"
    )
    found = machine.parse_smi(line)
    assert found["clocks.sm"] == "345 MHz" and found["power.limit"] == "700.00 W" and found["name"] == "NVIDIA H200"
    assert machine.parse_smi(None) == {} and machine.parse_smi("NVIDIA-SMI has failed") == {}
    assert set(machine.smi(rehearse=True)) == set(machine.FIELDS)


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's properties of a GPU, from a stand-in; a property that one version lacks does not affect the others."""
    torch = pytest.importorskip("torch")
    card = SimpleNamespace(
        name="NVIDIA H200", total_memory=139 * 2**30, multi_processor_count=132, major=9, minor=0,
        L2_cache_size=60 * 2**20,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    found = machine.properties(torch.device("cuda"))
    assert found["chip"] == "NVIDIA H200" and found["sms"] == 132 and found["memory_gib"] == 139.0
    assert (found["nccl"], found["cudnn"], found["l2_mib"], found["capability"]) == ("2.28.9", 91900, 60.0, [9, 0])
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: 1 / 0)
    assert machine.properties(torch.device("cuda"))["nccl"].startswith("ZeroDivisionError")
    with pytest.raises(RuntimeError, match="torch sees no GPU; --rehearse"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        machine.device(rehearse=False)


NCU = """==PROF== Connected to process 812 (/opt/python3)
some line of the program, with "quotes"
==PROF== Profiling "_rms_norm_fwd_kernel" - 0: 0%....50%....100% - 1 pass
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"Section Name","Metric Name","Metric Unit","Metric Value"
"0","812","python3","127.0.0.1","_rms_norm_fwd_kernel","1","7","(256, 1, 1)","(264, 1, 1)","0","9.0",\
"Command line profiler metrics","gpu__time_duration.sum","us","33.28"
"0","812","python3","127.0.0.1","_rms_norm_fwd_kernel","1","7","(256, 1, 1)","(264, 1, 1)","0","9.0",\
"Command line profiler metrics","launch__registers_per_thread","register/thread","48"
"1","812","python3","127.0.0.1","_sum_rows_kernel","1","7","(128, 1, 1)","(64, 1, 1)","0","9.0",\
"Command line profiler metrics","gpu__time_duration.sum","us","1,004.10"
==PROF== Disconnected from process 812
"""


def test_profiles_are_read() -> None:
    """The form is that of Nsight Compute's documentation; the numbers are made up."""
    assert counters.parse(NCU) == [
        {"kernel": "_rms_norm_fwd_kernel", "time": "33.28 us", "registers": "48 register/thread"},
        {"kernel": "_sum_rows_kernel", "time": "1,004.10 us"},
    ]
    assert counters.parse("==ERROR== ERR_NVGPUCTRPERM\n") == []


def test_the_worst_kernel_is_chosen() -> None:
    def row(operator: str, fraction: float | None, **more: str) -> dict[str, Any]:
        about = {"operator": operator, "shape": "s", "mode": "forward", "provider": "ours", "bound": "memory"}
        return {**about, "fraction": fraction, **more}

    rows = [row("rope", 0.8), row("swiglu", 0.7), row("rms_norm", None), row("adamw", 0.1, provider="torch"),
            row("attention", 0.2, bound="compute"), row("rms_norm", 0.3, mode="both")]  # fmt: skip
    assert counters.worst(rows) == ("swiglu", "s") and counters.worst([]) == counters.DEFAULT


def test_outcomes_of_a_cut_run_are_counted() -> None:
    """Each worker of xdist records how many tests were selected; the last line may be incomplete."""
    lines = [
        {"selected": 5}, {"selected": 5},
        {"test": "a", "outcome": "passed", "error": ""}, {"test": "b", "outcome": "skipped", "error": ""},
        {"test": "c", "outcome": "failed", "error": "E assert 1"},
    ]  # fmt: skip
    found = kernel_tests.outcomes(lines)
    assert found["counts"] == {"passed": 1, "failed": 1, "skipped": 1, "not reached": 2}
    assert found["failures"] == [{"test": "c", "error": "E assert 1"}] and found["passed"] == ["a"]
    again = kernel_tests.outcomes([{"selected": 4}, lines[3], {"test": "d", "outcome": "passed"}], found["passed"])
    assert again["counts"] == {"passed": 2, "failed": 0, "skipped": 1, "not reached": 2}
    assert again["passed"] == ["a", "d"]


def test_small_operators_are_tested_first() -> None:
    order = [Path(path).parent.name for path in kernel_tests.test_files()]
    assert order.index("rms_norm") < order.index("linear_cross_entropy") < order.index("attention")
    assert {path.name for path in map(Path, kernel_tests.test_files())} >= {"test_peers.py", "test_attention.py"}


def test_shapes_are_those_of_the_models() -> None:
    """Llama-3 8B and one of eight processes of 70B, whatever model a shape is named after."""
    assert [(s["hidden"], s["residual"]) for s in operators.shapes_of("rms_norm", False)] == [
        (4096, False), (4096, True), (8192, False), (8192, True)
    ]  # fmt: skip
    assert [(s["heads"], s["groups"]) for s in operators.shapes_of("rope", False)] == [(32, 8), (8, 1)]
    assert [s["width"] for s in operators.shapes_of("swiglu", False)] == [14336, 28672 // 8]
    assert [s["vocab_size"] for s in operators.shapes_of("cross_entropy", False)] == [128256, 128256 // 8]
    turns = operators.in_turns(operators.ORDER, False)
    assert [name for name, _ in turns[: len(operators.ORDER)]] == list(operators.ORDER)


def test_operators_go_on_where_they_were() -> None:
    """Rows of items that were begun are measured anew; not those of a provider that ended its process, and not an item
    in which the process died."""

    def row(operator: str, provider: str, ms: float | None) -> dict[str, Any]:
        return {"operator": operator, "shape": "a b", "provider": provider, "median_ms": ms, "note": ""}

    rows = [
        row("rope", "ours", 1.0),
        row("swiglu", "ours", 1.0),
        row("swiglu", "liger", None),
        row("swiglu", "x", None),
    ]
    before = {"rows": rows, "done": ["rope a b"], "broken": {"swiglu a b": ["liger"]}, "begun": "swiglu a b",
              "left_out": ["adamw a"]}  # fmt: skip
    found = operators._so_far(before)
    assert found["rows"] == [rows[0], rows[2]] and found["done"] == ["rope a b"] and found["left_out"] == []
    died = operators._so_far({**before, "died": True})
    assert died["done"] == ["rope a b", "swiglu a b"] and "begun" not in died and "died" not in died
    assert [r["note"] for r in died["rows"] if r["provider"] == "any"] == ["failed: the process died in this"]
    assert operators._so_far({})["rows"] == []


def test_only_missing_packages_are_installed(tmp_path: Path) -> None:
    """A wheel made by hand is installed offline; that of a package which this Python has is not."""
    import zipfile

    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "torch-1.0-py3-none-any.whl").write_bytes(b"never opened")
    with zipfile.ZipFile(wheels / "made_by_hand-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("made_by_hand.py", "VALUE = 7\n")
        info = "made_by_hand-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: made-by-hand\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    found = packages.install(wheels, tmp_path / "site", tmp_path / "log")
    assert found == {"installed": ["made_by_hand-1.0-py3-none-any.whl"], "had": ["torch-1.0-py3-none-any.whl"]}
    assert (tmp_path / "site" / "made_by_hand.py").read_text() == "VALUE = 7\n"
    assert "holds no wheels" in packages.install(tmp_path / "none", tmp_path / "site", tmp_path / "log")["problem"]
    assert "note" in packages.install(None, tmp_path / "site", tmp_path / "log")


def test_summary_of_partial_results() -> None:
    """A stage that was cut, an operator that is wrong, a provider that failed."""
    row = {
        "operator": "rope", "shape": "llama2-7b", "dtype": "bfloat16", "mode": "forward", "provider": "ours",
        "median_ms": 0.1, "p20_ms": 0.09, "p80_ms": 0.11, "gb_per_s": 2500.0, "fraction": 0.9, "peak_mib": 128.0,
        "host_us": 45.2, "note": "",
    }  # fmt: skip
    wrong = {"operator": "swiglu", "shape": "tokens 8", "problem": "AssertionError: off | by one", "worst_error": 0.5,
             "framework_error": 0.001, "seconds": 1.0}  # fmt: skip
    found = {
        "environment": {"state": "done", "result": {"chip": "a card", "date": "2026-01-01"}},
        "correctness": {"state": "failed", "result": {"rows": [wrong]}},
        "operators": {"state": "cut", "seconds": 170.0, "result": {
            "rows": [row, row | {"provider": "liger", "median_ms": None, "note": "failed: x"}]}},
        "step": {"state": "done", "result": {"steps": [{"model": "1b", "contender": "ours", "note": "failed: y"}]}},
    }  # fmt: skip
    text = report.summary(found)
    assert text.startswith("# a card, 2026-01-01")
    assert "| operators | cut | 170 |" in text and "| tests | did not run |" in text
    assert "WRONG: AssertionError: off / by one" in text
    assert "| rope | llama2-7b | forward | ours | 0.1000 (0.0900 to 0.1100) | 2500 GB/s | 90% | 128 | 45 |" in text
    assert "| liger | failed: x |" in text and "| 1b | ours |" in text and "failed: y" in text


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--only", "operator"], "--only operator is no stage; there are environment, correctness,"),
        (["--budget-s", "5"], "--budget-s 5 is not between 60 and 86400 seconds"),
        (["--break", "step"], "--break step is for rehearsals; add --rehearse"),
        (["--wheels", "nowhere"], "--wheels nowhere is no folder"),
    ],
)
def test_what_cannot_be_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--out", "x", *arguments])
    assert ended.value.code == 2 and said in capsys.readouterr().err
