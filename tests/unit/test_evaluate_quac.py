"""QuAC's scorer against cases worked out by hand from the official scorer's rules."""

from __future__ import annotations

import pytest

from llm_parallel.evaluate.quac import (
    NO_ANSWER,
    against_all,
    f1,
    kept_references,
    of_people,
    quac_rows,
    results,
    share_of_dialogues,
)


@pytest.mark.parametrize(
    ("answer", "reference", "wanted"),
    [
        ("The Cat!", "a cat", 1.0),  # case, punctuation and articles do not count
        ("the black cat sat", "a black dog sat down", 4 / 7),  # 2 of 3 words, 2 of 4: 2 * 2 / 7
        ("cat cat cat", "cat", 0.5),  # a repeated word counts as often as in the reference
        ("dog", "cat", 0.0),
        (NO_ANSWER, NO_ANSWER, 1.0),
        (NO_ANSWER, "cat", 0.0),
        ("cat", NO_ANSWER, 0.0),
        ("", "cat", 0.0),
    ],
)
def test_f1(answer: str, reference: str, wanted: float) -> None:
    assert f1(answer, reference) == pytest.approx(wanted)


def test_each_reference_is_left_out_in_turn() -> None:
    # Against {red car, blue bus}: without the first 0, without the second 1; against three: 1, 1, 0.5 with one right.
    assert against_all("red car", ["red car", "blue bus"]) == pytest.approx(0.5)
    assert against_all("red car", ["red car", "blue bus", "green car"]) == pytest.approx((0.5 + 1 + 1) / 3)
    assert against_all("red car", ["red car"]) == 1.0


def test_agreement_of_people() -> None:
    # red car / red bus: 0.5 each way; a third that agrees with nobody adds 0.
    assert of_people(["red car", "red bus"]) == pytest.approx(0.5)
    assert of_people(["red car", "red bus", "tree"]) == pytest.approx(1 / 3)
    assert of_people(["alone"]) == 1.0


@pytest.mark.parametrize(
    ("texts", "wanted"),
    [
        (["one", NO_ANSWER, NO_ANSWER], [NO_ANSWER]),
        (["one", NO_ANSWER], [NO_ANSWER]),  # a tie: there is no answer
        (["one", "two", NO_ANSWER], ["one", "two"]),
        ([" one "], ["one"]),
    ],
)
def test_references_that_count(texts: list[str], wanted: list[str]) -> None:
    assert kept_references(texts) == wanted


def article(*answers: list[str]) -> dict[str, object]:
    qas = [
        {"question": f"q{place}?", "orig_answer": {"text": texts[0]}, "answers": [{"text": text} for text in texts]}
        for place, texts in enumerate(answers)
    ]
    paragraph = {"id": "C_1", "context": f"Some text. {NO_ANSWER}", "qas": qas}
    return {"title": "Anna", "section_title": "Life", "paragraphs": [paragraph]}


def test_questions_on_which_people_disagree_are_left_out_and_stay_in_later_prompts() -> None:
    rows = list(quac_rows(article(["red car", "tree house"], ["blue bus", "the bus"])))
    assert len(rows) == 1 and rows[0]["references"] == ["blue bus", "the bus"]
    assert rows[0]["prompt"] == ("Title: Anna - Life\nBackground: Some text.\n\nQ: q0?\nA: red car\nQ: q1?\nA:")


def test_human_equivalence() -> None:
    rows = list(quac_rows(article(["red car"], ["blue bus", "blue bus stop"])))
    first, second = results(rows[0], [" red car\nQ: more"]), results(rows[1], ["a bus"])
    assert first == {"f1": 1.0, "heq_q": 1.0, "heq_d": ("C_1", True)}
    # bus against {blue bus}: 2/3, against {blue bus stop}: 1/2; people: 0.8
    assert second["f1"] == pytest.approx((2 / 3 + 1 / 2) / 2) and second["heq_q"] == 0.0
    assert share_of_dialogues([first["heq_d"], second["heq_d"], ("C_2", True)]) == 0.5


def test_no_answer_is_recognised_in_what_a_model_writes() -> None:
    rows = list(quac_rows(article([NO_ANSWER])))
    assert results(rows[0], [" Cannot answer."])["f1"] == 1.0
    assert results(rows[0], [" CANNOTANSWER"])["f1"] == 1.0
    assert results(rows[0], [" in Rome"])["f1"] == 0.0


def test_a_dialogue_counts_if_every_question_of_it_does() -> None:
    assert share_of_dialogues([("a", False), ("b", True), ("a", True), ("c", True), ("c", False), ("b", True)]) == 1 / 3
