"""A language model as a judge: what is asked, how replies are read, what is asked again, and what is never written."""

from __future__ import annotations

import json
import math
import threading
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given as for_all
from hypothesis import strategies as st

from llm_parallel.config.tree_online import JudgeConfig
from llm_parallel.errors import UserError
from llm_parallel.tasks.asking import Asking, Nonsense, NoReply
from llm_parallel.tasks.base import Asked, Given, JudgeFailed
from llm_parallel.tasks.model_judge import Model, Rival, Scale, Verdict, read_verdict
from llm_parallel.tasks.open import open_judge
from llm_parallel.tasks.readings import readings
from tests.support.fake_openai import Problem, fake_openai
from tests.support.served import running_server, served_folder

ASKED = Asked([{"role": "user", "content": "What is 2+2?"}], {"answer": "4", "topic": ["sums"]}, "a.jsonl:3")
NOWHERE = "http://127.0.0.1:9/v1"


def asking(base: str, **settings: Any) -> Asking:
    return Asking(base, "judge", **{"tries": 3, "pause_s": 0.0, "timeout_s": 20.0, **settings})


NUMBERS = [
    ("7", 7.0),
    (" 7.5 \n", 7.5),
    ("It is good.\n\nScore: 8", 8.0),
    ("**Rating:** 9", 9.0),
    ("[[10]]", 10.0),
    ("Final score is 3.", 3.0),
    ("6/10", 6.0),
    ("Score: 1 / 10", 1.0),
    ("", None),
    ("seven", None),
    ("7 or 8", None),
    ("The answer 4 is right", None),
    ("11", None),
    ("0", None),
    ("-3", None),
    ("Score: -3", None),
    ("- 3", 3.0),
    ("4/5", None),
    ("nan", None),
    ("1e1", None),
    ("8\nThat is my score", None),
    ("7 points", None),
]


@pytest.mark.parametrize(("text", "number"), NUMBERS)
def test_a_number_is_read_strictly(text: str, number: float | None) -> None:
    if number is None:
        with pytest.raises(Nonsense):
            Scale(1, 10).read(text, "number")
    else:
        assert Scale(1, 10).read(text, "number") == number


JSONS = [
    ('{"score": 7}', 7.0),
    ('{"reason": "fine", "score": 2.5}', 2.5),
    ('Here:\n```json\n{"score": 3}\n```', 3.0),
    ('{"score": "7"}', None),
    ('{"score": true}', None),
    ('{"score": 70}', None),
    ('{"points": 7}', None),
    ("7", None),
    ("[7]", None),
    ('{"score": NaN}', None),
    ('{"score": 7', None),
    ("[" * 100_000, None),
]


@pytest.mark.parametrize(("text", "number"), JSONS)
def test_a_json_object_is_read_strictly(text: str, number: float | None) -> None:
    if number is None:
        with pytest.raises(Nonsense):
            Scale(1, 10).read(text, "json")
    else:
        assert Scale(1, 10).read(text, "json") == number


@for_all(st.floats(-100, 100), st.floats(-100, 100), st.floats(0, 1))
def test_the_worst_number_is_0_and_the_best_1(lowest: float, highest: float, share: float) -> None:
    scale = Scale(lowest, highest)
    if abs(lowest - highest) > 1e-6:
        assert (scale.share(lowest), scale.share(highest)) == (0.0, 1.0)
        assert math.isclose(scale.share(lowest + share * (highest - lowest)), share, abs_tol=1e-6)


@pytest.mark.parametrize(
    ("text", "winner"),
    [
        ("A", "a"),
        ("b", "b"),
        ("tie", "tie"),
        ("[[C]]", "tie"),
        ("Both are fine, but\nVerdict: **B**", "b"),
        ("(A)", "a"),
        ("A and B", None),
        ("A is better", None),
        ("", None),
        ("D", None),
    ],
)
def test_a_verdict_is_read_strictly(text: str, winner: str | None) -> None:
    if winner is None:
        with pytest.raises(Nonsense):
            read_verdict(text)
    else:
        assert read_verdict(text) == winner


