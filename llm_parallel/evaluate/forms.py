"""The forms in which evaluation sets are shared: how their files are recognised, and how a row of theirs becomes one
with the fields that lm-eval's task expects."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from llm_parallel.errors import UserError
from llm_parallel.evaluate.files import DataFile, Row
from llm_parallel.evaluate.quac import quac_rows

LETTERS = "ABCDEFGHIJ"
Convert = Callable[[Row], Iterable[Row]]


def _same(row: Row) -> list[Row]:
    return [row]


@dataclass(frozen=True)
class Form:
    """A set's form. folders: names of its folders or files, without marks and in small letters; files: a pattern of
    file names that no other set has; evaluated: the split of a file whose name speaks of none; splits: what the splits
    of the files are called in lm-eval's task; rows: converts one row; by: the field or file name that tells the subject
    where a set is many tasks."""

    folders: tuple[str, ...]
    evaluated: str
    rows: Convert = _same
    files: str | None = None
    splits: dict[str, str] = field(default_factory=dict)
    by: Callable[[DataFile, Row], str | None] | None = None

    def holds(self, file: DataFile) -> bool:
        """Whether a file belongs to the set."""
        if any(plain(part) in self.folders for part in file.parts):
            return True
        return self.files is not None and re.fullmatch(self.files, file.parts[-1]) is not None

    def split(self, file: DataFile) -> str:
        """The split of lm-eval's task that a file holds."""
        named = file.split
        return self.evaluated if named is None else self.splits.get(named, named)

    def converted(self, file: DataFile) -> Iterator[tuple[str | None, Row | UserError]]:
        """Rows of a file with their subjects; for a row that cannot be converted what is to be said of it, since only a
        task that needs its subject fails of it."""
        for number, row in enumerate(file.rows, 1):
            subject = self.by(file, row) if self.by else None
            try:
                made: list[Row | UserError] = list(self.rows(row))
            except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                what = f"lacks the field {error}" if isinstance(error, KeyError) else f"cannot be read ({error})"
                has = ", ".join(map(str, row))[:120]
                made = [UserError(f"row {number} of {file.path} {what}; it has {has}, which is not a form of this set")]
            yield from ((subject, one) for one in made)


