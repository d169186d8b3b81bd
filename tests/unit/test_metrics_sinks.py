"""What a run leaves and shows, read back by other means than ours: json, TensorBoard's reader, HTTP, a terminal."""

from __future__ import annotations

import builtins
import io
import json
import math
import re
import socket
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from llm_parallel.config.tree import LogConfig, RunConfig
from llm_parallel.errors import UserError
from llm_parallel.metrics.console import REDRAW_S, ConsoleSink
from llm_parallel.metrics.history import read_history
from llm_parallel.metrics.record import Basis, EvalRecord, StepMeasurement, StepRecord, derive
from llm_parallel.metrics.run import Metrics, World, open_metrics
from llm_parallel.metrics.step_line import StepLines, duration, eval_line

BASIS = Basis(world_size=2, seq_length=16, flops_per_token=10**10, peak_tflops=312.0, total_steps=200)
WORLD = World(2, "TP 2", "NVIDIA A100-SXM4-80GB", True)


def record(step: int, loss: float = 2.0, skip_reason: str | None = None) -> StepRecord:
    measured = StepMeasurement(
        step=step,
        consumed_samples=8 * step,
        global_batch_size=8,
        loss=loss,
        grad_norm=1.5,
        lr=3e-4,
        step_time_s=0.5,
        data_time_s=0.01,
        forward_backward_time_s=0.4,
        optimizer_time_s=0.05,
        memory_reserved_gib=12.25,
        skip_reason=skip_reason,
    )
    return derive(measured, BASIS)


def metrics(run_dir: Path, resumed_step: int = 0, world: World = WORLD, **log: Any) -> Metrics:
    log = {"tensorboard": False, **log}
    config = RunConfig(log=LogConfig(**log))
    return open_metrics(0, run_dir, config, world=world, resumed_step=resumed_step, total_steps=200)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class TestJsonl:
    def test_each_record_is_a_complete_line_at_once(self, tmp_path: Path) -> None:
        open_run = metrics(tmp_path)
        open_run.step(record(1))
        start, step = lines_of(tmp_path / "metrics.jsonl")  # Read while the run is still open.
        assert start["event"] == "run_start"
        assert start["layout"] == "TP 2"
        assert start["size"] == 2
        assert "torch" in start["versions"]
        assert step["step"] == 1
        assert step["train/loss"] == 2.0
        assert step["train/tokens"] == 128
        assert step["perf/mfu"] == pytest.approx(128 / 0.5 / 2 * 1e10 / 312e12)
        open_run.eval(EvalRecord.from_loss(1, 0.0, samples=3, units=48))
        evaluation = lines_of(tmp_path / "metrics.jsonl")[-1]
        assert {key: evaluation[key] for key in ("eval/loss", "eval/ppl", "eval/samples", "eval/tokens")} == {
            "eval/loss": 0.0,
            "eval/ppl": 1.0,
            "eval/samples": 3,
            "eval/tokens": 48,
        }
        open_run.close()

    def test_nan_is_valid_json_and_says_why(self, tmp_path: Path) -> None:
        run = metrics(tmp_path)
        run.step(record(1, math.nan, "loss is NaN in samples 0 to 7"))
        run.close()
        text = (tmp_path / "metrics.jsonl").read_text()
        last = json.loads(text.splitlines()[-1], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert last["train/loss"] is None
        assert last["train/skip_reason"] == "loss is NaN in samples 0 to 7"

    def test_torn_last_line_costs_one_record_only(self, tmp_path: Path) -> None:
        run = metrics(tmp_path)
        run.step(record(1))
        run.step(record(2))
        run.close()
        path = tmp_path / "metrics.jsonl"
        path.write_bytes(path.read_bytes()[:-30])  # A kill in the middle of the write.
        assert [step["step"] for step in read_history(tmp_path).steps] == [1]
        again = metrics(tmp_path, resumed_step=1)
        again.step(record(2, 1.5))
        again.close()
        assert read_history(tmp_path).column("train/loss").tolist() == [2.0, 1.5]

    def test_resume_voids_what_came_after_the_checkpoint(self, tmp_path: Path) -> None:
        run = metrics(tmp_path)
        for step in range(1, 13):
            run.step(record(step, loss=5.0))
        run.eval(EvalRecord.from_loss(12, 4.0, 1, 1))
        run.close()
        again = metrics(tmp_path, resumed_step=10)
        again.step(record(11, loss=3.0))
        again.close()
        history = read_history(tmp_path)
        assert history.column("step").tolist() == list(range(1, 12)), "step 12 belongs to a future that did not happen"
        assert history.column("train/loss")[-1] == 3.0
        assert history.evals == ()
        assert len(history.starts) == 2
        assert len(lines_of(tmp_path / "metrics.jsonl")) == 16, "nothing is deleted"

    def test_run_without_metrics_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"metrics\.jsonl"):
            read_history(tmp_path)