def test_an_answer_is_scored() -> None:
    with fake_openai(lambda body, number: "<think>3\n</think>\nIt is right.\n10") as fake:
        model = Model(asking(fake.base, key="sk-1", parameters={"temperature": 0.0, "max_tokens": 9}))
        assert model(ASKED, Given("It is {answer}.", 3)) == 1.0
        path, headers, body = fake.asked[0]
        assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer sk-1"
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge", 0.0, 9)
        assert "What is 2+2?" in fake.last and "It is {answer}." in fake.last and "from 1 (useless" in fake.last
        own = replace(model, template="{topic} {answer} {prompt} {lowest}", scale=Scale(10, 0))
        assert own(ASKED, Given("x", 1)) == 0.0
        assert fake.last == '["sums"] x What is 2+2? 10'


def test_a_template_that_names_what_a_record_lacks_is_an_error() -> None:
    with pytest.raises(JudgeFailed, match=r"a\.jsonl:3 has no field 'rubric', which the template of the judge names"):
        Model(asking(NOWHERE), template="{answer} {rubric}")(ASKED, Given("x", 1))


def test_nonsense_is_asked_again_and_then_an_error() -> None:
    replies = ["good", "very good", "8"]
    with fake_openai(lambda body, number: replies[number]) as fake:
        assert Model(asking(fake.base), Scale(0, 8))(ASKED, Given("x", 1)) == 1.0
        said = [one["content"] for one in fake.asked[2][2]["messages"]]
        assert said[1] == "very good" and "must end with a line that is a number from 0 to 8" in said[2]
    with fake_openai(lambda body, number: "good") as fake:
        with pytest.raises(JudgeFailed) as failed:
            Model(asking(fake.base))(ASKED, Given("x", 1))
        assert str(failed.value) == (
            f"the judge judge at {fake.base}: it replies 'good', but it must end with a line that is a number from 1 "
            "to 10 (for a.jsonl:3)"
        )
        assert len(fake.asked) == 3


BUSY = Problem(429, (("Retry-After", "0"),))
REFUSED = [
    (Problem(401), 1, "status 401: 'no'; the API key is not taken"),
    (Problem(404, body=b"not found"), 1, "it answers with status 404"),
    (Problem(302, (("Location", "http://192.0.2.1/"),)), 1, "sends on to http://192.0.2.1/; give that address"),
    (Problem(500), 3, "it answers with status 500: 'no'"),
    (BUSY, 3, "it answers with status 429"),
    (Problem(body=b"<html>"), 1, "it does not answer as OpenAI's interface does"),
    (Problem(body=b'{"choices": []}'), 1, "it does not answer as OpenAI's interface does"),
    (Problem(body=b'{"choices": [{"message": {"content": ""}, "finish_reason": "length"}]}'), 3, "max_reply_tokens"),
    (Problem(body=b'{"choices": [{"message": {"content": null}}]}'), 3, "its reply is empty"),
    (Problem(body=b'{"error": {"message": "sk-secret is wrong"}}', status=403), 1, "is wrong'; the API key is not"),
]


@pytest.mark.parametrize(("problem", "requests", "said"), REFUSED)
def test_what_a_server_refuses_is_an_error_and_no_zero(problem: Problem, requests: int, said: str) -> None:
    with fake_openai(lambda body, number: problem) as fake:
        with pytest.raises(JudgeFailed) as failed:
            Model(asking(fake.base, key="sk-secret"))(ASKED, Given("x", 1))
        assert said in str(failed.value) and "(for a.jsonl:3)" in str(failed.value)
        assert "sk-secret" not in str(failed.value)
        assert len(fake.asked) == requests


def test_a_busy_server_is_asked_again() -> None:
    with fake_openai(lambda body, number: (BUSY, Problem(503), "5")[number]) as fake:
        assert Model(asking(fake.base), Scale(0, 10))(ASKED, Given("x", 1)) == 0.5


