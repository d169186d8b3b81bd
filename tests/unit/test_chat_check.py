"""``llm-parallel check`` shows what the model will see: the marks stand around what is trained, and nothing else."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from llm_parallel.config.load import load_config
from llm_parallel.data.group_files import prepare_groups
from llm_parallel.data.tokenizer import train_sentencepiece
from llm_parallel.errors import UserError
from llm_parallel.report.check import check_command, checked_groups, show

ANSWERS = ["five is the sum, 漢😀", "a question has  an answer"]


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    text = "the sum of two and three is five while a question has an answer, and every turn ends\n" * 40
    train_sentencepiece([text, "user\nassistant\nsystem\n"], 320, tmp_path)
    rows = [
        {"messages": [{"role": "user", "content": f"</s> what is {n}"}, {"role": "assistant", "content": answer}]}
        for n, answer in enumerate(ANSWERS)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\nnonsense\n")
    path = tmp_path / "run.yaml"
    path.write_text(
        f"run_dir: {tmp_path}/run\ndata: {{tokenizer: {tmp_path}, seq_length_tokens: 128}}\n"
        f"chat: {{train: [{{path: {tmp_path}/rows.jsonl}}], eval_fraction: 0}}\n"
    )
    return path


class Spans(HTMLParser):
    """Text of a page in its spans, by class, and addresses that it refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.by_class: dict[str, list[str]] = {}
        self.addresses: list[str] = []
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.addresses += [value for name, value in values.items() if name in ("href", "src") and value]
        self._open.append(values.get("class") or "") if tag == "span" else None

    def handle_endtag(self, tag: str) -> None:
        if tag == "span":
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open:
            self.by_class.setdefault(self._open[-1], []).append(data)