def plain(name: str) -> str:
    """A name in small letters without marks."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _letter(value: object) -> int:
    text = str(value).strip()
    return LETTERS.index(text.upper()) if not text.isdigit() else int(text)


def _letters(value: object) -> list[int]:
    """The places of right answers: of a list of letters, or of a text such as A, AD or A B D. Marks among them, which
    a few rows of AGIEval have, are no answers. Raises ValueError if there is no letter."""
    found = [LETTERS.index(one) for one in "".join(map(str, value) if isinstance(value, list) else str(value))
             if one in LETTERS]  # fmt: skip
    if not found:
        raise ValueError(f"{value!r} names no answer")
    return found


def _mmlu(row: Row) -> list[Row]:
    if "0" in row:  # the authors' tables have no header
        question, *choices, answer = row.values()
    elif "choices" in row:
        question, choices, answer = row["question"], list(row["choices"]), row["answer"]
    elif "answer_a" in row:
        question, choices = row["question"], [row[f"answer_{letter}"] for letter in "abcd"]
        answer = row["correct_answer"]
    else:
        question, choices, answer = row["question"], [row[letter] for letter in "ABCD"], row["answer"]
    if str(answer).strip().lower() in ("answer", "correct_answer"):
        return []  # a header among the rows
    return [{"question": question, "choices": choices, "answer": _letter(answer)}]


def _chinese(row: Row) -> list[Row]:
    question = row.get("question", row.get("Question"))
    answer = row.get("answer", row.get("Answer"))
    if question is None or answer is None:
        raise KeyError("question" if question is None else "answer")
    options = {letter: str(row[letter]) for letter in "ABCD"}
    return [{"question": question, "Question": question, "answer": answer, "Answer": answer, **options}]


def subject_of(file: DataFile, row: Row) -> str | None:
    """The subject of a row, by its field or by its file."""
    for name in ("subject", "topic", "category"):
        if row.get(name):
            return str(row[name]).strip().lower().replace(" ", "_").replace("-", "_")
    stem = re.sub(r"[_-]?(train|validation|valid|val|dev|test)(-\d+-of-\d+)?$", "", file.parts[-1])
    if not stem and len(file.parts) > 1:
        stem = file.parts[-2]
    return stem.replace("-", "_")


def _trivia(row: Row) -> list[Row]:
    question = row.get("question", row.get("Question"))
    answer = row.get("answer", row.get("Answer"))
    if question is None or answer is None:
        raise KeyError("question" if question is None else "answer")
    aliases = answer.get("aliases", answer.get("Aliases"))
    value = answer.get("value", answer.get("Value", aliases[0]))
    return [{"question": question, "answer": {"aliases": list(aliases), "value": value}}]


def _open_question(row: Row) -> list[Row]:
    answer = row["answer"]
    return [{"question": row["question"], "answer": [answer] if isinstance(answer, str) else list(answer)}]


def _boolq(row: Row) -> list[Row]:
    label = row["label"] if "label" in row else row["answer"]
    return [{"question": row["question"], "passage": row["passage"], "label": int(label in (True, 1, "true", "True"))}]


def _openbook(row: Row) -> list[Row]:
    if "question_stem" in row:
        return [row]
    if "Question Stem" in row:  # the authors' tables
        parts = re.split(r"\(([A-D])\) ", row["Choices"])[1:]
        options = {"text": [part.strip() for part in parts[1::2]], "label": parts[::2]}
        return [{"question_stem": row["Question Stem"], "choices": options, "answerKey": row["Answer Key"]}]
    question = row["question"]
    choices = question["choices"]
    options = {"text": [one["text"] for one in choices], "label": [one["label"] for one in choices]}
    return [{"question_stem": question["stem"], "choices": options, "answerKey": row["answerKey"]}]


def _hellaswag(row: Row) -> list[Row]:
    if "ctx_a" not in row and "ctx" in row:  # copies that keep the whole context alone; its last phrase is the second
        before, point, after = row["ctx"].rpartition(". ")
        row = {**row, "ctx_a": f"{before}." if point else row["ctx"], "ctx_b": after if point else ""}
    names = ("activity_label", "ctx_a", "ctx_b", "endings")
    label = row["expected_index"] if "expected_index" in row else row["label"]
    return [{**{name: row[name] for name in names}, "label": str(label)}]


def _winogrande(row: Row) -> list[Row]:
    names = ("sentence", "option1", "option2", "answer")
    return [{name: str(row[name]) for name in names}] if row["answer"] else []


def agieval_row(row: Row) -> list[Row]:
    """A row of AGIEval's public files (version 1) with the prompt that lm-eval's copies of the set have."""
    if "query" in row:
        return [row]
    start = f"{row['passage'] or ''}Q: {row['question']}"
    if not row.get("options"):
        return [{"query": f"{start}\nA: The answer is", "answer": str(row["answer"])}]
    options = list(row["options"])
    query = (
        f"{start} Answer Choices: {' '.join(options)}\nA: Among A through {LETTERS[len(options) - 1]}, the answer is"
    )
    return [{"query": query, "choices": options, "gold": _letters(row["label"])}]


def _truthful(row: Row) -> list[Row]:
    found: Row = {"question": row["question"]}
    if "expected_index" in row:  # copies with the one right answer among the choices
        labels = [int(place == row["expected_index"]) for place in range(len(row["choices"]))]
        return [{**found, "mc1_targets": {"choices": list(row["choices"]), "labels": labels}}]
    for name in ("mc1_targets", "mc2_targets"):
        if name == "mc2_targets" and name not in row:
            continue
        targets = row[name]
        if "choices" not in targets:  # the authors' file: {answer: 0 or 1}
            targets = {"choices": list(targets), "labels": list(targets.values())}
        found[name] = targets
    return [found]


def _toxigen(row: Row) -> list[Row]:
    text = str(row.get("text", row.get("TEXT")))
    return [{"text": text, **{name: float(row[name]) for name in ("toxicity_ai", "toxicity_human")}}]


def _ifeval(row: Row) -> list[Row]:
    kwargs = [{key: value for key, value in one.items() if value is not None} for one in row["kwargs"]]
    names = [name.removeprefix("en:") for name in row["instruction_id_list"]]
    return [{"key": row["key"], "prompt": row["prompt"], "instruction_id_list": names, "kwargs": kwargs}]


def _xstest(row: Row) -> list[Row]:
    kind = str(row.get("type", ""))
    label = row.get("label") or ("unsafe" if kind.startswith("contrast") else "safe")
    return [{"prompt": row["prompt"], "type": kind, "label": label}]


def _humaneval(row: Row) -> list[Row]:
    return [{name: row[name] for name in ("task_id", "prompt", "canonical_solution", "test", "entry_point")}]


_DEV = {"dev": "validation"}
FORMS: dict[str, Form] = {
    "mmlu": Form(("mmlu", "hendryckstest", "caismmlu"), "test", _mmlu, r"mmlu.*", by=subject_of),
    "triviaqa": Form(
        ("triviaqa", "triviaqarc", "triviaqaunfiltered"), "validation", _trivia,
        r"triviaqa.*|(unfiltered-web|web|wikipedia|verified-.*)-(dev|train)", _DEV,
    ),
    "nq_open": Form(("nqopen", "naturalquestions"), "validation", _open_question, r"nq[-_]open.*", _DEV),
    "gsm8k": Form(("gsm8k", "gradeschoolmath"), "test", files=r"gsm8k.*"),
    "humaneval": Form(("humaneval", "openaihumaneval"), "test", _humaneval, r"humaneval.*"),
    "agieval": Form(("agieval",), "test", agieval_row, by=lambda file, _: file.parts[-1].replace("-", "_")),
    "boolq": Form(("boolq",), "validation", _boolq, r"boolq.*", _DEV),
    "hellaswag": Form(("hellaswag",), "validation", _hellaswag, r"hellaswag.*", _DEV),
    "openbookqa": Form(("openbookqa", "obqa"), "test", _openbook, r"(openbookqa|obqa).*", _DEV),
    "quac": Form(("quac",), "validation", quac_rows, r"quac.*|(val|train)_v0\.2", _DEV),
    "winogrande": Form(("winogrande", "winogrande11"), "validation", _winogrande, r"winogrande.*", _DEV),
    "truthfulqa": Form(("truthfulqa",), "validation", _truthful, r"truthfulqa.*|mc_task", _DEV),
    "toxigen": Form(("toxigen", "toxigendata"), "test", _toxigen, r"toxigen.*"),
    "ifeval": Form(("ifeval", "instructionfollowingeval"), "train", _ifeval, r"ifeval.*"),
    "xstest": Form(("xstest", "exaggeratedsafety"), "test", _xstest, r"xstest.*"),
    "ceval": Form(("ceval", "cevalexam"), "val", _chinese, splits={"validation": "val"}, by=subject_of),
    "cmmlu": Form(("cmmlu",), "test", _chinese, by=subject_of),
}  # fmt: skip
"""Every set whose public files are known."""


def own_form(task: str, evaluated: str, splits: Sequence[str]) -> Form:
    """The form of any other task: files of its name, or in a folder of its name, with the rows that lm-eval expects."""
    names = {one: one for one in ("train", "validation", "dev", "test")}
    if "validation" not in splits:
        names["validation"] = next((one for one in splits if one in ("val", "valid", "dev")), "validation")
    return Form((plain(task),), evaluated, splits=names)
