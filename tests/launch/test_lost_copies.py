"""Memory copies that have changed, are gone, or do not reach their second node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_launch.copy_files import CopyFile, copy_name
from llm_launch.copy_transfer import CopyServer
from llm_parallel.checkpoint.copies import CopyLost, LocalSource, RemoteSource, Source, checksum
from llm_parallel.checkpoint.pieces import Piece
from tests.launch.fake_agents import Nodes, Story, play
from tests.launch.test_controller import FOUR, config_of

SECRET = "of this test"
PIECES = [Piece("embedding", (0,), (5,), 0, 5, 0), Piece("norm", (0,), (4,), 1, 4, 5)]


def copied(folder: Path) -> CopyFile:
    """A copy of step 3 of rank 2, with its checksums."""
    header = {"generation": 1, "rank": 2, "numbers": 8, "index": PIECES}
    file = CopyFile.create(folder / "own" / copy_name(1, 2), header)
    planes = np.frombuffer(file.map, np.float32, 24, file.data_offset(0)).reshape(3, 8)
    planes[:] = np.arange(24).reshape(3, 8) / 7
    sums = [[checksum(plane[p.at : p.at + p.stop - p.start]) for plane in planes] for p in PIECES]
    file.commit(0, 3, {"checksums": sums})
    return file


def test_a_checksum_sees_every_bit() -> None:
    numbers = np.arange(7, dtype=np.float32)
    right = checksum(numbers)
    for bit in range(8 * numbers.nbytes):
        changed = bytearray(numbers.tobytes())
        changed[bit // 8] ^= 1 << bit % 8
        assert checksum(np.frombuffer(changed, np.float32)) != right
    assert checksum(np.zeros(0, np.float32)) == 0 and checksum(numbers[1:]) != checksum(numbers)


@pytest.mark.parametrize("where", ["in this node's memory", "at another node"])
def test_a_copy_that_has_changed_is_not_loaded(where: str, tmp_path: Path) -> None:
    """One bit of one piece, as a stranger or broken memory changes it: that piece is refused, and named."""
    file = copied(tmp_path)
    server = CopyServer("127.0.0.1", tmp_path, SECRET)

    def source() -> Source:
        if where == "at another node":
            return RemoteSource(server.address, SECRET, "own", 1, 2, 3)
        return LocalSource(file.path, 3)

    try:
        assert source().read(1).tolist() == np.float32(np.arange(24).reshape(3, 8)[:, 5:8] / 7).tolist()
        file.map[file.data_offset(0) + 4 * (8 + 6)] ^= 1
        changed = source()
        assert changed.read(0).shape == (3, 5)
        with pytest.raises(CopyLost, match="has changed since it was made: checksums of norm differ") as lost:
            changed.read(1)
        assert lost.value.copy == ("own", 2)
    finally:
        server.close()


def test_another_copy_is_taken_for_one_that_is_lost(tmp_path: Path) -> None:
    """Rank 1 cannot read its node's own copy: the next generation reads the partner's, and nobody is blamed. When that
    one is lost too, the checkpoint is loaded."""
    config = config_of(tmp_path, max_fruitless=10)
    nodes = Nodes(config, FOUR)
    lost: list[list[Any]] = []

    async def act(story: Story) -> None:
        await story.training(4)
        for _ in range(3):
            nodes.make_steps(1)
            await story.heard_of(nodes.step)
        nodes.lose_copies = lost
        lost.extend([["own", 1], ["kept", 1]])
        nodes.agents["n1"].tell({"is": "exit", "device": 0, "status": -9, "host_memory": False, "number": 0})
        nodes.agents["n1"].tell({"is": "worker", "device": 0, "pid": 2, "number": 1, "generation": 0})
        await story.until(lambda: len(story.events("form")) == 4, "three more generations")
        await story.training(4)

    _, story = play(config, nodes, act)
    assert [event["cause"] for event in story.events("form")[1:]] == ["memory", "memory", "checkpoint or new run"]
    assert [event["fault"] for event in story.events("blame")[1:]] == ["environment", "environment"]
    assert "another copy or the checkpoint is taken" in story.events("blame")[1]["cause"]
    assert nodes.sources[2] != nodes.sources[3] and not story.events("remove")


def test_second_copies_go_to_another_node(tmp_path: Path) -> None:
    """The partner node does not take them: that is an event and a metric, and the next node keeps them."""
    config = config_of(tmp_path)
    nodes = Nodes(config, FOUR)

    async def act(story: Story) -> None:
        await story.training(4)
        for given in ("n3", "n4"):
            failed = {"is": "partner_failed", "device": 0, "generation": nodes.agents["n1"].generation}
            nodes.agents["n1"].tell({**failed, "cause": "it has taken nothing for 5 s"})
            wanted = nodes.number(given)
            await story.until(lambda wanted=wanted: nodes.agents["n1"].partner == wanted, "another partner")
        nodes.agents["n1"].tell({**failed, "cause": "refused"})
        await story.until(lambda: len(story.events("second_copy_failed")) == 3, "the third failure")
        worker = story.controller.fleet.workers()[0]
        assert worker.partner is None

    _, story = play(config, nodes, act)
    causes = [(event["partner"], event["cause"]) for event in story.events("second_copy_failed")]
    assert causes == [
        ("n2", "it has taken nothing for 5 s; n3 keeps them from now on"),
        ("n3", "it has taken nothing for 5 s; n4 keeps them from now on"),
        ("n4", "refused; no other node can keep them"),
    ]
    assert "llm_parallel_elastic_single_copies 1" in (tmp_path / "run" / "elastic.prom").read_text()
