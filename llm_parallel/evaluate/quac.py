"""QuAC (Choi et al. 2018, arXiv 1808.07036) as a task of lm-eval, with the rules of the set's official scorer.

Each question of a dialogue is one document: its prompt holds the section's text and the turns before it with their gold
answers. The answer is scored by its words' F1 against several references. As the official scorer does, each reference
is left out in turn and the average is taken, so that the number compares with that of a person, who is scored against
the others; questions whose references agree with an F1 under 0.4 are left out. HEQ-Q is the share of questions in which
the answer is at least as good as people's, HEQ-D that of dialogues in which all are.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NO_ANSWER = "CANNOTANSWER"
LEAST_AGREEMENT = 0.4
PUNCTUATION = str.maketrans("", "", string.punctuation)


def words(text: str) -> list[str]:
    """Words of an answer without case, punctuation and articles."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(PUNCTUATION)).split()


def f1(answer: str, reference: str) -> float:
    """F1 of the words of an answer; 1 or 0 where one of the two says that there is no answer."""
    if NO_ANSWER in (answer, reference):
        return float(answer == reference)
    found, right = words(answer), words(reference)
    common = sum((Counter(found) & Counter(right)).values())
    return 2 * common / (len(found) + len(right)) if common else 0.0


def against_all(answer: str, references: Sequence[str]) -> float:
    """The answer's F1 against the best reference, averaged over leaving out each of them."""
    if len(references) == 1:
        return f1(answer, references[0])
    scores = [f1(answer, reference) for reference in references]
    return sum(max(scores[:at] + scores[at + 1 :]) for at in range(len(scores))) / len(scores)


def of_people(references: Sequence[str]) -> float:
    """How well the references agree: each one's F1 against the best of the others, averaged. 1 for a single one."""
    if len(references) == 1:
        return 1.0
    others = [[*references[:at], *references[at + 1 :]] for at in range(len(references))]
    return sum(max(f1(one, other) for other in rest) for one, rest in zip(references, others)) / len(references)


def kept_references(texts: Iterable[str]) -> list[str]:
    """The references that count: only that there is no answer, where at least half of the annotators say so, else only
    the answers."""
    found = [text.strip() for text in texts]
    if 2 * found.count(NO_ANSWER) >= len(found):
        return [NO_ANSWER]
    return [text for text in found if text != NO_ANSWER]


def quac_rows(article: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """A document for each question of an article that counts."""
    if "prompt" in article and "references" in article:
        yield dict(article)
        return
    for paragraph in article["paragraphs"]:
        text = str(paragraph["context"]).removesuffix(NO_ANSWER).strip()
        head = f"Title: {article['title']} - {article.get('section_title', '')}\nBackground: {text}\n\n"
        turns = ""
        for question in paragraph["qas"]:
            references = kept_references(answer["text"] for answer in question["answers"])
            agreement = of_people(references)
            if agreement >= LEAST_AGREEMENT:
                yield {
                    "dialogue": str(paragraph.get("id", article["title"])),
                    "prompt": f"{head}{turns}Q: {question['question']}\nA:",
                    "references": references,
                    "people": agreement,
                }
            given = question.get("orig_answer") or question["answers"][0]
            turns += f"Q: {question['question']}\nA: {given['text']}\n"


def answer_of(text: str) -> str:
    """The answer in what a model wrote: its first line; what says that there is no answer becomes the set's mark."""
    line = text.strip().split("\n")[0].strip()
    return NO_ANSWER if plain_refusal(line) else line


def plain_refusal(line: str) -> bool:
    """Whether a line is the set's mark for questions without an answer, in any case and with or without a blank."""
    return re.sub(r"[^a-z]", "", line.lower()) in ("cannotanswer", "icannotanswer")


def results(document: Mapping[str, Any], answers: Sequence[str]) -> dict[str, Any]:
    """F1, and whether the answer is as good as people's, of one document."""
    score = against_all(answer_of(answers[0]), document["references"])
    human = score >= document["people"]
    return {"f1": score, "heq_q": float(human), "heq_d": (document["dialogue"], human)}


def share_of_dialogues(values: Iterable[tuple[str, bool]]) -> float:
    """HEQ-D: the share of dialogues in which every question is answered at least as well as people do."""
    every: dict[str, bool] = {}
    for dialogue, human in values:
        every[dialogue] = every.get(dialogue, True) and human
    return sum(every.values()) / len(every)


def task() -> dict[str, Any]:
    """The task as lm-eval's configuration, but for its data."""
    metrics: list[dict[str, Any]] = [
        {"metric": "f1", "aggregation": "mean", "higher_is_better": True},
        {"metric": "heq_q", "aggregation": "mean", "higher_is_better": True},
        {"metric": "heq_d", "aggregation": share_of_dialogues, "higher_is_better": True},
    ]
    return {
        "task": "quac",
        "output_type": "generate_until",
        "validation_split": "validation",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{references[0]}}",
        "num_fewshot": 0,
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "temperature": 0.0, "max_gen_toks": 64},
        "process_results": results,
        "metric_list": metrics,
        "metadata": {"version": 1.0},
    }
