"""Annotation without a browser: what is read and left out, who gets which item, what survives a kill, how far people
agree, and what their judgements become."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_parallel.annotate.agreement import agreement, cohen_kappa, krippendorff_alpha, said, units_of
from llm_parallel.annotate.app import Desk, build_app
from llm_parallel.annotate.board import Board, BoardOptions, Judgement, tasks_of
from llm_parallel.annotate.export import exported, verdicts, wins_of, write_files
from llm_parallel.annotate.items import Item, read_items, text_of
from llm_parallel.data.formats import Reader
from llm_parallel.data.groups import FORMS
from llm_parallel.data.preference import PreferenceReader
from llm_parallel.errors import UserError
from llm_parallel.jsonlines import JsonLines, read_jsonlines
from llm_parallel.serve.guard import LOOPBACK_NAMES, Access
from llm_parallel.serve.listen import listen
from tests.support.annotating import board_of, judged, write_answers
from tests.support.in_process import in_process
from tests.support.round_records import write_rounds


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said_by_model(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def rows_file(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


READ: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "2+2?", "responses": ["4", "5"]},
    "messages": {"messages": [user("2+2?")], "responses": [[said_by_model("4")], said_by_model("5")]},
    "whole conversations": {
        "prompt": [user("2+2?")], "responses": [[user("2+2?"), said_by_model("4")], [user("2+2?"), said_by_model("5")]]
    },
    "objects with their model": {"query": "2+2?", "answers": [{"model": "a", "response": "4"}, {"text": "5"}]},
    "a pair": {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
    "scores that are there are not shown": {"instruction": "2+2?", "responses": ["4", "5"], "scores": [1, 0]},
}  # fmt: skip


@pytest.mark.parametrize("record", READ.values(), ids=READ)
def test_every_form_is_the_same_item(record: dict[str, Any], tmp_path: Path) -> None:
    (item,) = read_items(rows_file(tmp_path / "a.jsonl", record))
    assert list(item.prompt) == [user("2+2?")] and [text_of(answer) for answer in item.answers] == ["4", "5"]
    (plain,) = read_items(rows_file(tmp_path / "b.jsonl", READ["texts"]))
    assert item.id == plain.id, "what was judged counts, in whatever form the answers come again"


def test_answers_of_generate_meet_their_prompts(tmp_path: Path) -> None:
    lines = [{"number": n, "sample": s, "text": f"{n}.{s}", "tokens": [1]} for s in (1, 0) for n in (0, 2)]
    answers = rows_file(tmp_path / "answers.jsonl", *lines, {"number": 9, "sample": 0, "text": "x"})
    prompts = rows_file(tmp_path / "prompts.jsonl", *({"prompt": f"Q{n}"} for n in range(3)))
    with pytest.raises(UserError, match="without their prompts; give the file that was answered with --prompts"):
        read_items(answers)
    told: list[str] = []
    found = read_items(answers, prompts, told.append)
    assert [(item.prompt[0]["content"], [text_of(one) for one in item.answers]) for item in found] == [
        ("Q0", ["0.0", "0.1"]), ("Q2", ["2.0", "2.1"])
    ]  # fmt: skip
    assert told == [f"{answers}: left out 1 records that cannot be read: {answers} line 5 answers prompt 9, and "
                    f"{prompts} has 3 prompts"]  # fmt: skip


def test_answers_of_a_run_in_rounds(tmp_path: Path) -> None:
    """By the records that rounds leave, with the tokenizer and prompts that the run's data folder names."""
    run_dir = write_rounds(tmp_path / "run", {3: [[("15", 1.0), ("51", 0.0)]]}, ["12+3"])
    (item,) = read_items(run_dir)
    assert [text_of(one) for one in item.answers] == ["15", "51"] and item.prompt == (user("12+3"),)
    with pytest.raises(UserError, match="has no rounds/ with answers"):
        read_items(tmp_path)


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    path = rows_file(
        tmp_path / "a.jsonl", {"prompt": "Q", "responses": ["a", "b", "a"]}, {"prompt": "Q", "responses": ["a", "b"]},
        "{broken", {"prompt": "Q"}, {"responses": ["a"]}, {"prompt": "Q", "responses": ["a", " "]},
        {"prompt": "Q", "responses": "a"}, [1], {"prompt": "one", "responses": ["a"]},
    )  # fmt: skip
    told: list[str] = []
    items = read_items(path, notice=told.append)
    assert len(items) == 2 and [len(item.answers) for item in items] == [2, 1]
    assert "left out 6 records" in told[0] and "line 3 is not JSON" in told[0] and "and 1 more" in told[0]
    assert told[1:] == [
        f"{path}: left out 1 record that is there already",
        f"{path}: 1 answer that another one of the same prompt repeats, shown once",
    ]
    tasks, alone = tasks_of(items, "best")
    assert (len(tasks), alone) == (1, 1) and len(tasks_of(items, "good-bad")[0]) == 3


