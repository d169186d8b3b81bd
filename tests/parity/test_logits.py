"""Logits equal transformers', in one process and in TP x PP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.harness import run_ranks
from tests.support.parity_models import RANDOM, hf_logits, logits_job, random_folder
from tests.support.smollm import smollm_folder

TOLERANCE = 1e-4
LAYOUTS = [("one process", {}, 1), ("TP2 PP2", {"tp": 2, "pp": 2}, 4)]

pytestmark = pytest.mark.gloo


@pytest.mark.parametrize("kind", RANDOM)
def test_random_models(kind: str, tmp_path: Path) -> None:
    folder = random_folder(kind, tmp_path)
    tokens = np.random.default_rng(0).integers(0, 301, (3, 96))
    expected = hf_logits(folder, tokens)
    for name, parallel, processes in LAYOUTS:
        found = [x for x in run_ranks(logits_job, processes, str(folder), tokens, parallel) if x is not None][-1]
        worst = np.abs(found - expected).max()
        print(f"| {kind} | {name} | {worst:.1e} |")
        assert found.shape == expected.shape == (3, 96, 301)
        assert worst <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "parallel", "processes"),
    [("one process", {}, 1), pytest.param("TP3 PP2", {"tp": 3, "pp": 2}, 6, marks=pytest.mark.slow)],
)
def test_smollm2_135m(name: str, parallel: dict[str, Any], processes: int) -> None:
    folder = smollm_folder()
    tokens = np.random.default_rng(1).integers(0, 49152, (1, 48))
    expected = hf_logits(folder, tokens)
    found = [x for x in run_ranks(logits_job, processes, str(folder), tokens, parallel) if x is not None][-1]
    worst = np.abs(found - expected).max()
    print(f"| SmolLM2-135M | {name} | {worst:.1e} |")
    assert worst <= TOLERANCE