def test_a_server_that_does_not_listen_or_reply_is_an_error() -> None:
    with pytest.raises(JudgeFailed, match=r"judge at .*: it cannot be reached: nothing listens there"):
        Model(asking(NOWHERE))(ASKED, Given("x", 1))
    waits = threading.Event()

    def late(body: dict[str, Any], number: int) -> str:
        waits.wait()
        return "5"

    with fake_openai(late) as fake:
        with pytest.raises(JudgeFailed, match="it cannot be reached: it does not answer"):
            Model(asking(fake.base, timeout_s=0.05, tries=1))(ASKED, Given("x", 1))
        waits.set()


def test_the_cache_knows_everything_that_matters(tmp_path: Path) -> None:
    with fake_openai(lambda body, number: str(number % 10 + 1)) as fake:
        one = Model(asking(fake.base, cache=tmp_path, key="sk-secret", parameters={"temperature": 0.0}))
        first = one(ASKED, Given("x", 1))
        assert one(ASKED, Given("x", 1)) == first and len(fake.asked) == 1
        again = asking(fake.base, cache=tmp_path, key=None, tries=9, timeout_s=1.0, parameters={"temperature": 0.0})
        assert Model(again)(ASKED, Given("x", 1)) == first and len(fake.asked) == 1, "a key changes no reply"
        for other in (
            replace(one.asking, name="other"),
            replace(one.asking, parameters={"temperature": 1.0}),
            replace(one.asking, base=fake.base + "/"),
        ):
            before = len(fake.asked)
            replace(one, asking=other)(ASKED, Given("x", 1))
            assert len(fake.asked) == before + 1
        before = len(fake.asked)
        replace(one, template="{answer}")(ASKED, Given("x", 1))
        one(ASKED, Given("y", 1))
        assert len(fake.asked) == before + 2
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(kept) == 6 and all("sk-secret" not in path.read_text() for path in kept)
    assert "sk-secret" not in repr(one)


def test_what_is_broken_in_the_cache_is_asked_again(tmp_path: Path) -> None:
    with fake_openai(lambda body, number: "7") as fake:
        model = Model(asking(fake.base, cache=tmp_path))
        model(ASKED, Given("x", 1))
        (kept,) = tmp_path.rglob("*.json")
        for text in ("", '{"reply": 7}', '{"reply": "nonsense"}', "[]"):
            kept.write_text(text)
            assert model(ASKED, Given("x", 1)) == pytest.approx(2 / 3)
        assert len(fake.asked) == 5 and json.loads(kept.read_text())["reply"] == "7"
        (tmp_path / "file").write_text("x")
        with pytest.raises(UserError, match=r"the cache .*file cannot be written"):
            Model(asking(fake.base, cache=tmp_path / "file"))(ASKED, Given("x", 1))


def test_two_answers_are_compared_in_both_orders() -> None:
    def likes_right(body: dict[str, Any], number: int) -> str:
        text = body["messages"][0]["content"]
        first = text.index("right") if "right" in text else -1
        return "A" if 0 <= first < text.index("[The answer of assistant B]") else "B"

    with fake_openai(likes_right) as fake:
        model = Model(asking(fake.base))
        assert model.compare(ASKED, "the right one", "wrong") == Verdict("a", True)
        assert model.compare(ASKED, "wrong", "the right one") == Verdict("b", True)
        assert Rival(model, "answer")(ASKED, Given("right", 1)) == 1.0
    with fake_openai(lambda body, number: "A") as fake:
        assert Model(asking(fake.base)).compare(ASKED, "x", "y") == Verdict("tie", False), "it likes the first place"
        assert Rival(Model(asking(fake.base)), "answer")(ASKED, Given("right", 1)) == 0.5
    with fake_openai(lambda body, number: "tie") as fake:
        assert Model(asking(fake.base)).compare(ASKED, "x", "y") == Verdict("tie", True)
    with pytest.raises(JudgeFailed, match="must be a text"):
        Rival(Model(asking(NOWHERE)), "topic")(ASKED, Given("right", 1))