BAD: dict[str, tuple[Sequence[str], str]] = {
    "a file that is not there": (["FOLDER/gone.jsonl"], "gone.jsonl does not exist; give a file with"),
    "an empty file": (["FOLDER/empty.jsonl"], "empty.jsonl is empty"),
    "no prompts with answers": (["FOLDER/none.jsonl"], "has no prompt with answers: left out 2 records"),
    "one answer each": (["FOLDER/single.jsonl"], "--mode good-bad judges single ones"),
    "a mode that there is not": (["FOLDER/a.jsonl", "--mode", "worst"], "--mode is worst; it must be best, ranking"),
    "no annotators": (["FOLDER/a.jsonl", "--overlap", "0"], "--overlap is 0; it must be at least 1"),
    "a port that there is not": (["FOLDER/a.jsonl", "--port", "70000"], "--port is 70000; it must be 0 to 65535"),
    "a port that is taken": (["FOLDER/a.jsonl", "--port", "TAKEN"], "cannot be listened on (Address already in use)"),
    "an address of another machine": (["FOLDER/a.jsonl", "--host", "192.0.2.1"], "--host 192.0.2.1"),
    "a folder that cannot be written": (
        ["FOLDER/a.jsonl", "--out", "FOLDER/a.jsonl/x.jsonl", "--port", "0"], "cannot be written (its folder is a file)"
    ),
    "a file of judgements that is a folder": (
        ["FOLDER/a.jsonl", "--out", "FOLDER/folder", "--port", "0"], "cannot write FOLDER/folder: Is a directory"
    ),
    "nothing to export": (["FOLDER/a.jsonl", "--export"], "a.annotations.jsonl does not exist, so nothing was judged"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "words"), BAD.values(), ids=BAD)
def test_a_mistake_is_one_sentence(arguments: Sequence[str], words: str, tmp_path: Path) -> None:
    write_answers(tmp_path / "a.jsonl", 2)
    rows_file(tmp_path / "empty.jsonl")
    rows_file(tmp_path / "none.jsonl", {"prompt": "Q"}, "{")
    rows_file(tmp_path / "single.jsonl", {"prompt": "Q", "responses": ["a"]})
    (tmp_path / "folder").mkdir()
    taken = listen("127.0.0.1", 0)
    taken.listen(1)
    try:
        names = {"FOLDER": str(tmp_path), "TAKEN": str(taken.getsockname()[1])}
        for name, value in names.items():
            arguments, words = [one.replace(name, value) for one in arguments], words.replace(name, value)
        result = in_process("annotate", *arguments)
    finally:
        taken.close()
    said_ = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and len(said_) == 1 and words in said_[0], result.stderr


