"""Every way in which a run ends, alone and together with a killed worker: what the next start finds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.conftest import corpus  # noqa: F401  (a fixture)
from tests.launch.endings import WAYS, drive
from tests.support.commands import Corpus

pytestmark = [pytest.mark.slow, pytest.mark.gloo]


@pytest.mark.parametrize("killed", [False, True], ids=["alone", "with a killed worker"])
@pytest.mark.parametrize("name", WAYS)
def test_at_most_one_step_is_lost(name: str, killed: bool, corpus: Corpus, tmp_path: Path) -> None:  # noqa: F811
    way, ending = WAYS[name], drive(corpus, tmp_path, name, killed)
    assert ending.status in way.statuses, ending.log[-3000:]
    assert ending.made > 0 and ending.lost <= 1, (ending.made, ending.went_on, ending.log[-3000:])
    if way.saves:
        assert ending.saved == ending.made, "the state was to be on disk"
    assert "Traceback" not in ending.log or name == "error of the program"