def test_what_is_trained_is_the_answers_with_their_stop(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_command(str(run_file), [], None, 3) == "sft"
    out = capsys.readouterr().out
    assert sorted(re.findall("⟦(.*?)⟧", out.split("between ⟦ and ⟧")[1], re.S)) == sorted(f"{a}</s>" for a in ANSWERS)
    assert out.count("<s> user\n</s> what is") + out.count("<s>user\n</s> what is") == 2
    assert "1 record is no conversation" in out and "line 3 is not JSON" in out
    assert "stops: </s> 2" in out and "samples of an epoch: 1 (of 128 tokens)" in out


def test_the_page_shows_the_same_and_needs_no_network(run_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    check_command(str(run_file), ["chat.packing=pad"], str(file), 2)
    spans = Spans()
    spans.feed(file.read_text(encoding="utf-8"))
    trained = "".join(spans.by_class["t"])
    assert all(answer.replace(" ", "") in trained.replace(" ", "") for answer in ANSWERS)
    assert spans.by_class["t s"] == ["</s>"] * 2
    assert all(address.startswith(("#", "data:")) for address in spans.addresses)


def test_bad_options_are_refused(run_file: Path) -> None:
    with pytest.raises(UserError, match=r"--html .*run\.yaml/page\.html cannot be written: "):
        check_command(str(run_file), [], str(run_file / "page.html"), 1)
    with pytest.raises(UserError, match="--samples is -1"):
        check_command(str(run_file), [], None, -1)
    with pytest.raises(UserError, match=r"chat\.train is empty"):
        check_command(str(run_file), ["chat.train=[]"], None, 1)


PREFERENCES: dict[str, tuple[list[dict[str, object]], list[tuple[str, str]]]] = {
    "dpo": (
        [{"prompt": "what is two", "chosen": "five is the sum", "rejected": "a question"}],
        [("chosen", "five is the sum"), ("rejected", "a question")],
    ),
    "rrhf": (
        [{"query": "what is two", "responses": ["the sum", "a question", "two"], "scores": [1, 3, 2]}],
        [("score 3", "a question"), ("score 2", "two"), ("score 1", "the sum")],
    ),
    "kto": (
        [{"prompt": "what is two", "completion": "the sum", "label": True},
         {"prompt": "what is three", "completion": "two", "kto_tag": False}],
        [("liked", "the sum"), ("not liked", "two")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PREFERENCES)
def test_preferences_stand_side_by_side(
    kind: str, run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, expected = PREFERENCES[kind]
    bad = {"prompt": "what", "chosen": "two", "rejected": "two"}
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [*rows, bad])))
    file = tmp_path / "page.html"
    assert check_command(str(run_file), [f"method.kind={kind}"], str(file), 3) == "prefer"
    out = capsys.readouterr().out
    assert "1 record is no preference" in out and "all the same" in out
    shown = re.findall(r"^(.*), (\d+) tokens:\n(?:.*⟦)?(.*)⟧", out, re.M)
    found = {(name, text.removesuffix("</s>").strip()) for name, _, text in shown}
    assert found == set(expected) and out.count("what is two") == 1, "a prompt stands before its answers once"

    spans = Spans()
    spans.feed(file.read_text(encoding="utf-8"))
    trained = "".join(spans.by_class["t"]).replace(" ", "")
    assert all(text.replace(" ", "") in trained for _, text in expected)
    page = re.sub("<[^>]*>", "\n", file.read_text(encoding="utf-8"))
    assert all(re.search(rf"^{name}, \d+ tokens?$", page, re.M) for name, _ in expected)

    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    config = load_config(str(run_file), [f"method.kind={kind}"])
    show(checked_groups(prepare_groups(config), 0, 3, []), console)
    wide = console.file.getvalue()  # type: ignore[attr-defined]
    heads = [line for line in wide.splitlines() if line.count(" tokens") == len(expected)]
    assert len(heads) == (kind != "kto"), "in columns of one table"


def rounds_file(tmp_path: Path, judges: str, rows: list[dict[str, object]]) -> Path:
    text = "the sum of two and three is five while a question has an answer, and every turn ends\n" * 40
    train_sentencepiece([text, "user\nassistant\nsystem\n0123456789"], 320, tmp_path)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = tmp_path / "rounds.yaml"
    path.write_text(
        f"run_dir: {tmp_path}/run\ndata: {{tokenizer: {tmp_path}, seq_length_tokens: 96}}\nmodel: {{vocab_size: 512}}\n"
        f"method: {{kind: grpo, rollout: {{prompts: 2, answers: 4, max_new_tokens: 16, judges: [{judges}]}}}}\n"
        f"train: {{global_batch_size: 8}}\nchat: {{train: [{{path: {tmp_path}/rows.jsonl}}], eval_fraction: 0.25}}\n"
    )
    return path


SUMS = [{"prompt": f"the sum of two and {n}", "answer": [f"{n + 2}", f"+{n + 2}"], "shape": {"type": "object"}}
        for n in range(4)]  # fmt: skip


def test_prompts_are_shown_with_what_judges_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judges = (
        "{kind: exact}, {kind: number, weight: 0.5}, {kind: regex, pattern: '^{answer}$'}, {kind: json, field: shape}, "
        "{kind: length, max_tokens: 9}, {kind: contains}"
    ).replace("{answer}", "{prompt}")
    file = tmp_path / "page.html"
    assert check_command(str(rounds_file(tmp_path, judges, SUMS)), [], str(file), 2) == "prefer"
    out = capsys.readouterr().out
    assert "prompts: 3 (1 are held out)" in out and "a round: 2 x 4 (prompts and answers to each, then 1 step" in out
    assert out.count("\nprompt ") == 2 and "rows.jsonl line" in out
    shown = re.search(r"the sum of two and (\d)", out)
    assert shown is not None
    right = int(shown[1]) + 2
    for reading in (
        f"judged: 1 if the answer is '{right}' or '+{right}'",
        f"judged: 1 if the answer's last number is {right} or {right}, times 0.5",
        f"judged: 1 if ^the\\ sum\\ of\\ two\\ and\\ {right - 2}$ is found in the answer",
        'judged: 1 if the answer is JSON that fits {"type": "object"}',
        "judged: minus the share of tokens over 9",
        f"judged: 1 if the answer contains '{right}' or '+{right}'",
    ):
        assert reading in out, (reading, out)
    page = file.read_text(encoding="utf-8")
    assert "Prompts as the model sees them" in page and page.count("judged: ") == 12


def test_prompts_that_a_judge_cannot_judge_are_refused(tmp_path: Path) -> None:
    run_file = rounds_file(tmp_path, "{kind: exact}", [*SUMS, {"prompt": "two"}])
    with pytest.raises(UserError, match=r"kind = exact cannot judge answers to 1 of 5 prompts: .*line 5 has no field"):
        check_command(str(run_file), [], None, 2)
