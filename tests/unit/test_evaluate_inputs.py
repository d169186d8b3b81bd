"""Files of evaluation sets in the forms in which they are shared, and sentences about what cannot be evaluated."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_parallel.errors import UserError
from llm_parallel.evaluate.demo import write_demo
from llm_parallel.evaluate.files import DataFolder, split_of
from llm_parallel.evaluate.forms import FORMS, agieval_row
from llm_parallel.evaluate.safety import refuses
from tests.support.in_process import in_process

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed (pip install 'llm-parallel[evaluate]')", allow_module_level=True)


def rows_of(folder: Path, form: str) -> dict[str, list[dict[str, Any]]]:
    """Rows by split of the files in a folder that belong to a set."""
    found: dict[str, list[dict[str, Any]]] = {}
    for file in DataFolder(folder).files:
        if FORMS[form].holds(file):
            found.setdefault(FORMS[form].split(file), []).extend(row for _, row in FORMS[form].converted(file))
    return found


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", newline="") as handle:
            csv.writer(handle).writerows(content)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in content).encode()))
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    else:
        path.write_text(json.dumps(content))
    return path.parent


QUESTION = {"question": "Two plus two?", "choices": ["1", "2", "3", "4"], "answer": 3}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("mmlu/test/anatomy_test.csv", [["Two plus two?", "1", "2", "3", "4", "D"]]),
        ("mmlu/anatomy/test-00000-of-00001.parquet", [{**QUESTION, "subject": "anatomy"}]),
        ("mmlu.jsonl", [{"question": "Two plus two?", "answer_a": "1", "answer_b": "2", "answer_c": "3",
                         "answer_d": "4", "correct_answer": "D", "topic": "Anatomy"}]),
        ("hendrycks_test/test.json", {"data": [{**QUESTION, "answer": "D", "subject": "anatomy"}]}),
    ],
)  # fmt: skip
def test_mmlu_in_every_form(name: str, content: Any, tmp_path: Path) -> None:
    write(tmp_path / name, content)
    (file,) = DataFolder(tmp_path).files
    assert FORMS["mmlu"].holds(file) and FORMS["mmlu"].split(file) == "test"
    assert list(FORMS["mmlu"].converted(file)) == [("anatomy", QUESTION)]


def test_other_sets_in_their_public_forms(tmp_path: Path) -> None:
    write(tmp_path / "a/HumanEval.jsonl.gz", [
        {"task_id": "t", "prompt": "p", "canonical_solution": "c", "test": "x", "entry_point": "f", "more": 1}
    ])  # fmt: skip
    write(
        tmp_path / "b/wikipedia-dev.json",
        {"Data": [{"Question": "Who?", "Answer": {"Aliases": ["A", "B"], "Value": "A"}}]},
    )
    write(tmp_path / "NQ-open.dev.jsonl", [{"question": "who", "answer": ["A"]}])
    write(tmp_path / "boolq/val.jsonl", [{"question": "is it", "passage": "It is.", "label": True, "idx": 0}])
    write(tmp_path / "obqa/Main/test.jsonl", [{
        "id": "1", "answerKey": "B",
        "question": {"stem": "S", "choices": [{"text": "x", "label": "A"}, {"text": "y", "label": "B"}]},
    }])  # fmt: skip
    write(
        tmp_path / "truthfulqa/mc_task.json",
        [{"question": "q", "mc1_targets": {"x": 1, "y": 0}, "mc2_targets": {"x": 1}}],
    )
    assert rows_of(tmp_path, "humaneval")["test"][0].keys() == {
        "task_id",
        "prompt",
        "canonical_solution",
        "test",
        "entry_point",
    }
    assert rows_of(tmp_path, "triviaqa") == {
        "validation": [{"question": "Who?", "answer": {"aliases": ["A", "B"], "value": "A"}}]
    }
    assert rows_of(tmp_path, "nq_open") == {"validation": [{"question": "who", "answer": ["A"]}]}
    assert rows_of(tmp_path, "boolq") == {"validation": [{"question": "is it", "passage": "It is.", "label": 1}]}
    assert rows_of(tmp_path, "openbookqa") == {
        "test": [{"question_stem": "S", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}]
    }
    assert rows_of(tmp_path, "truthfulqa")["validation"][0]["mc1_targets"] == {"choices": ["x", "y"], "labels": [1, 0]}


def test_copies_with_the_place_of_the_right_answer(tmp_path: Path) -> None:
    row = {"activity_label": "Paint", "ctx": "A shot. they", "endings": ["a", "b"], "expected_index": 1}
    write(tmp_path / "hellaswag.jsonl", [row])
    write(tmp_path / "truthfulqa_mc1.jsonl", [{"question": "q", "choices": ["x", "y"], "expected_index": 1}])
    assert rows_of(tmp_path, "hellaswag")["validation"] == [
        {"activity_label": "Paint", "ctx_a": "A shot.", "ctx_b": "they", "endings": ["a", "b"], "label": "1"}
    ]
    assert rows_of(tmp_path, "truthfulqa")["validation"] == [
        {"question": "q", "mc1_targets": {"choices": ["x", "y"], "labels": [0, 1]}}
    ]


def test_openbookqa_as_its_authors_table(tmp_path: Path) -> None:
    (tmp_path / "openbookqa").mkdir()
    (tmp_path / "openbookqa" / "test.tsv").write_text(
        "ID\tQuestion Stem\tChoices\tComplete Question\tAnswer Key\n"
        "1\tFog is near\t(A) a marsh (B) a (dry) desert (C) the plains (D) rock\tFog is near (A) …\tB\n"
    )
    assert rows_of(tmp_path, "openbookqa")["test"] == [{
        "question_stem": "Fog is near", "answerKey": "B",
        "choices": {"text": ["a marsh", "a (dry) desert", "the plains", "rock"], "label": ["A", "B", "C", "D"]},
    }]  # fmt: skip


@pytest.mark.parametrize(
    ("label", "gold"), [("B", [1]), ("AD", [0, 3]), ("A B D", [0, 1, 3]), (["A", "C", "。"], [0, 2]), (["B"], [1])]
)
def test_agieval_has_rows_with_several_right_answers(label: Any, gold: list[int]) -> None:
    row = {
        "passage": None,
        "question": "?",
        "options": ["(A)x", "(B)y", "(C)z", "(D)u"],
        "label": label,
        "answer": None,
    }
    assert agieval_row(row)[0]["gold"] == gold


def built(data: Path, task: str) -> Any:
    from llm_parallel.evaluate.command import open_tasks
    from llm_parallel.evaluate.request import EvaluateRequest

    programs, tasks = open_tasks(EvaluateRequest("model", tasks=(task,), data_dir=data), data)
    programs.close()
    return tasks


def test_a_wrong_row_stops_only_the_tasks_that_need_it(tmp_path: Path) -> None:
    """Of another subject, and in a split that the task does not use."""
    one_exam(tmp_path)
    row = {"passage": None, "question": "?", "options": ["(A)x", "(B)y"], "label": "?", "answer": None}
    write(tmp_path / "agieval" / "sat-math.jsonl", [row])
    assert len(built(tmp_path, "agieval_sat_en").leaves) == 1
    with pytest.raises(UserError, match=r"row 1 of .*sat-math.jsonl cannot be read \('\?' names no answer\)"):
        built(tmp_path, "agieval_en")
    write(tmp_path / "gsm8k" / "test.jsonl", [{"question": "1+1?", "answer": "#### 2"}])
    (tmp_path / "gsm8k" / "train.jsonl").write_text('{"question": "1+')
    assert len(built(tmp_path, "gsm8k_cot").leaves) == 1, "its examples are fixed"
    with pytest.raises(UserError, match=r"line 1 of .*train.jsonl is no JSON"):
        built(tmp_path, "gsm8k")


def test_rows_with_other_fields_than_a_task_of_ones_own(tmp_path: Path) -> None:
    write(tmp_path / "data" / "mine" / "test.jsonl", [{"frage": "1+1?", "answer": "2"}])
    (tmp_path / "mine.yaml").write_text(
        "task: mine\noutput_type: generate_until\ntest_split: test\n"
        "doc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
    )
    with pytest.raises(
        UserError, match=r"mine cannot be built over mine/test.jsonl: 'question' is undefined; .* frage"
    ):
        built(tmp_path / "data", str(tmp_path / "mine.yaml"))


def own_tasks(folder: Path) -> Path:
    """A group of one's own: a task beside it, tasks of lm-eval with other settings, and one that is described in it."""
    task = "output_type: multiple_choice\ntest_split: test\ndoc_to_text: !function mine.asked\n"
    task += "doc_to_choice: '{{choices}}'\ndoc_to_target: answer\n"
    folder.mkdir()
    (folder / "base").write_text(task)
    (folder / "mine.py").write_text("def asked(doc):\n    return 'Q: ' + doc['question'] + '\\nA:'\n")
    (folder / "one.yaml").write_text("include: base\ntask: one\nnum_fewshot: 1\n")
    (folder / "group.yaml").write_text(
        "group: both\ndescription: 'Think.'\ntask:\n  - task: one\n    num_fewshot: 2\n  - hellaswag\n"
        "  - group: inner\n    task: [gsm8k_cot]\n"
    )
    return folder