def test_events_have_their_time(tmp_path: Path) -> None:
    run = metrics(tmp_path)
    run.event("checkpoint_saved", step=10, path="checkpoints/iter_0000010", seconds=1.25)
    start, saved = lines_of(tmp_path / "events.jsonl")
    assert start["event"] == "run_start"
    assert (saved["event"], saved["step"], saved["seconds"]) == ("checkpoint_saved", 10, 1.25)
    assert start["time"] <= saved["time"]
    assert saved["time"].endswith("+00:00")
    run.close()


def test_only_rank_0_writes(tmp_path: Path) -> None:
    other = open_metrics(1, tmp_path / "run", RunConfig(), world=WORLD, resumed_step=0, total_steps=200)
    other.start(["hello"])
    other.step(record(1))
    other.eval(EvalRecord.from_loss(1, 1.0, 1, 1))
    other.message("hello")
    other.event("hello")
    other.close()
    assert not (tmp_path / "run").exists()
    first = open_metrics(0, tmp_path / "run", RunConfig(), world=WORLD, resumed_step=0, total_steps=200)
    first.close()
    assert (tmp_path / "run" / "metrics.jsonl").exists()


class TestTensorBoard:
    def read(self, folder: Path) -> dict[str, list[tuple[int, float]]]:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder))
        events.Reload()
        return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    def test_scalars_and_resume(self, tmp_path: Path) -> None:
        run = metrics(tmp_path, tensorboard=True)
        for step in (1, 2, 3):
            run.step(record(step, loss=float(step)))
        run.eval(EvalRecord.from_loss(3, 1.0, 1, 1))
        run.close()
        found = self.read(tmp_path / "tensorboard")
        assert found["train/loss"] == [(1, 1.0), (2, 2.0), (3, 3.0)]
        assert found["perf/tokens_per_s"][0] == (1, 256.0)
        assert found["eval/ppl"] == [(3, pytest.approx(math.e))]
        again = metrics(tmp_path, resumed_step=2, tensorboard=True)
        again.step(record(3, loss=30.0))
        again.close()
        assert self.read(tmp_path / "tensorboard")["train/loss"] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def hide(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)


@pytest.fixture
def wandb() -> Iterator[Any]:
    """The package without what it remembers of the environment of an earlier test."""
    package = pytest.importorskip("wandb", reason="wandb is optional")
    package.teardown()
    yield package
    package.teardown()


