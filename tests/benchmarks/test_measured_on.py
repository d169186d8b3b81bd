"""Results of benchmarks say what they were measured on, and name no folder of the machine."""

from __future__ import annotations

import sys

import pytest

from benchmarks.measured_on import ROOT, command, measured_on, sentence


def test_a_command_names_no_folder_of_this_machine() -> None:
    words = [
        str(ROOT / "benchmarks/packing.py"),
        "/models/smollm2",
        "--out",
        str(ROOT / "a b.json"),
        "--x=y",
    ]
    assert command(words) == "python benchmarks/packing.py smollm2 --out 'a b.json' --x=y"


def test_a_result_names_chip_load_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks/x.py", "--rounds", "1"])
    found = measured_on("numpy", "a-package-that-nobody-has")
    assert found["chip"] and found["cores"] >= 1 and found["load_average_1_min"] >= 0
    assert {"torch", "numpy"} <= found["versions"].keys() and "a-package-that-nobody-has" not in found["versions"]
    text = sentence("numpy")
    assert text.startswith("Command: `python benchmarks/x.py --rounds 1`; ") and found["chip"] in text
    assert f"numpy {found['versions']['numpy']}" in text