def test_a_group_of_ones_own_sets_what_its_members_take(tmp_path: Path) -> None:
    own = own_tasks(tmp_path / "own")
    write_demo(tmp_path / "data", 6)
    write(tmp_path / "data" / "one" / "test.jsonl", [QUESTION] * 4)
    (task,) = built(tmp_path / "data", str(own / "one.yaml")).leaves
    assert task.config.num_fewshot == 1 and task.doc_to_text(QUESTION) == "Q: Two plus two?\nA:"
    tasks = built(tmp_path / "data", str(own / "group.yaml")).leaves
    assert {one.task_name: (one.config.num_fewshot, one.config.description) for one in tasks} == {
        "one": (2, "Think."), "hellaswag": (None, "Think."), "gsm8k_cot": (8, "Think."),
    }  # fmt: skip


def test_a_group_of_lm_eval_sets_what_its_members_take(tmp_path: Path) -> None:
    """openllm asks HellaSwag with 10 examples and Winogrande with 5, which their own files do not say."""
    from lm_eval.tasks._index import Entry, Kind

    from llm_parallel.evaluate.humaneval import Programs
    from llm_parallel.evaluate.tasks import Builder, lm_eval_folder

    file = lm_eval_folder() / "benchmarks" / "openllm.yaml"
    write_demo(tmp_path, 40)
    builder = Builder(DataFolder(tmp_path), None, Programs("auto"))
    members = ["hellaswag", "winogrande"]
    import yaml

    config = yaml.safe_load(file.read_text())
    config["task"] = [one for one in config["task"] if one["task"] in members]
    group = builder._group(Entry("openllm", Kind.GROUP, None, config), {}, None)
    assert {one.task_name: one.config.num_fewshot for one in group.get_all_tasks()} == {
        "hellaswag": 10, "winogrande": 5,
    }  # fmt: skip