# The board.


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["judge", "judge", "next", "skip", "undo", "later", "restart", "torn"]),
              st.sampled_from(["ann", "bob", "cy"]), st.randoms(use_true_random=False)),
    max_size=40,
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(operations=OPERATIONS, mode=st.sampled_from(["best", "ranking", "pair", "good-bad"]), overlap=st.integers(1, 3))
def test_whatever_people_and_the_machine_do(
    operations: list[Any], mode: str, overlap: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Against a model that is only a dictionary: nothing that was confirmed is lost by a restart or a torn line, and no
    item is with more people than it should be."""
    folder = tmp_path_factory.mktemp("board")
    items, out, clock = read_items(write_answers(folder / "a.jsonl", 2)), folder / "o.jsonl", Clock()
    options = BoardOptions(mode, overlap, lease_s=10.0)
    board = board_of(items, out, options, clock)
    expected: dict[str, dict[str, Any]] = {"ann": {}, "bob": {}, "cy": {}}
    looking: dict[str, str] = {}
    for operation, name, draw in operations:
        if operation == "later":
            clock.now += 7.0
        elif operation in ("restart", "torn"):
            if operation == "torn":
                with out.open("a") as handle:
                    handle.write('{"event": "judged", "task": "')
            board, looking = board_of(items, out, options, clock), {}
        elif operation == "undo":
            task = board.undo(name)
            assert (task is None) == (not expected[name])
            if task is not None:
                assert expected[name].popitem()[0] == task.id
                looking[name] = task.id
        else:
            task = board.next(name)
            if task is None:
                continue
            assert task.id not in expected[name]
            others = {other for other in expected if task.id in expected[other] and expected[other][task.id]}
            assert len(others - {name}) < overlap or looking.get(name) == task.id
            looking[name] = task.id
            if operation == "judge":
                size = len(task.answers)
                ranks = [draw.choice((1, 2))] if mode == "good-bad" else [2] * size
                if mode != "good-bad":
                    ranks[draw.randrange(size)] = 1
                board.judge(name, task.id, ranks)
                board.judge(name, task.id, ranks)  # the page sends it again
                order = board.order(name, task)
                expected[name].pop(task.id, None)
                expected[name][task.id] = tuple(ranks[order.index(place)] for place in range(size))
            elif operation == "skip":
                board.skip(name, task.id)
                expected[name][task.id] = None
    for one in (board, board_of(items, out, options, clock)):
        found: dict[str, dict[str, Any]] = {"ann": {}, "bob": {}, "cy": {}}
        for judgement in one.judgements():
            found[judgement.annotator][judgement.task] = judgement.ranks
        assert found == expected


def board(tmp_path: Path, clock: Clock, **options: Any) -> Board:
    items = read_items(write_answers(tmp_path / "a.jsonl", 3))
    return board_of(items, tmp_path / "o.jsonl", BoardOptions("best", **options), clock)


def test_two_never_have_the_same_item_until_a_lease_is_over(tmp_path: Path) -> None:
    clock = Clock()
    one = board(tmp_path, clock, lease_s=10.0)
    first, second = one.next("ann"), one.next("bob")
    assert first is not None and second is not None and first != second
    assert one.next("ann") == first, "after a reload it is the same"
    clock.now = 8.0
    one.hold("ann", first.id)
    clock.now = 12.0
    third = one.next("cy")
    assert third == second, "bob's lease is over, ann's was renewed"
    one.judge("bob", second.id, [1, 2, 2])
    assert [record["annotator"] for record in judged(tmp_path / "o.jsonl")] == ["bob"], "it is taken all the same"
    assert one.progress("cy") == {
        "judged": 0, "skipped": 0, "left": 1, "elsewhere": 1, "all": 1, "wanted": 3
    }  # fmt: skip


def test_skipped_items_come_again_if_they_are_asked_for(tmp_path: Path) -> None:
    one = board(tmp_path, Clock())
    for _ in range(3):
        task = one.next("ann")
        assert task is not None
        one.skip("ann", task.id)
    assert one.next("ann") is None and one.next("bob") is not None
    again = one.next("ann", again=True)
    assert again is not None
    one.judge("ann", again.id, [2, 1, 2])
    assert one.progress("ann")["skipped"] == 2


def test_answers_stand_in_another_order_for_each_annotator(tmp_path: Path) -> None:
    items = read_items(write_answers(tmp_path / "a.jsonl", 40))
    tasks, _ = tasks_of(items, "best")
    one = board_of(items, tmp_path / "o.jsonl", BoardOptions("best"))
    orders = [[one.order(name, task) for task in tasks] for name in ("ann", "bob")]
    assert orders[0] != orders[1] and orders[0] == [one.order("ann", task) for task in tasks]
    first = [order[0] for order in orders[0]]
    assert all(sorted(order) == [0, 1, 2] for order in orders[0]) and {first.count(n) for n in range(3)} <= {
        *range(5, 25)
    }


@pytest.mark.parametrize(
    ("mode", "ranks"),
    [("best", [1, 1, 2]), ("best", [2, 2, 2]), ("best", [1, 2]), ("best", [1, 2, 3]), ("ranking", [1, 3, 3]),
     ("ranking", [0, 1, 2]), ("good-bad", [3]), ("pair", [2, 2])],
    ids=str,
)  # fmt: skip
def test_what_is_no_judgement_is_refused(mode: str, ranks: list[int], tmp_path: Path) -> None:
    items = read_items(write_answers(tmp_path / "a.jsonl", 1))
    one = board_of(items, tmp_path / "o.jsonl", BoardOptions(mode))
    task = one.next("ann")
    assert task is not None
    with pytest.raises(UserError, match=r"ranks"):
        one.judge("ann", task.id, ranks)
    assert judged(tmp_path / "o.jsonl") == []


def test_a_judgement_is_on_the_disk_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = board(tmp_path, Clock())
    task = one.next("ann")
    assert task is not None
    synced: list[int] = []
    monkeypatch.setattr("llm_parallel.jsonlines.os.fsync", lambda _: synced.append(len(judged(tmp_path / "o.jsonl"))))
    for act in (
        lambda: one.judge("ann", task.id, [1, 2, 2]),
        lambda: one.undo("ann"),
        lambda: one.skip("ann", task.id),
    ):
        act()
    assert synced == [1, 2, 3], "once for each line, when it was there"


def test_a_full_disk_is_said_and_the_judgement_does_not_count(tmp_path: Path) -> None:
    items = read_items(write_answers(tmp_path / "a.jsonl", 1))
    log = JsonLines(tmp_path / "o.jsonl", sync=True, remedy="give another --out")
    log.close()
    one = Board(tasks_of(items, "best")[0], BoardOptions("best"), log, Clock())
    task = one.next("ann")
    assert task is not None
    with pytest.raises(UserError, match=r"cannot write .*o\.jsonl: Bad file descriptor; give another --out"):
        one.judge("ann", task.id, [1, 2, 2])
    assert one.judgements() == [] and one.next("ann") == task


# Agreement.


def test_alpha_is_that_of_krippendorffs_example() -> None:
    """The nominal example of "Computing Krippendorff's Alpha-Reliability": four observers, twelve units, 0.743."""
    observers = (
        "1 2 3 3 2 1 4 1 2 . . .",
        "1 2 3 3 2 2 4 1 2 5 . 3",
        ". 3 3 3 2 3 4 2 2 5 1 .",
        "1 2 3 3 2 4 4 1 2 5 1 .",
    )
    columns = list(zip(*(line.split() for line in observers)))
    units = [{str(who): value for who, value in enumerate(column) if value != "."} for column in columns]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)


def test_kappa_is_that_of_the_table() -> None:
    """20 times both yes, 15 times both no, 5 and 10 times not: (0.7 - 0.5) / (1 - 0.5)."""
    pairs = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    assert cohen_kappa(pairs) == pytest.approx(0.4)
    units = {number: {"ann": one, "bob": other} for number, (one, other) in enumerate(pairs)}
    found = agreement({**units, "alone": {"ann": "y"}})
    assert found.units == 50 and found.raw == pytest.approx(0.7)
    assert found.kappa == {("ann", "bob"): (pytest.approx(0.4), 50)}
    assert said(found)[1] == "ann and bob: Cohen's kappa 0.40 over 50"


def test_agreement_that_is_not_defined_is_said() -> None:
    assert "no agreement to speak of (give --overlap 2)" in said(agreement({1: {"ann": 1}}))[0]
    assert "not defined (all said the same)" in said(agreement({1: {"ann": 1, "bob": 1}}))[0]


# What the judgements become.


def all_judged(
    tmp_path: Path, mode: str, said_: dict[str, list[list[int] | None]], answers: int = 3
) -> tuple[Any, ...]:
    """Items, tasks and judgements; ranks in the order of the record's answers, by annotator and task."""
    items = read_items(write_answers(tmp_path / "a.jsonl", 2, answers))
    tasks, _ = tasks_of(items, mode)
    made = [
        Judgement(task.id, name, None if ranks is None else tuple(ranks))
        for name, each in said_.items()
        for task, ranks in zip(tasks, each)
    ]
    return items, {task.id: task for task in tasks}, made, mode


def texts(records: Sequence[Any], *names: str) -> list[Any]:
    def plain(value: Any) -> Any:
        return [one["content"] if isinstance(one, dict) else one for one in value] if isinstance(value, list) else value

    return [tuple(plain(record[name]) for name in names) for record in records]


def test_the_best_answers_of_two_annotators(tmp_path: Path) -> None:
    """They agree on the first prompt; on the second each has another best answer, of three."""
    said_ = {"ann": [[2, 1, 2], [1, 2, 2]], "bob": [[2, 1, 2], [2, 2, 1]]}
    found = exported(*all_judged(tmp_path, "best", said_))
    assert texts(found.records["sft"], "messages") == [(["Question 0?", "answer 0.1"],)]
    assert texts(found.records["rrhf"], "responses", "scores") == [
        (["answer 0.0", "answer 0.1", "answer 0.2"], [-1.0, 1.0, -1.0]),
        (["answer 1.0", "answer 1.1", "answer 1.2"], [pytest.approx(1 / 3), -1.0, pytest.approx(1 / 3)]),
    ]
    assert texts(found.records["dpo"], "chosen", "rejected") == [
        (["answer 0.1"], ["answer 0.2"]), (["answer 1.0"], ["answer 1.1"])
    ]  # fmt: skip
    assert [record["label"] for record in found.records["kto"]] == [False, True, False, True, False, True]
    assert (found.judged, found.ties) == (2, 0)


def test_rankings_with_ties(tmp_path: Path) -> None:
    found = exported(*all_judged(tmp_path, "ranking", {"ann": [[2, 1, 2], [1, 1, 1]]}))
    assert texts(found.records["rrhf"], "scores") == [([-0.5, 1.0, -0.5],)]
    assert found.ties == 1 and len(found.records["sft"]) == 1 and len(found.records["kto"]) == 3


def test_pairs_are_decided_by_the_majority(tmp_path: Path) -> None:
    """Three pairs of each prompt: 0-1, 0-2, 1-2."""
    said_: dict[str, list[list[int] | None]] = {
        "ann": [[1, 2], [1, 2], [2, 1], None, [1, 1], None],
        "bob": [[1, 2], [2, 1], [1, 1], None, None, None],
    }
    found = exported(*all_judged(tmp_path, "pair", said_))
    assert texts(found.records["dpo"], "chosen", "rejected") == [
        (["answer 0.0"], ["answer 0.1"]), (["answer 0.2"], ["answer 0.1"])
    ]  # fmt: skip
    assert texts(found.records["rrhf"], "scores") == [([0.5, -0.75, 0.25],)]
    assert (found.judged, found.ties, found.skipped) == (2, 1, 3)


def test_good_and_bad(tmp_path: Path) -> None:
    """One answer of which as many say good as bad is left out."""
    said_ = {"ann": [[1], [2], [1], [2], [2], [2]], "bob": [[1], [2], [2], [2], [2], [2]]}
    found = exported(*all_judged(tmp_path, "good-bad", said_))
    assert texts(found.records["kto"], "completion", "label") == [
        (["answer 0.0"], True), (["answer 0.1"], False),
        (["answer 1.0"], False), (["answer 1.1"], False), (["answer 1.2"], False),
    ]  # fmt: skip
    assert texts(found.records["sft"], "messages") == [(["Question 0?", "answer 0.0"],)]
    assert texts(found.records["dpo"], "chosen", "rejected") == [(["answer 0.0"], ["answer 0.1"])]
    assert found.ties == 1


@pytest.mark.parametrize("mode", ["best", "ranking", "pair", "good-bad"])
def test_training_reads_what_is_written(mode: str, tmp_path: Path) -> None:
    """Every record of every mode by the readers of training; and what a method makes of it is the record's content."""
    size = {"good-bad": 1, "pair": 2}.get(mode, 3)
    each: list[list[int] | None] = [[1, *[2] * (size - 1)] if number % 3 or size > 1 else [2] for number in range(6)]
    items, tasks, made, _ = all_judged(tmp_path, mode, {"ann": each})
    found = exported(items, tasks, made, mode)
    files = write_files(found, tmp_path / "o.jsonl")
    assert {path.name for path in files} == {f"o.{kind}.jsonl" for kind in ("dpo", "kto", "rrhf", "sft")}
    for path in files:
        kind, records = path.suffixes[-2][1:], [json.loads(line) for line in path.open()]
        assert records
        for record in records:
            if kind == "sft":
                conversation = Reader("auto").read(record)
                assert conversation.weights == [0.0, 1.0]
                continue
            group = PreferenceReader().read(record)
            assert list(FORMS[kind](group)) and group.prompt[0]["role"] == "user"
            if kind == "dpo":
                assert [list(one.messages) for one in group.answers] == [record["chosen"], record["rejected"]]


def test_earlier_turns_of_the_assistant_are_not_trained(tmp_path: Path) -> None:
    record = {"messages": [user("1"), said_by_model("a"), user("2")], "responses": ["b", "c"]}
    items = read_items(rows_file(tmp_path / "a.jsonl", record))
    tasks, _ = tasks_of(items, "best")
    found = exported(items, {tasks[0].id: tasks[0]}, [Judgement(tasks[0].id, "ann", (1, 2))], "best")
    assert Reader("auto").read(found.records["sft"][0]).weights == [0.0, 0.0, 0.0, 1.0]


def test_the_command_exports_and_says_what(tmp_path: Path) -> None:
    path = write_answers(tmp_path / "a.jsonl", 2)
    one = board_of(read_items(path), tmp_path / "a.annotations.jsonl", BoardOptions("best"))
    for _ in range(2):
        task = one.next("ann")
        assert task is not None
        ranks = [2, 2, 2]
        ranks[one.order("ann", task).index(1)] = 1
        one.judge("ann", task.id, ranks)
    result = in_process("annotate", path, "--export")
    assert result.returncode == 0, result.stderr
    assert "2 prompts of 2 judged, 0 tasks skipped" in result.stdout
    assert "secret-1: mean score +1.00 over 2 answers" in result.stdout
    assert f"{tmp_path}/a.annotations.dpo.jsonl: 2 for dpo" in result.stdout
    other = in_process("annotate", path, "--export", "--mode", "ranking")
    assert "2 records of other items or of another mode" in other.stderr and "nothing is judged yet" in other.stdout


def test_models_are_counted_where_there_are_several(tmp_path: Path) -> None:
    items, tasks, made, mode = all_judged(tmp_path, "best", {"ann": [[1, 2, 2], [1, 2, 2]]})
    assert wins_of(verdicts(items, tasks, made, mode))[0] == "secret-0: mean score +1.00 over 2 answers"
    units = units_of(tasks, made, mode)
    assert sorted(value for values in units.values() for value in values.values()) == [1, 1]


# Who may ask.


def ask(board_: Board, requests: Sequence[tuple[str, dict[str, Any], dict[str, str]]], access: Access) -> list[Any]:
    """Answers to some requests of one client."""

    async def run() -> list[Any]:
        app = build_app(Desk(board_, "a.jsonl"), access)
        transport = httpx.ASGITransport(app=app)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8010") as client:
            return [await client.post(path, json=body, headers=headers) for path, body, headers in requests]

    return asyncio.run(run())


ANN = {"annotator": "ann"}


def test_pages_of_others_may_not_ask(tmp_path: Path) -> None:
    one = board(tmp_path, Clock())
    answers = ask(
        one,
        [
            ("/api/start", ANN, {"origin": "https://evil.example"}),
            ("/api/start", ANN, {"origin": "null"}),
            ("/api/start", ANN, {"host": "evil.example"}),
            ("/api/start", ANN, {"content-type": "text/plain"}),
            ("/api/start", ANN, {"sec-fetch-site": "cross-site"}),
            ("/api/start", {}, {}),
            ("/api/start", {"annotator": "a\u202eb"}, {}),
            ("/api/nothing", ANN, {}),
            ("/api/judge", {**ANN, "task": "x", "ranks": [1]}, {}),
            ("/api/judge", {**ANN, "task": "x", "ranks": "1"}, {}),
            ("/api/start", {**ANN, "more": "x" * 70000}, {}),
            ("/api/start", ANN, {"origin": "http://127.0.0.1:8010"}),
        ],
        Access((), LOOPBACK_NAMES),
    )
    assert [answer.status_code for answer in answers] == [403, 403, 403, 415, 403, 400, 400, 404, 400, 400, 413, 200]
    assert all("\n" not in answer.json()["error"]["message"] for answer in answers[:-1])
    shown = answers[-1].json()
    assert shown["mode"] == "best" and "secret" not in answers[-1].text, "what wrote an answer is not said"
    assert sorted(shown["task"]["answers"]) == ["answer 0.0", "answer 0.1", "answer 0.2"]
    assert judged(tmp_path / "o.jsonl") == []


def test_other_machines_need_the_token(tmp_path: Path) -> None:
    access = Access((Access.digest("secret"),))
    wrong, right = {"authorization": "Bearer other"}, {"authorization": "Bearer secret"}
    answers = ask(board(tmp_path, Clock()), [("/api/start", ANN, headers) for headers in ({}, wrong, right)], access)
    assert [answer.status_code for answer in answers] == [401, 401, 200]


def test_a_second_server_of_the_same_file_is_refused(tmp_path: Path) -> None:
    from llm_parallel.files import locked

    path = write_answers(tmp_path / "a.jsonl", 1)
    board_of(read_items(path), tmp_path / "a.annotations.jsonl", BoardOptions("best"))
    with locked(tmp_path / ".a.annotations.jsonl.lock", ""):
        result = in_process("annotate", path, "--export")
    assert result.returncode == 2 and "another `llm-parallel annotate` writes" in result.stderr


def test_records_are_read_back(tmp_path: Path) -> None:
    items: tuple[Item, ...] = read_items(write_answers(tmp_path / "a.jsonl", 1))
    one = board_of(items, tmp_path / "o.jsonl", BoardOptions("best"))
    task = one.next("ann")
    assert task is not None
    one.judge("ann", task.id, [1, 2, 2], seconds=2.5)
    (record,) = read_jsonlines(tmp_path / "o.jsonl")
    order = one.order("ann", task)
    assert record["shown"] == order and record["ranks"][order[0]] == 1 and record["seconds"] == 2.5
    assert {"annotator": "ann", "mode": "best", "item": items[0].id}.items() <= record.items()
