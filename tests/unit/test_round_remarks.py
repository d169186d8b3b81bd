"""What a round says of itself."""

from __future__ import annotations

from types import SimpleNamespace as Fake

import pytest

from llm_parallel.tune.rollout import Judged, unfinished_pays
from llm_parallel.tune.round_files import Answered


def judged(score: float, reason: str) -> Judged:
    return Judged(Answered(0, 0, (5, 6), (-1.0, -1.0), reason), score)


@pytest.mark.parametrize(
    ("unfinished", "ended", "said"),
    [
        (0.0, [-1.0, -2.0], True),
        (-2.0, [-1.0, -2.0], False),
        (0.0, [1.0, 0.0], False),
        (0.0, [0.0, 0.0], False),
        (None, [-1.0, -2.0], False),
        (0.0, [], False),
    ],
)
def test_a_score_of_unfinished_answers_that_teaches_not_to_stop_is_said(
    unfinished: float | None, ended: list[float], said: bool
) -> None:
    config = Fake(method=Fake(rollout=Fake(unfinished_score=unfinished)))
    finished = [judged(score, "stop") for score in ended]
    sentences = unfinished_pays([*finished, judged(unfinished or 0.0, "length")], config)  # type: ignore[arg-type]
    assert len(sentences) == said
    assert not said or "unfinished_score = 0, and those that end -1.5 on average" in sentences[0]
    assert not unfinished_pays(finished, config), "nothing is learned of it where all end"  # type: ignore[arg-type]