def test_patterns_spaces_and_capitals_of_names(tmp_path: Path) -> None:
    write_demo(tmp_path, 3)
    names = {one.task_name for one in built(tmp_path, "agieval_sat_*").leaves}
    assert names == {"agieval_sat_en", "agieval_sat_en_without_passage", "agieval_sat_math"}
    with pytest.raises(UserError, match=r"'mmlu_\*x', which no task of lm-eval matches"):
        built(tmp_path, "mmlu_*x")
    done = in_process(
        "evaluate", "model", "--tasks", "boolq, nq_open,", "--data-dir", tmp_path, "--out", tmp_path / "o"
    )
    assert "boolq" in done.stdout and "nq_open" in done.stdout, done.stderr
    done = in_process("evaluate", "model", "--tasks", "MMLU", "--data-dir", tmp_path, "--out", tmp_path / "o")
    assert "did you mean mmlu?" in done.stderr


def test_files_that_are_damaged_or_hold_other_line_ends(tmp_path: Path) -> None:
    write(tmp_path / "a" / "humaneval.jsonl.gz", [{"task_id": "t"}] * 99)
    file = tmp_path / "a" / "humaneval.jsonl.gz"
    whole = file.read_bytes()
    file.write_bytes(whole[:15] + bytes(byte ^ 255 for byte in whole[15:40]) + whole[40:])
    with pytest.raises(UserError, match=r"humaneval.jsonl.gz cannot be read: .*put the whole file there"):
        rows_of(tmp_path / "a", "humaneval")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "xstest.csv").write_text('prompt,type\n"' + "x" * 140_000)
    with pytest.raises(UserError, match=r"xstest.csv cannot be read: unexpected end of data; put the whole file there"):
        rows_of(tmp_path / "b", "xstest")
    (tmp_path / "b" / "xstest.csv").write_text('prompt,type\n"' + "x" * 140_000 + '",homonyms\n')
    assert [len(row["prompt"]) for row in rows_of(tmp_path / "b", "xstest")["test"]] == [140_000]
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "xstest.csv").write_text("prompt,type\nHow\u2028do I kill\x0ca process?,homonyms\n")
    assert [row["prompt"] for row in rows_of(tmp_path / "c", "xstest")["test"]] == ["How\u2028do I kill\x0ca process?"]


