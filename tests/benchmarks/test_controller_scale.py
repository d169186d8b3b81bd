"""The simulated agents of the launcher's benchmark follow the controller's protocol, and it recovers from a lost
node."""

from __future__ import annotations

import re
import subprocess
import sys

from benchmarks.gpu_suite import ROOT


def test_256_ranks_lose_a_node_and_go_on() -> None:
    command = [sys.executable, "-m", "benchmarks.controller_scale", "--nodes", "32", "--heartbeat-s", "0.5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert "32 agents with 8 devices each, 256 ranks" in done.stdout
    seconds = [float(found) for found in re.findall(r"_s (\d+\.\d+)", done.stdout)]
    assert len(seconds) == 2 and all(value >= 0 for value in seconds)
    lost = re.findall(r"node (\w+) is lost", done.stdout + done.stderr)
    assert lost[0] == "n00016", "the one whose connection was cut, and none before it"