def test_a_run_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    with fake_openai(lambda body, number: str(len(body["messages"][0]["content"]))) as fake:
        config = JudgeConfig(
            kind="model", url=fake.base, model="m", template="{answer}", scale=(0, 4), key_from="JUDGE_KEY",
            cache=str(tmp_path), at_once=3,
        )  # fmt: skip
        judge = open_judge([config])
        items = [(ASKED, Given("x" * number, 1)) for number in range(1, 5)]
        judge.prepare(items)
        assert len(fake.asked) == 4
        assert [judge(*item) for item in items] == [0.25, 0.5, 0.75, 1.0] and len(fake.asked) == 4
        assert {headers["Authorization"] for _, headers, _ in fake.asked} == {"Bearer sk-secret"}
        assert readings([config], ASKED) == [f"what m at {fake.base} says of the answer, from 0 to 4"]
    assert "sk-secret" not in repr(judge) and "sk-secret" not in config.model_dump_json()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "judges.0.url is not given; method.rollout.judges.0.kind = model needs the address and the model's name"),
    ({"url": NOWHERE}, "judges.0.model is not given"),
    ({"url": "nowhere", "model": "m"}, "judges.0.url: nowhere is no address of a server; give one such as http"),
    ({"url": "ftp://a/v1", "model": "m"}, "judges.0.url: ftp://a/v1 is no address of a server"),
    ({"url": "http://me:pw@a/v1", "model": "m"}, "the address has a user name in it; set an API key in an environment"),
    ({"url": NOWHERE, "model": "m", "scale": (1, 1)}, "judges.0.scale = [1.0, 1.0] must be two numbers"),
    ({"url": NOWHERE, "model": "m", "template": "x"}, "judges.0.template does not name {answer}"),
    ({"url": NOWHERE, "model": "m", "template": "{answer}", "reads": "pair"}, "does not name {answer_a}"),
    ({"url": NOWHERE, "model": "m", "reads": "json"}, "judges.0.reads = json needs"),
    ({"url": NOWHERE, "model": "m", "key_from": "NO_SUCH_KEY"}, "key_from = NO_SUCH_KEY names an environment variable"),
    ({"url": NOWHERE, "model": "m", "key_from": "BAD_KEY"}, "the API key in BAD_KEY has a space"),
]


@pytest.mark.parametrize(("settings", "said"), WRONG)
def test_settings_that_cannot_be_are_refused(
    settings: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    monkeypatch.setenv("BAD_KEY", "sk secret")
    with pytest.raises(UserError) as refused:
        open_judge([JudgeConfig(kind="model", **settings)])
    assert said in str(refused.value) and "sk secret" not in str(refused.value)


def test_what_cannot_be_had_says_why() -> None:
    with fake_openai(lambda body, number: "x") as fake, pytest.raises(NoReply, match="but it is wrong"):

        def never(text: str) -> float:
            raise Nonsense("it is wrong")

        asking(fake.base).ask("?", never)


@pytest.mark.slow
@pytest.mark.processes
def test_a_server_of_ours_judges(tmp_path: Path) -> None:
    """A random model writes nonsense, so each reply is refused, and the judge says what it got."""
    with running_server(served_folder(tmp_path / "model")) as server:
        (name,) = [one["id"] for one in json.load(urllib.request.urlopen(server.base + "/v1/models"))["data"]]
        parameters = {"temperature": 0.0, "max_tokens": 8}
        model = Model(Asking(server.base + "/v1", name, parameters=parameters, tries=2, pause_s=0.0))
        with pytest.raises(JudgeFailed, match=r"(it replies|its reply is empty).*\(for a\.jsonl:3\)"):
            model(ASKED, Given("4", 1))
        lenient = Asking(
            server.base + "/v1", name, parameters=parameters, tries=20, pause_s=0.0, cache=tmp_path / "kept"
        )
        text = lenient.ask("Say something.", lambda reply: reply)
        assert text and lenient.ask("Say something.", lambda reply: reply) == text
        with pytest.raises(JudgeFailed, match="status 404"):
            Model(replace(model.asking, name="another"))(ASKED, Given("4", 1))
