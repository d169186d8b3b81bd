"""A task that a model of 0.1 million parameters learns in seconds: write four digits backwards.

The annotators of the training data are right in 30 of 100 cases, copy the digits forwards in 50 and get one digit wrong
in 20. So fine-tuning teaches the form and to stop, and leaves the right answer to be found by preference methods. Every
character is a token, and so are the names of the roles.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

TOKENS = [*"0123456789", "<|im_start|>", "<|im_end|>", "\n", "user", "assistant", "+"]
BEGIN, END, LINE = 10, 11, 12
MODEL = {
    "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 192, "num_attention_heads": 4, "num_query_groups": 2,
    "vocab_size": 16, "max_seq_length_tokens": 256,
}  # fmt: skip
"""115,008 parameters."""
ANSWER_TOKENS = 6


def write_tokenizer(folder: Path) -> Path:
    """A folder with a tokenizer whose tokens are ``TOKENS`` and whose template is ChatML."""
    folder.mkdir(parents=True, exist_ok=True)
    special = [
        {"id": n, "content": TOKENS[n], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for n in (BEGIN, END)
    ]  # fmt: skip
    tree = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": {
            "type": "Split", "pattern": {"Regex": r"user|assistant|[0-9+\n]"}, "behavior": "Isolated", "invert": False
        },
        "post_processor": None, "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": {token: n for n, token in enumerate(TOKENS)}, "unk_token": "+"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"})
    )
    return folder


def question(a: int, b: int) -> str:
    """Two numbers below 100, each with its last digit first."""
    return f"{a % 10}{a // 10}+{b % 10}{b // 10}"


def right_answer(a: int, b: int) -> str:
    """The four digits backwards."""
    return question(a, b).replace("+", "")[::-1]


def prompt_tokens(a: int, b: int) -> list[int]:
    """The conversation up to where the answer begins."""
    text = [TOKENS.index(character) for character in question(a, b)]
    return [BEGIN, TOKENS.index("user"), LINE, *text, END, LINE, BEGIN, TOKENS.index("assistant"), LINE]


def problems(seed: int, held_out: bool = False) -> Iterator[tuple[int, int]]:
    """Pairs of numbers without end, either those for training or those that training never sees: one in ten, in which
    every digit stands in every place as often as elsewhere (7919 n % 10 alone would hold out a digit of one place)."""
    numbers = random.Random(seed)
    while True:
        a, b = numbers.randrange(100), numbers.randrange(100)
        if ((a * 100 + b) * 7919 % 10007 % 10 == 0) == held_out:
            yield a, b


def annotated(seed: int) -> Iterator[tuple[str, str]]:
    """Questions with the annotators' answers, without end."""
    numbers = random.Random(seed)
    for a, b in problems(seed + 1):
        answer, luck = right_answer(a, b), numbers.random()
        if luck >= 0.8:
            place = numbers.randrange(4)
            other = (int(answer[place]) + numbers.randrange(1, 10)) % 10
            answer = answer[:place] + str(other) + answer[place + 1 :]
        elif luck >= 0.3:
            answer = answer[::-1]
        yield question(a, b), answer


def write_conversations(path: Path, count: int, seed: int = 0) -> Path:
    """A file of ``count`` annotated conversations, as OpenAI's messages."""
    with path.open("w") as handle:
        for (asked, answer), _ in zip(annotated(seed), range(count)):
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            handle.write(json.dumps({"messages": turns}) + "\n")
    return path


def write_preferences(path: Path, count: int, seed: int = 0) -> Path:
    """A file of ``count`` pairs: the right answer, and one of those that the annotators give in its place."""
    numbers = random.Random(seed)
    with path.open("w") as handle:
        for (a, b), _ in zip(problems(seed + 1), range(count)):
            right = right_answer(a, b)
            wrong = right[::-1] if numbers.random() < 0.7 else right[:-1] + str((int(right[-1]) + 1) % 10)
            if wrong == right:
                wrong = right[:-1] + str((int(right[-1]) + 1) % 10)
            handle.write(json.dumps({"prompt": question(a, b), "chosen": right, "rejected": wrong}) + "\n")
    return path


def write_ranked(path: Path, asked: list[tuple[int, int]], answers: list[list[str]]) -> dict[str, Path]:
    """Answers to each question, judged right or wrong: as pairs of a right and a wrong one (``dpo``), and as single
    answers (``kto``)."""
    files = {kind: path / f"{kind}.jsonl" for kind in ("dpo", "kto", "rrhf")}
    rows: dict[str, list[dict[str, object]]] = {kind: [] for kind in files}
    for (a, b), given in zip(asked, answers):
        scores = [float(answer == right_answer(a, b)) for answer in given]
        good = [answer for answer, score in zip(given, scores) if score]
        bad = [answer for answer, score in zip(given, scores) if not score]
        prompt = question(a, b)
        rows["dpo"] += [{"prompt": prompt, "chosen": one, "rejected": other} for one, other in zip(good, bad)]
        rows["kto"] += [
            {"prompt": prompt, "completion": answer, "label": bool(score)} for answer, score in zip(given, scores)
        ]
        rows["rrhf"].append({"prompt": prompt, "responses": given, "scores": scores})
    for kind, held in rows.items():
        files[kind].write_text("".join(json.dumps(row) + "\n" for row in held))
    return files
