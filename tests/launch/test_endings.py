"""Every way in which a run ends, alone and together with a killed worker: what the next start finds."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_parallel.errors import EXIT_STOPPED
from tests.integration.conftest import corpus  # noqa: F401  (a fixture)
from tests.launch.elastic_runs import LIMIT_S, elastic_runs
from tests.launch.endings import WAYS, drive, promised
from tests.support.commands import Corpus
from tests.support.disks import small_disk_at

pytestmark = [pytest.mark.slow, pytest.mark.gloo]


def test_room_for_one_generation_of_copies(corpus: Corpus, tmp_path: Path) -> None:  # noqa: F811
    """A recovery finds no room for new copies: training goes on, a checkpoint is written at once, the older copies go
    when it is complete, and then copies are made again, from which the next recovery starts."""
    with small_disk_at(tmp_path / "memory", "16m") as disk, elastic_runs(corpus, tmp_path) as start:
        run = start(
            "parallel.dp=4", "train.steps=100000", f"elastic.replica_dir={disk}", "elastic.strikes=100", nodes=1
        )
        run.reach(5, LIMIT_S)
        run.first_step_after(run.cause("kill", 1), LIMIT_S)
        run.until(lambda: run.events("copies_again"), LIMIT_S, "copies in the room of the older ones")
        again = run.events("copies_again")[0]["step"]
        assert run.events("copies_failed")[0]["step"] < again
        assert "has no room for" in run.events("copies_failed")[0]["cause"]
        run.reach(again + 3, LIMIT_S)
        run.first_step_after(run.cause("kill", 2), LIMIT_S)
        formed = run.events("form")[2]
        assert formed["cause"] == "memory" and formed["step"] > again and not run.events("remove")
        run.stop()
        assert run.wait() == EXIT_STOPPED


@pytest.mark.parametrize("killed", [False, True], ids=["alone", "with a killed worker"])
@pytest.mark.parametrize("name", WAYS)
def test_at_most_one_step_is_lost(name: str, killed: bool, corpus: Corpus, tmp_path: Path) -> None:  # noqa: F811
    ending = drive(corpus, tmp_path, name, killed)
    assert not promised(name, ending), (promised(name, ending), ending.log[-3000:])
