"""Simple instructions whose following a program can check: at most so many words, JSON, a given word, capital letters.
The prompts are our own and need no data."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

TOPICS = ("the moon", "a library", "green tea", "bicycles", "the number seven", "winter", "bridges", "honey")
_WORD = re.compile(r"[\w'\u2019-]+")


def documents() -> list[dict[str, Any]]:
    """Every instruction about every topic."""
    found = []
    for topic in TOPICS:
        for kind, value, text in (
            ("most_words", "20", f"Describe {topic} within 20 words."),
            ("json", "", f"Give a JSON object with the keys name and description about {topic}. Write nothing else."),
            ("word", "because", f"Write one sentence about {topic} that has the word because in it."),
            ("capitals", "", f"Write one sentence about {topic} in capital letters only."),
            (
                "ends",
                "Thank you.",
                f'Write two sentences about {topic}. Finish with "Thank you." and nothing after it.',
            ),
        ):
            found.append({"prompt": text, "kind": kind, "value": value})
    return found


def follows(answer: str, kind: str, value: str) -> bool:
    """Whether an answer follows an instruction of a kind. Raises ValueError for a kind that is unknown."""
    answer = answer.strip()
    if not answer:
        return False
    if kind == "most_words":
        return len(_WORD.findall(answer)) <= int(value)
    if kind == "json":
        fenced = re.fullmatch(r"```(?:json)?\s*\n(.*?)\n?```", answer, re.DOTALL)
        try:
            given = json.loads(fenced[1] if fenced else answer)
        except ValueError:
            return False
        return isinstance(given, dict) and {"name", "description"} <= set(given)
    if kind == "word":
        return value in [word.lower() for word in _WORD.findall(answer)]
    if kind == "capitals":
        return answer.upper() == answer and any(map(str.isalpha, answer))
    if kind == "ends":
        return answer.endswith(value)
    raise ValueError(f"no instruction is of the kind {kind!r}")


def results(document: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """Whether a document's instruction is followed, in all and by its kind."""
    followed = float(follows(answers[0], document["kind"], document["value"]))
    return {"followed": followed, f"followed_{document['kind']}": followed}


def task() -> dict[str, Any]:
    """The task as lm-eval's configuration, but for its data."""
    names = ("followed", *(f"followed_{kind}" for kind in ("most_words", "json", "word", "capitals", "ends")))
    return {
        "task": "follow",
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{kind}}",
        "num_fewshot": 0,
        "generation_kwargs": {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": 96},
        "process_results": results,
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names],
        "metadata": {"version": 1.0},
    }