class TestServices:
    @pytest.mark.parametrize(
        ("package", "log"),
        [("wandb", {"wandb_project": "llama"}), ("prometheus_client", {"prometheus_port": 9400})],
    )
    def test_missing_package(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, log: dict[str, Any]
    ) -> None:
        hide(package, monkeypatch)
        with pytest.raises(UserError, match=rf"log\.{next(iter(log))}.*pip install"):
            metrics(tmp_path / "run", **log)
        assert not (tmp_path / "run").exists(), "a refusal leaves nothing behind"

    def test_prometheus_serves_the_newest_values_and_frees_its_port(self, tmp_path: Path) -> None:
        pytest.importorskip("prometheus_client", reason="prometheus-client is optional")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for loss in (4.25, 3.5):  # The second run finds the port free again.
            run = metrics(tmp_path, prometheus_port=port)
            run.step(record(7, loss=99.0))
            run.step(record(8, loss=loss))
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                body = answer.read().decode()
            values = dict(line.split() for line in body.splitlines() if not line.startswith("#"))
            assert float(values["llm_parallel_train_loss"]) == loss
            assert float(values["llm_parallel_train_step"]) == 8.0
            run.close()

    def test_port_in_use(self, tmp_path: Path) -> None:
        pytest.importorskip("prometheus_client", reason="prometheus-client is optional")
        with socket.socket() as taken:
            taken.bind(("0.0.0.0", 0))
            taken.listen()
            port = taken.getsockname()[1]
            with pytest.raises(UserError, match=rf"log\.prometheus_port is {port}, which is in use"):
                metrics(tmp_path / "run", prometheus_port=port)
        assert not (tmp_path / "run").exists()

    @pytest.mark.usefixtures("wandb")
    def test_wandb_without_a_login(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setenv("HOME", str(tmp_path))  # No key is kept there.
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
        with pytest.raises(UserError, match=r"log\.wandb_project is 'llama'.*WANDB_MODE=offline"):
            metrics(tmp_path / "run", wandb_project="llama")

    @pytest.mark.processes
    @pytest.mark.usefixtures("wandb")
    def test_wandb_offline_and_resume(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_SILENT", "true")
        ids = []
        for resumed_step in (0, 1):
            run = metrics(tmp_path, wandb_project="llama", resumed_step=resumed_step)
            run.step(record(resumed_step + 1, loss=1234.5))
            ids.append((tmp_path / "wandb" / "run_id.txt").read_text())
            run.close()
        assert ids[0] == ids[1], "a resumed run goes on under its old id"
        logs = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
        assert len(logs) == 2
        deadline = time.monotonic() + 30.0  # wandb writes from a process of its own, which a busy machine holds up
        while time.monotonic() < deadline and not all(b"1234.5" in log.read_bytes() for log in logs):
            time.sleep(0.2)
        assert all(b"train/loss" in log.read_bytes() and b"1234.5" in log.read_bytes() for log in logs)


class TestConsole:
    FULL = replace(record(7), tokens_per_s_per_gpu=12345.6, tflops_per_gpu=152.26, mfu=0.488)

    def test_line_names_everything_with_its_unit(self) -> None:
        assert StepLines(200, "GPU").line(self.FULL) == (
            "step   7/200 | loss 2.0000 | grad norm 1.500 | 12,346 tokens/s/GPU | 152.3 TFLOP/s/GPU | MFU 48.8% | "
            "ETA 0:01:36 | lr 3.00e-04 | 12.25 GiB"
        )

    def test_cpu_counts_processes_and_has_no_mfu(self) -> None:
        line = StepLines(200, "process").line(replace(record(7), mfu=None, tflops_per_gpu=0.0213))
        assert "GPU" not in line
        assert "0.021 TFLOP/s/process | ETA" in line

    @pytest.mark.parametrize(
        ("width", "line"),
        [
            (
                110,
                "step   7/200 | loss 2.0000 | grad 1.500 | 12,346 tok/s/GPU | MFU 48.8% | ETA 0:01:36 | lr 3.00e-04 "
                "| 12.25 GiB",
            ),
            (80, "step   7/200 | loss 2.0000 | grad 1.500 | 12,346 tok/s/GPU | ETA 0:01:36"),
            (60, "step   7/200 | loss 2.0000 | 12,346 tok/s/GPU | ETA 0:01:36"),
            (50, "step   7/200 | loss 2.0000 | ETA 0:01:36"),
            (20, "step   7/200"),
            (3, "step   7/200"),
        ],
    )
    def test_line_fits_the_terminal(self, width: int, line: str) -> None:
        assert StepLines(200, "GPU").line(self.FULL, width) == line

    @settings(max_examples=200, deadline=None)
    @given(
        st.integers(12, 220),
        st.lists(st.tuples(st.floats(0.01, 1e5), st.floats(1, 1e7), st.integers(1, 10**7)), min_size=1, max_size=5),
    )
    def test_no_line_is_wider_and_no_number_is_cut(self, width: int, steps: list[tuple[float, float, int]]) -> None:
        lines = StepLines(200, "GPU")
        for loss, rate, eta in steps:
            made = replace(self.FULL, loss=loss, tokens_per_s_per_gpu=rate, eta_s=eta)
            line = lines.line(made, width)
            assert len(line) <= width
            whole = {f"{loss:.4f}", f"{rate:,.0f}", str(timedelta(seconds=eta)), "7/200", "1.500", "152.3", "48.8%"}
            found = re.findall(r"\d[^|a-zA-Z ]*(?:e-\d+| days?, [\d:]+)?", line)
            assert found and set(found) <= whole | {"3.00e-04", "12.25"}

    def test_numbers_stand_below_each_other(self) -> None:
        lines = StepLines(200, "GPU")
        first, second = (lines.line(replace(self.FULL, loss=loss), 200) for loss in (10.5, 9.5))
        assert first.index("| grad") == second.index("| grad")

    def test_what_does_not_change_is_left_out(self) -> None:
        lines = StepLines(200, "GPU")
        assert lines.line(self.FULL).endswith("| lr 3.00e-04 | 12.25 GiB")
        assert lines.line(self.FULL).endswith("| ETA 0:01:36")
        assert lines.line(replace(self.FULL, lr=1e-4)).endswith("| ETA 0:01:36 | lr 1.00e-04")

    def test_statistics_of_the_objective_are_shown(self) -> None:
        line = StepLines(200, "GPU").line(replace(self.FULL, statistics={"accuracy": 0.75}))
        assert "| loss 2.0000 | accuracy 0.75 | grad norm" in line

    def test_skipped_step_says_why(self) -> None:
        skipped = record(7, math.nan, "loss is NaN")
        assert StepLines(200, "GPU").line(skipped).endswith("| SKIPPED: loss is NaN")
        assert StepLines(200, "GPU").line(skipped, 40) == "step   7/200 | SKIPPED | loss nan"

    @pytest.mark.parametrize(
        ("width", "line"),
        [
            (None, "evaluation after step 50 | loss 2.0000 | perplexity 7.389 | 64 samples, 16,384 tokens"),
            (60, "eval at 50 | loss 2.0000 | ppl 7.389"),
            (30, "eval at 50 | loss 2.0000"),
        ],
    )
    def test_line_of_an_evaluation(self, width: int | None, line: str) -> None:
        assert eval_line(EvalRecord.from_loss(50, 2.0, 64, 16384), width) == line

    def test_duration(self) -> None:
        assert [duration(s) for s in (0, 59.6, 3723, 90061)] == ["0:00:00", "0:01:00", "1:02:03", "1 day, 1:01:01"]

    def test_plain_lines_where_there_is_no_terminal(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run = metrics(tmp_path)
        run.start(["layout [TP 2]", "MFU: peak 312"])
        run.step(record(1))
        run.eval(EvalRecord.from_loss(1, 2.0, 64, 1024))
        run.message("saved [bold]checkpoint[/bold]")
        run.close()
        text = capsys.readouterr().out
        out = text.splitlines()
        assert out[:2] == ["layout [TP 2]", "MFU: peak 312"]
        assert out[2].startswith("step   1/200 | loss 2.0000")
        assert out[3] == "evaluation after step 1 | loss 2.0000 | perplexity 7.389 | 64 samples, 1,024 tokens"
        assert out[4] == "saved [bold]checkpoint[/bold]", "text is not taken for markup"
        assert len(out) == 5
        assert "\x1b" not in text and "\r" not in text

    def test_a_log_stays_one_where_variables_speak_of_a_terminal(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A batch job inherits what the shell exports that submits it. Lines of steps are as rare as was asked, and
        none is missing that says that a step was skipped, or that the run is over."""
        for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE"):
            monkeypatch.setenv(name, "1")
        sink = ConsoleSink(200, 0, "GPU", line_interval_s=3600.0)
        sink.start(["layout"])
        for step in (*range(1, 50), 200):
            sink.step(replace(record(step), skipped=step == 7, skip_reason="loss" if step == 7 else None))
        sink.close()
        text = capsys.readouterr().out
        assert [line.split("/")[0] for line in text.splitlines()] == ["layout", "step   1", "step   7", "step 200"]
        assert "\x1b" not in text and "\r" not in text

    @pytest.mark.parametrize("width", [60, 80, 110, 200])
    def test_progress_bar_on_a_terminal(self, width: int) -> None:
        out = io.StringIO()
        sink = ConsoleSink(200, 6, "GPU", Console(file=out, force_terminal=True, width=width, color_system=None))
        sink.start(["layout [TP 2]"])
        sink.step(record(7))
        sink.close()
        text = out.getvalue()
        assert "layout [TP 2]\n" in text
        assert StepLines(200, "GPU").line(record(7), width) in text
        bar = text.rsplit("step", 1)[-1]
        assert "7/200" in bar, "the bar stands at the step done"
        assert "left 0:01:36" in bar and "loss 2.0000" in bar and ("since start" in bar) == (width >= 80)

    def test_fast_steps_redraw_the_bar_a_few_times_a_second(self) -> None:
        out = io.StringIO()
        sink = ConsoleSink(2000, 0, "GPU", Console(file=out, force_terminal=True, width=100, color_system=None))
        sink.start([])
        began = time.monotonic()
        for step in range(1, 501):
            sink.step(record(step))
        seconds = time.monotonic() - began
        sink.close()
        text = out.getvalue()
        assert all(f"step {step:>4}/2000 |" in text for step in range(1, 501)), "every line is there"
        assert text.count("since start") <= 8 + 2 * seconds / REDRAW_S, (
            "with lines above it is drawn twice in one write"
        )

    def test_the_line_of_a_step_before_a_long_one_does_not_wait_for_it(self) -> None:
        out = io.StringIO()
        sink = ConsoleSink(200, 0, "GPU", Console(file=out, force_terminal=True, width=100, color_system=None))
        sink.start([])
        sink.step(record(1))
        sink.step(record(2))
        deadline = time.monotonic() + 20
        while "2/200 |" not in out.getvalue() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert "2/200 |" in out.getvalue()
        sink.close()
