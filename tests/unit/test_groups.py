"""Groups of answers: how a record becomes one, and what each method makes of it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from llm_parallel.data.formats import BadRecord
from llm_parallel.data.groups import FORMS, Answer, Group
from llm_parallel.data.preference import PreferenceReader

ASKED = {"role": "user", "content": "2 and 2?"}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def group(*scores: float, labelled: bool = True) -> Group:
    """A group whose answers are named by their places."""
    answers = tuple(Answer((said(f"answer {place}"),), score) for place, score in enumerate(scores))
    return Group((ASKED,), answers, labelled=labelled)


def places(groups: Any) -> list[list[tuple[str, float]]]:
    return [[(answer.messages[0]["content"][-1], answer.score) for answer in one.answers] for one in groups]


def test_the_forms_of_a_pair() -> None:
    """Texts, messages, and messages whose beginning both share are one and the same pair."""
    texts = {"prompt": "2 and 2?", "chosen": "4", "rejected": "5"}
    messages = {"prompt": [ASKED], "chosen": [said("4")], "rejected": [said("5")]}
    shared = {"chosen": [ASKED, said("4")], "rejected": [ASKED, said("5")]}
    found = [PreferenceReader().read(record) for record in (texts, messages, shared)]
    assert found[0] == found[1] == found[2]
    assert [answer.score for answer in found[0].answers] == [1.0, 0.0]


def test_only_answers_are_trained_and_not_the_turns_before_them() -> None:
    prompt = [ASKED, said("4"), {"role": "user", "content": "sure?"}]
    pair = PreferenceReader().read({"prompt": prompt, "chosen": "yes", "rejected": "no"})
    for conversation in pair.conversations():
        assert conversation.weights == [0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "a", "chosen": "b"}, "no field 'rejected'"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "all the same"),
        ({"chosen": [said("b")], "rejected": [said("c")]}, "no prompt"),
        ([1], "no record"),
    ],
)
def test_records_of_which_nothing_can_be_learned(record: Any, reason: str) -> None:
    with pytest.raises(BadRecord, match=reason):
        PreferenceReader().read(record)


def test_pairs_are_the_best_with_the_worst() -> None:
    found = places(FORMS["dpo"](group(0.1, 0.9, 0.5, 0.5, 0.2)))
    assert found == [[("1", 0.9), ("0", 0.1)], [("2", 0.5), ("4", 0.2)]]
    assert places(FORMS["dpo"](group(0.5, 0.5))) == []


def test_singles_are_liked_as_their_record_says_else_above_the_mean() -> None:
    assert places(FORMS["kto"](group(1.0, 0.0))) == [[("0", 1.0)], [("1", 0.0)]]
    found = places(FORMS["kto"](group(7.0, 4.0, 1.0, labelled=False)))
    assert found == [[("0", 1.0)], [("2", 0.0)]]


def test_rankings_need_answers_of_which_one_is_better() -> None:
    for scores in itertools.product((0.0, 1.0), repeat=3):
        assert len(places(FORMS["rrhf"](group(*scores)))) == (len(set(scores)) > 1)