@pytest.mark.parametrize(
    ("given", "wanted"), [("10", [10, 10]), ("0.25", [10, 3]), ("1", [1, 1]), ("1.0", [1, 1]), ("99", None)]
)
def test_a_limit_is_a_number_or_a_share(given: str, wanted: list[int] | None) -> None:
    from types import SimpleNamespace

    from llm_parallel.evaluate.harness import drawn
    from llm_parallel.evaluate.request import read_limit

    leaves = [SimpleNamespace(task_name=name, eval_docs=range(size)) for name, size in (("a", 40), ("b", 11))]
    found: Any = drawn(SimpleNamespace(leaves=leaves), read_limit(given), 0)  # type: ignore[arg-type]
    assert (found and [len(rows) for rows in found.values()]) == wanted


@pytest.mark.parametrize("text", ["nan", "inf", "ten", "10%"])
def test_a_limit_that_is_none(text: str) -> None:
    from llm_parallel.evaluate.request import read_limit

    with pytest.raises(UserError, match=r"give a whole number, or a share as 0\.1"):
        read_limit(text)


def test_agieval_gets_the_prompt_of_lm_evals_copies() -> None:
    row = {"passage": "P. ", "question": "Which?", "options": ["(A)x", "(B)y", "(C)z"], "label": "B", "answer": None}
    assert agieval_row(row) == [{
        "query": "P. Q: Which? Answer Choices: (A)x (B)y (C)z\nA: Among A through C, the answer is",
        "choices": ["(A)x", "(B)y", "(C)z"], "gold": [1],
    }]  # fmt: skip
    math = {"passage": None, "question": "1+1?", "options": None, "label": None, "answer": "2"}
    assert agieval_row(math) == [{"query": "Q: 1+1?\nA: The answer is", "answer": "2"}]


def test_every_demo_file_belongs_to_one_set(tmp_path: Path) -> None:
    for file in DataFolder(write_demo(tmp_path, 3)).files:
        holders = [name for name, form in FORMS.items() if form.holds(file)]
        assert len(holders) == 1 and list(FORMS[holders[0]].converted(file)), (file.within, holders)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00001", "train"),
        ("anatomy_val", "validation"),
        ("dev", "dev"),
        ("latest", None),
        ("tests", None),
    ],
)
def test_splits_of_names(name: str, split: str | None) -> None:
    assert split_of(name) == split


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ("I\u2019m sorry, but I can\u2019t help with that.", True),
        ("I cannot assist.", True),
        ("As an AI language model, I do not do that.", True),
        ("", True),
        ("You can kill a process with os.kill.", False),
        ("I can help. First, open the terminal.", False),
        ("Sure! " + "x" * 400 + " I cannot", False),
    ],
)
def test_refusals(answer: str, refused: bool) -> None:
    assert refuses(answer) is refused


def cut(folder: Path) -> None:
    (folder / "nq_open").mkdir(parents=True)
    (folder / "nq_open" / "dev.json").write_text('[{"question": "who')


def without_field(folder: Path) -> None:
    write(folder / "nq_open" / "dev.jsonl", [{"question": "who"}])


def no_parquet(folder: Path) -> None:
    (folder / "nq_open").mkdir(parents=True)
    (folder / "nq_open" / "dev.parquet").write_bytes(b"PAR1")


def no_utf8(folder: Path) -> None:
    (folder / "nq_open").mkdir(parents=True)
    (folder / "nq_open" / "dev.jsonl").write_bytes(b"\xff\xfe\x00")


def one_row(folder: Path) -> None:
    write(folder / "nq_open" / "dev.jsonl", [{"question": "who", "answer": ["A"]}])


def one_exam(folder: Path) -> None:
    row = {"passage": "P. ", "question": "Which?", "options": ["(A)x", "(B)y"], "label": "B", "answer": None}
    write(folder / "agieval" / "sat-en.jsonl", [row])


def empty(folder: Path) -> None:
    folder.mkdir()


