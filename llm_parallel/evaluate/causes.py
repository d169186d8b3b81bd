"""Why two evaluations differ, by what they asked and got, and by what they say about themselves.

Each cause is looked for in the samples first, so that results of lm-eval itself, which say less about themselves, can
be compared too."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import median
from typing import Any

from llm_parallel.evaluate.pairs import Pair, answers_of, arguments_of, log_probs_of, prompts_of
from llm_parallel.evaluate.results import OURS

MARKS = re.compile(r"<\|[\w ]+\|>|\[/?INST\]|<(?:start|end)_of_turn>|</?(?:user|assistant|system)>")
"""What chat templates write and plain prompts do not."""
BEGINS = ("<s>", "<bos>", "<|begin_of_text|>", "<|endoftext|>", "<|startoftext|>")
BLANKS = re.compile(r"[ \t]+")
SAME_NUMBERS = 2e-3
"""Log-probabilities of one model in two layouts or kernels in fp32 differ by less."""
ROUNDING = 0.5
"""Those of two precisions differ by less, but for a few."""
EXCERPT = 40


@dataclass(frozen=True)
class Cause:
    """A cause by its name, and a sentence of evidence."""

    name: str
    evidence: str


def causes(first: Mapping[str, Any], second: Mapping[str, Any], pairs: Mapping[str, Sequence[Pair]]) -> list[Cause]:
    """Every cause that is found, the most telling first."""
    every = list(chain.from_iterable(pairs.values()))
    found = [
        *_of_prompts(every, first, second),
        *_of_begin(first, second),
        *_of_generation(every),
        *_of_length(first, second),
        *_of_model(first, second),
        *_of_versions(first, second, pairs),
    ]
    return [*found, *_of_numbers(every, first, second, found)]


def prompt_difference(one: str, other: str) -> str:
    """How two prompts of the same document differ: by ``trailing space`` (which a task that ends its questions with one
    also leaves in its examples), ``white space`` elsewhere, ``begin token``, ``template``, ``examples`` (what stands
    before the question) or ``wording``."""
    if one.rstrip() == other.rstrip():
        return "trailing space"
    if BLANKS.sub(" ", one).rstrip() == BLANKS.sub(" ", other).rstrip():
        return "trailing space" if one[-1:].isspace() != other[-1:].isspace() else "white space"
    if any(one == begin + other or other == begin + one for begin in BEGINS):
        return "begin token"
    if bool(MARKS.search(one)) != bool(MARKS.search(other)):
        return "template"
    common = _common_end(one, other)
    if common >= min(20, len(one) // 2, len(other) // 2):
        return "examples"
    return "template" if MARKS.search(one) else "wording"


def _common_end(one: str, other: str) -> int:
    count = 0
    for a, b in zip(reversed(one), reversed(other)):
        if a != b:
            break
        count += 1
    return count


def _of_prompts(pairs: Iterable[Pair], first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Cause]:
    kinds: dict[str, list[Pair]] = {}
    for pair in pairs:
        one, other = prompts_of(pair.first), prompts_of(pair.second)
        if one != other:
            texts = next(((a, b) for a, b in zip(one, other) if a != b), (str(one), str(other)))
            kinds.setdefault(prompt_difference(*texts), []).append(pair)
    found = []
    for kind, members in sorted(kinds.items(), key=lambda item: -len(item[1])):
        name, what = kind, f"{len(members)} prompts differ: {excerpts(members[0])}"
        if kind == "examples":
            shots = {
                (first.get("n-shot", {}).get(pair.task), second.get("n-shot", {}).get(pair.task)) for pair in members
            }
            unequal = sorted(f"{a} and {b}" for a, b in shots if a != b)
            name = "few-shot examples"
            told = f"there are {', '.join(unequal)} of them" if unequal else "as many, but others or in another order"
            what = f"{len(members)} prompts have other text before the question ({told}): {excerpts(members[0])}"
        elif kind == "template":
            name = "chat template"
        found.append(Cause(name, what))
    return found


def excerpts(pair: Pair) -> str:
    """Where the first prompts of a pair begin to differ."""
    one, other = next(((a, b) for a, b in zip(prompts_of(pair.first), prompts_of(pair.second)) if a != b), ("", ""))
    place = next((at for at, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    start = max(place - EXCERPT // 2, 0)
    return f"{one[start : place + EXCERPT]!r} and {other[start : place + EXCERPT]!r}"


def _of_begin(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Cause]:
    one, other = (results.get(OURS, {}).get("begin") for results in (first, second))
    if one is None or other is None or one == other:
        return []
    told = [" ".join(tokens) if tokens else "no token" for tokens in (one, other)]
    return [Cause("begin token (BOS)", f"texts begin with {told[0]} in the first and with {told[1]} in the second")]


def _of_generation(pairs: Iterable[Pair]) -> list[Cause]:
    """Differences of what lm-eval passes with a prompt that is to be continued."""
    changed: Counter[tuple[str, str, str]] = Counter()
    for pair in pairs:
        for one, other in zip(arguments_of(pair.first), arguments_of(pair.second)):
            if len(one) == len(other) == 2 and isinstance(one[1], Mapping) and isinstance(other[1], Mapping):
                for key in sorted({*one[1], *other[1]}):
                    if one[1].get(key) != other[1].get(key):
                        changed[key, repr(one[1].get(key)), repr(other[1].get(key))] += 1
    names = {"until": "stop strings", "max_gen_toks": "length of answers", "temperature": "sampling"}
    return [
        Cause(names.get(key, f"generation setting {key}"), f"{count} requests have {key} {one} and {other}")
        for (key, one, other), count in changed.most_common()
    ]


def _of_length(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Cause]:
    one, other = first.get(OURS, {}), second.get(OURS, {})
    cut = [dict(found.get("truncated") or {}) for found in (one, other)]
    lengths = [found.get("context") for found in (one, other)]
    if cut[0] == cut[1]:
        return []
    return [
        Cause(
            "truncation",
            f"{sum(cut[0].values())} and {sum(cut[1].values())} prompts were cut at the beginning; the contexts are "
            f"{lengths[0]} and {lengths[1]} tokens",
        )
    ]


def _of_model(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Cause]:
    found = []
    one, other = first.get(OURS, {}), second.get(OURS, {})
    held = [(str(of.get("precision")), str(of.get("weights"))) for of in (one, other)]
    types = [
        str(results.get("config", {}).get("model_dtype", "")).removeprefix("torch.") for results in (first, second)
    ]
    plain = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    types = [plain.get(name, name) for name in types]
    if (one and other and held[0] != held[1]) or (all(types) and types[0] != types[1]):
        told = [f"{a} (weights {b})" for a, b in held] if one and other else types
        found.append(Cause("precision", f"the model is held in {told[0]} and in {told[1]}"))
    names = [results.get("config", {}).get("model") for results in (first, second)]
    if one and other and one.get("model") != other.get("model"):
        found.append(Cause("model", f"the models are {one.get('model')} and {other.get('model')}"))
    elif not (one and other) and names[0] != names[1]:
        found.append(Cause("back end", f"the models are run by {names[0]} and {names[1]}"))
    if one.get("tokenizer") and other.get("tokenizer") and one["tokenizer"] != other["tokenizer"]:
        found.append(Cause("tokenizer", "the tokenizers have different content"))
    return found


def _of_versions(
    first: Mapping[str, Any], second: Mapping[str, Any], pairs: Mapping[str, Sequence[Pair]]
) -> list[Cause]:
    found = []
    for task in pairs:
        one, other = first.get("versions", {}).get(task), second.get("versions", {}).get(task)
        if one != other:
            found.append(Cause("version of a task", f"{task} has version {one} and {other}"))
    same = [
        pair for of_task in pairs.values() for pair in of_task if pair.first.get("resps") == pair.second.get("resps")
    ]
    judged = sum(any((v := pair.values(name)) and v[0] != v[1] for name in pair.metrics) for pair in same)
    if judged:
        found.append(Cause("scoring", f"{judged} documents have the same answers and other scores"))
    return found


def _of_numbers(
    pairs: Iterable[Pair], first: Mapping[str, Any], second: Mapping[str, Any], others: Sequence[Cause]
) -> list[Cause]:
    """Differences of log-probabilities, and of answers, to the same prompts that nothing else explains."""
    if any(cause.name in ("precision", "begin token (BOS)", "model", "tokenizer") for cause in others):
        return []
    same = [pair for pair in pairs if pair.same_prompt]
    apart = [abs(a - b) for pair in same for a, b in zip(log_probs_of(pair.first), log_probs_of(pair.second))]
    if apart and max(apart) > SAME_NUMBERS:
        middle = median(apart)
        told = (
            f"log-probabilities of the same prompts differ by {middle:.2g} in the middle and {max(apart):.2g} at most"
        )
        if middle < ROUNDING:
            return [Cause("precision or kernels", f"{told}, as rounding makes them")]
        return [Cause("another model, or other tokens before the text", told)]
    changed = sum(answers_of(pair.first) != answers_of(pair.second) for pair in same)
    if changed and not others:
        return [Cause("rounding", f"{changed} answers to the same prompts differ, and nothing that was asked")]
    return []
