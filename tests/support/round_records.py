"""Records that a run in rounds leaves, written without a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from llm_parallel.data.tokenizer import load_tokenizer
from tests.support import four_digits


def write_rounds(
    run_dir: Path, rounds: dict[int, Sequence[Sequence[tuple[str, float]]]], questions: Sequence[str]
) -> Path:
    """Prompts, and for each kept round the answers with their scores to each of the prompts that it asks, which are as
    many as there are lists of answers. The last line of each file is torn."""
    tokenizer = four_digits.write_tokenizer(run_dir / "tokenizer")
    encode = load_tokenizer(tokenizer).encode
    data = run_dir / "data" / "abc"
    data.mkdir(parents=True)
    (data / "report.json").write_text(json.dumps({"stops": [four_digits.END], "tokenizer": str(tokenizer)}))
    prompts = [
        {"split": "train", "tokens": list(map(int, encode(question))), "record": {}, "where": f"p.jsonl line {number}",
         "messages": [{"role": "user", "content": question}]}
        for number, question in enumerate(questions, 1)
    ]  # fmt: skip
    (data / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    for number, asked in rounds.items():
        folder = run_dir / "rounds" / f"{number:06d}"
        folder.mkdir(parents=True)
        (folder / "round.json").write_text(json.dumps({"data": "abc", "prompts": len(asked), "seed": 7}))
        answers, scores = [], []
        for place, given in enumerate(asked, number * len(asked)):
            for sample, (text, score) in enumerate(given):
                tokens = list(map(int, encode(text)))
                key = {"prompt": place, "sample": sample}
                answers.append({**key, "tokens": tokens, "log_probs": [0.0] * len(tokens), "reason": "stop"})
                scores.append({**key, "score": score})
        for name, lines in (("answers", reversed(answers)), ("scores", scores)):
            (folder / f"{name}-0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"torn')
    return run_dir