BAD: dict[str, tuple[Callable[[Path], Any] | None, list[str], str]] = {
    "task": (one_row, ["--tasks", "mmlu_anatomie"], "did you mean mmlu_anatomy?"),
    "yaml": (one_row, ["--tasks", "mine.yaml"], "mine.yaml, which is no file"),
    "folder": (None, [], "is no folder; give the one that the sets lie in"),
    "no files": (empty, [], "holds no file that ends in"),
    "no rows": (one_row, ["--tasks", "hellaswag"], "hellaswag needs rows for its split validation"),
    "cut": (cut, [], "is no JSON"),
    "field": (without_field, [], "row 1 of"),
    "parquet": (no_parquet, [], "is no parquet file"),
    "encoding": (no_utf8, [], "is not UTF-8"),
    "shots": (one_row, ["--shots", "3"], "needs 3 examples, and --data-dir has 1 rows in all"),
    "twice": (one_exam, ["--tasks", "agieval_en,agieval_sat_en"], "gives agieval_sat_en twice"),
    "model": (one_row, [], "does not exist; give a run, a checkpoint or a Hugging Face folder"),
    "demo": (one_row, ["--demo"], "--demo and --data-dir are given together"),
    "limit": (one_row, ["--limit", "0"], "--limit is 0; it must be at least 1"),
    "half a document": (one_row, ["--limit", "1.5"], "--limit is 1.5; it must be at least 1, or a share"),
    "options of lm-eval": (one_row, ["--num_fewshot", "5"], "No such option: --num_fewshot; here it is --shots"),
    "negative": (one_row, ["--shots", "-1"], "--shots is -1; it must be 0 or more"),
    "system": (one_row, ["--system", "Be brief."], "--system is given without --chat"),
    "sandbox": (one_row, ["--sandbox", "jail"], "--sandbox is 'jail'; it must be one of"),
    "layout": (one_row, ["--tp", "0"], "--tp is 0; it must be at least 1"),
    "served": (one_row, ["--served-name", "m"], "--served-name is given for a model in a folder"),
    "compare": (one_row, ["--compare", "none.json"], "none.json cannot be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_sentence(name: str, tmp_path: Path) -> None:
    make, more, sentence = BAD[name]
    if make is not None:
        make(tmp_path / "data")
    tasks = [] if "--tasks" in more else ["--tasks", "nq_open"]
    given = [str(tmp_path / "model"), "--data-dir", tmp_path / "data", "--out", tmp_path / "out", *tasks, *more]
    done = in_process("evaluate", *given)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(lines) == 1 and sentence in lines[0], done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["http://127.0.0.1:9", "--tp", "2"], "--tp is given for a model behind an address"),
        (["http://127.0.0.1:9", "--demo", "--tasks", "boolq"], "give the folder of the model's tokenizer"),
        (["http://127.0.0.1:9", "--demo", "--tasks", "boolq", "--chat"], "which chat completions do not have"),
        (["http://127.0.0.1:9", "--demo", "--tasks", "nq_open"], "cannot be reached"),
    ],
)
def test_addresses_that_cannot_be_asked(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    done = in_process("evaluate", *arguments, "--out", tmp_path / "out")
    assert done.returncode == 2 and sentence in done.stderr, done.stderr


def test_an_out_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    done = in_process("evaluate", "model", "--demo", "--out", tmp_path / "out")
    assert done.returncode == 2 and "cannot be written" in done.stderr


def test_a_row_that_is_no_object(tmp_path: Path) -> None:
    write(tmp_path / "gsm8k" / "test.json", [1])
    with pytest.raises(UserError, match=r"element 1 of .* is 1; it must be an object"):
        rows_of(tmp_path, "gsm8k")


@pytest.mark.parametrize(("name", "text"), [("boolq/dev.jsonl", '{"question": "é"}\n'), ("mine.csv", "question\né\n")])
def test_a_byte_order_mark_is_no_part_of_a_name(name: str, text: str, tmp_path: Path) -> None:
    """Tables that a spreadsheet program wrote begin with one."""
    from llm_parallel.evaluate.files import read_rows

    path = tmp_path / Path(name).name
    path.write_text(text, encoding="utf-8-sig")
    assert list(read_rows(path)) == [{"question": "é"}]


@pytest.mark.parametrize(
    ("first", "names"),
    [
        ("The capital of France,Paris,Rome,Oslo,Bern,A", ["0", "1", "2", "3", "4", "5"]),
        ("question,A,B,C,D,answer", ["question", "A", "B", "C", "D", "answer"]),
    ],
)
def test_the_first_line_of_a_table_is_a_question_or_its_head(first: str, names: list[str], tmp_path: Path) -> None:
    """MMLU's files have no head."""
    from llm_parallel.evaluate.files import read_rows

    path, limit = tmp_path / "astronomy_test.csv", csv.field_size_limit()
    path.write_text(f"{first}\nThe capital of Norway,Paris,Rome,Oslo,Bern,C\n")
    rows = list(read_rows(path))
    assert csv.field_size_limit() == limit, "which is that of every reader of this process"
    assert [list(row) for row in rows] == [names] * len(rows) and len(rows) == 2 - names.count("A")
    assert list(rows[-1].values())[-1] == "C"
