"""The tasks that ``llm-parallel evaluate`` knows: where lm-eval describes each, which set it is over, its setting in
the table of the Llama 2 paper, and the published figure that stands beside a result."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """Where tasks of a set are described. folder: of lm-eval's task files, None for tasks of our own; form: of the
    set's files, by its name in ``forms.FORMS``."""

    folder: str | None
    form: str


PLACES: dict[str, Known] = {
    "mmlu": Known("mmlu/default", "mmlu"),
    "mmlu_continuation": Known("mmlu/continuation", "mmlu"),
    "triviaqa": Known("triviaqa", "triviaqa"),
    "nq_open": Known("nq_open", "nq_open"),
    "gsm8k": Known("gsm8k", "gsm8k"),
    "gsm8k_cot": Known("gsm8k", "gsm8k"),
    "humaneval": Known("humaneval", "humaneval"),
    "agieval_en": Known("agieval", "agieval"),
    "agieval": Known("agieval", "agieval"),
    "boolq": Known("super_glue/boolq", "boolq"),
    "hellaswag": Known("hellaswag", "hellaswag"),
    "openbookqa": Known("openbookqa", "openbookqa"),
    "quac": Known(None, "quac"),
    "winogrande": Known("winogrande", "winogrande"),
    "truthfulqa_mc1": Known("truthfulqa", "truthfulqa"),
    "truthfulqa_mc2": Known("truthfulqa", "truthfulqa"),
    "toxigen": Known("toxigen", "toxigen"),
    "ifeval": Known("ifeval", "ifeval"),
    "xstest": Known(None, "xstest"),
    "follow": Known(None, "follow"),
    "ceval-valid": Known("ceval", "ceval"),
    "cmmlu": Known("cmmlu", "cmmlu"),
}
PREFIXES = {
    "mmlu_continuation_": "mmlu_continuation", "mmlu_": "mmlu", "agieval_": "agieval", "ceval-valid_": "ceval-valid",
    "cmmlu_": "cmmlu",
}  # fmt: skip
"""How single tasks of a group begin."""

LLAMA2: dict[str, int] = {
    "mmlu": 5, "triviaqa": 1, "nq_open": 1, "gsm8k_cot": 8, "humaneval": 0, "agieval_en": 0, "boolq": 0, "hellaswag": 0,
    "openbookqa": 0, "quac": 0, "winogrande": 0,
}  # fmt: skip
"""The benchmarks of the Llama 2 paper with their numbers of examples. AGIEval had 3 to 5 there, by a recipe that was
not published; lm-eval's task has none."""
SETS: dict[str, tuple[str, ...]] = {
    "llama2": tuple(LLAMA2),
    "safety": ("xstest", "truthfulqa_mc1", "truthfulqa_mc2", "toxigen"),
    "instructions": ("follow", "ifeval"),
    "chinese": ("ceval-valid", "cmmlu"),
}
"""Names under which several tasks are asked for."""


@dataclass(frozen=True)
class Published:
    """A figure of a paper, in percent, with its setting: it is a neighbour of ours, never measured alike."""

    metric: str
    llama2_7b: float
    setting: str


PUBLISHED: dict[str, Published] = {
    "mmlu": Published("acc", 45.3, "5-shot"),
    "triviaqa": Published("exact_match", 68.9, "1-shot"),
    "nq_open": Published("exact_match", 22.7, "1-shot"),
    "gsm8k_cot": Published("exact_match", 14.6, "8-shot"),
    "humaneval": Published("pass@1", 12.8, "0-shot"),
    "agieval_en": Published("acc", 29.3, "3- to 5-shot"),
    "boolq": Published("acc", 77.4, "0-shot"),
    "hellaswag": Published("acc_norm", 77.2, "0-shot"),
    "openbookqa": Published("acc_norm", 58.6, "0-shot, divided by the answer's own probability"),
    "quac": Published("f1", 39.7, "0-shot"),
    "winogrande": Published("acc", 69.2, "0-shot"),
}
"""Of Llama 2 7B (Touvron et al. 2023, arXiv 2307.09288), from Meta's own prompts, which are not public: two tables of
Meta's give it 77.4 and 65.5 on BoolQ."""


def place_of(task: str) -> Known | None:
    """Where a task is described; None for one that only lm-eval's whole index knows."""
    if task in PLACES:
        return PLACES[task]
    return next((PLACES[of] for prefix, of in PREFIXES.items() if task.startswith(prefix)), None)


def expanded(names: tuple[str, ...]) -> dict[str, int | None]:
    """Tasks and groups of lm-eval by the names that were asked for, with the examples that a set of ours gives them."""
    found: dict[str, int | None] = {}
    for name in names:
        for task in SETS.get(name, (name,)):
            found.setdefault(task, LLAMA2[task] if name == "llama2" else None)
    return found
