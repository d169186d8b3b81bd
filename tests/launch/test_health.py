"""What a driver's answers mean, with a stand-in for NVML whose answers the tests choose."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llm_launch import health
from llm_launch.health import GpuHealth, HostHealth, MemoryKills
from llm_launch.journal import as_prometheus


class NVMLError(Exception):
    pass


class NVMLError_GpuIsLost(NVMLError):
    pass


class FakeNvml:
    """One GPU; ``set`` changes an answer, an exception as answer is raised."""

    NVMLError, NVMLError_GpuIsLost = NVMLError, NVMLError_GpuIsLost
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC, nvmlEventTypeXidCriticalError = 1, 0, 8
    nvmlClocksThrottleReasonHwSlowdown = 0x8
    nvmlClocksThrottleReasonHwThermalSlowdown = 0x40
    nvmlClocksThrottleReasonHwPowerBrakeSlowdown = 0x80

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {
            "nvmlDeviceGetHandleByIndex": "handle", "nvmlEventSetCreate": "events", "nvmlDeviceRegisterEvents": None,
            "nvmlDeviceGetTotalEccErrors": 3, "nvmlDeviceGetPcieReplayCounter": 5, "nvmlDeviceGetNvLinkState": 1,
            "nvmlDeviceGetRemappedRows": (0, 0, 0, 0), "nvmlDeviceGetCurrPcieLinkWidth": 16,
            "nvmlDeviceGetMaxPcieLinkWidth": 16, "nvmlDeviceGetCurrentClocksThrottleReasons": 0x4,
        }  # fmt: skip
        self.xids: list[int] = []

    def nvmlEventSetWait_v2(self, *_: Any) -> Any:
        if not self.xids:
            raise NVMLError("timeout")
        return SimpleNamespace(eventData=self.xids.pop(0))

    def __getattr__(self, name: str) -> Any:
        def answer(*_: Any) -> Any:
            value = self.answers[name]
            if isinstance(value, Exception):
                raise value
            return value

        return answer


@pytest.mark.parametrize(
    ("changes", "code", "fatal"),
    [
        ({"nvmlDeviceGetTotalEccErrors": 4}, "ecc", True),
        ({"nvmlDeviceGetRemappedRows": (0, 1, 1, 1)}, "row-remap-failed", True),
        ({"nvmlDeviceGetRemappedRows": (1, 0, 1, 0)}, "row-remap-pending", False),
        ({"nvmlDeviceGetNvLinkState": 0}, "nvlink", True),
        ({"nvmlDeviceGetPcieReplayCounter": 106}, "pcie-replay", False),
        ({"nvmlDeviceGetCurrPcieLinkWidth": 8}, "pcie-width", False),
        ({"nvmlDeviceGetCurrentClocksThrottleReasons": 0x44}, "throttled", False),
        ({"nvmlDeviceGetTotalEccErrors": NVMLError_GpuIsLost("lost")}, "gpu-lost", True),
    ],
)
def test_findings(changes: dict[str, Any], code: str, fatal: bool) -> None:
    """Each is found once, and nothing else with it."""
    nvml = FakeNvml()
    gpu = GpuHealth(nvml, 3)
    assert gpu.look() == []
    nvml.answers.update(changes)
    found = gpu.look()
    assert [(finding.code, finding.fatal, finding.device) for finding in found] == [(code, fatal, 3)]
    assert gpu.look() == []


def test_xids() -> None:
    """Of hardware and of programs."""
    nvml = FakeNvml()
    gpu = GpuHealth(nvml, 0)
    nvml.xids = [31, 79, 79]
    assert {finding.code: finding.fatal for finding in gpu.look()} == {"xid-31": False, "xid-79": True}


def test_questions_that_a_chip_cannot_answer_are_left_out() -> None:
    nvml = FakeNvml()
    for name in list(nvml.answers):
        if name != "nvmlDeviceGetHandleByIndex":
            nvml.answers[name] = NVMLError("not supported")
    gpu = GpuHealth(nvml, 0)
    assert gpu.look() == []


def test_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = HostHealth([tmp_path])
    assert host.look() == []
    monkeypatch.setattr(health.shutil, "disk_usage", lambda _: SimpleNamespace(free=100 << 20))
    monkeypatch.setattr(health.psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 20, total=1 << 30))
    found = host.look()
    assert [finding.code for finding in found] == [f"disk:{tmp_path}", "memory"]
    assert "100 MiB left" in found[0].message and not any(finding.fatal for finding in found)
    assert host.look() == []


def test_without_a_gpu_there_is_nothing_to_ask() -> None:
    assert health.open_nvml() is None or health.open_nvml().nvmlDeviceGetCount() > 0


def test_prometheus_text() -> None:
    """As prometheus_client's own parser reads it."""
    from prometheus_client.parser import text_string_to_metric_families

    status = {
        "step": 7, "generation": 2, "world_size": 3, "recoveries": 1, "lost_steps": 0, "excluded": [{}],
        "goodput": {"fraction": 0.98}, "state": "training",
    }  # fmt: skip
    text = as_prometheus(status)
    samples = {s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples}
    assert samples["llm_parallel_elastic_step"] == 7 and samples["llm_parallel_elastic_goodput"] == 0.98
    assert samples["llm_parallel_elastic_recoveries_total"] == 1 and samples["llm_parallel_elastic_training"] == 1
    assert not re.search(r"nan", text)


def test_the_systems_own_count_of_processes_that_it_ended_for_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(health.time, "monotonic", lambda: now[0])
    counters = tmp_path / "vmstat"
    counters.write_text("pgfault 12345\noom_kill 3\noom_kill_other 9\n")
    kills = MemoryKills(counters)
    assert not kills.look(), "those were before"
    counters.write_text("pgfault 12345\noom_kill 4\n")
    assert kills.look() and kills.look()
    now[0] += 2 * health.KILL_S
    assert not kills.look(), "a process that ends now was ended by something else"
    assert not MemoryKills(tmp_path / "nothing").look()
