"""Records of preferences, by their fields: pairs, answers that were liked or not, and answers with scores or ranks.

``Group`` (``groups.py``) is what all of them become. The forms are those of TRL (explicit and implicit prompts),
Anthropic's HH-RLHF transcripts, LLaMA-Factory's rankings (Alpaca and ShareGPT), UltraFeedback, RRHF, arenas with a
winner, and KTO's labels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llm_parallel.config.tree_tune import Columns
from llm_parallel.data.formats import BadRecord, Reader, refuse_media
from llm_parallel.data.groups import BAD, GOOD, Answer, Group, Messages, check_group, common_messages

NAMES: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "query", "question"),
    "chosen": ("chosen", "chosen_response", "chosen_messages"),
    "rejected": ("rejected", "rejected_response", "rejected_messages"),
    "label": ("label", "kto_tag"),
    "responses": ("responses", "completions", "answers", "candidates"),
    "scores": ("scores", "rewards", "ratings"),
    "ranks": ("ranks", "rank", "ranking"),
    "margin": ("margin",),
}
"""Names that fields have if the run file does not say otherwise."""
ONE_TEXT = ("response", "text", "content", "completion", "answer", "output")
ONE_SCORE = ("score", "overall_score", "reward", "rating")
"""Names of an answer's text and score where each answer is an object of its own, as UltraFeedback has them."""
ARENA = (("response_a", "response_b"), ("conversation_a", "conversation_b"))
WINNERS = {"model_a": (GOOD, BAD), "a": (GOOD, BAD), "model_b": (BAD, GOOD), "b": (BAD, GOOD)}
FORMATS = {
    "pair": "'prompt', 'chosen' and 'rejected'",
    "label": "a conversation, or 'prompt' and 'completion', with 'label' or 'kto_tag'",
    "scores": "'prompt', 'responses' and 'scores' or 'ranks'",
    "arena": "'prompt', 'response_a', 'response_b' and 'winner'",
}
"""What a source's ``format`` may name beside the formats of conversations, which say how its prompts are written."""
TURN = re.compile(r"(?:^|\n)\n*(Human|Assistant): ?")
"""Where a turn of a transcript begins."""
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
YES, NO = ("true", "yes", "1", "good", "desirable", "chosen"), ("false", "no", "0", "bad", "undesirable", "rejected")


class PreferenceReader:
    """Reads the records of one source. ``wanted`` is one of ``FORMATS``, or anything else for the one that is found by
    the names of the fields; ``columns`` are the names of its fields, and ``roles`` names of roles besides the usual
    ones, as for ``formats.Reader``; ``found`` counts the records of each form."""

    def __init__(
        self, wanted: str = "auto", columns: Columns | None = None, roles: Mapping[str, str] | None = None
    ) -> None:
        self._wanted = wanted
        self._given = {name: value for name, value in (columns or Columns()).model_dump().items() if value}
        self._conversations = Reader("auto", columns, roles)
        self.found: dict[str, int] = {}

    def read(self, record: Any) -> Group:
        """The group of a record. Raises BadRecord."""
        if not isinstance(record, Mapping):
            raise BadRecord("is no record with named fields")
        refuse_media(record)
        form = self._recognised(record)
        shown, group = getattr(self, f"_{form}")(record)
        check_group(group)
        self.found[shown] = self.found.get(shown, 0) + 1
        return group

    def _recognised(self, record: Mapping[str, Any]) -> str:
        if self._wanted in FORMATS:
            self._need(record, self._wanted)
            return self._wanted
        have = {name: self._get(record, name) is not None for name in NAMES}
        if have["chosen"] or have["rejected"]:
            self._need(record, "pair")
            return "pair"
        if have["responses"] or isinstance(record.get(self._output), list):
            return "scores"
        if record.get("winner") is not None and any(record.get(one) is not None for one, _ in ARENA):
            return "arena"
        if have["label"]:
            return "label"
        raise BadRecord(
            f"has the fields {', '.join(map(repr, record))}, of which no preference can be made; known are "
            f"{'; '.join(FORMATS.values())}; other names can be given in `columns` of the source"
        )

    def _need(self, record: Mapping[str, Any], form: str) -> None:
        """Raises BadRecord if the record lacks a field of that form."""
        have = {one: self._get(record, one) is not None for one in NAMES}
        needed = {"pair": ("chosen", "rejected"), "label": ("label",), "scores": ("responses",), "arena": ("winner",)}
        have |= {"winner": record.get("winner") is not None and any(record.get(one) is not None for one, _ in ARENA)}
        have["responses"] |= isinstance(record.get(self._output), list)
        missing = [name for name in needed[form] if not have[name]]
        if missing:
            raise BadRecord(f"has no field {missing[0]!r}; its fields are {', '.join(map(repr, record))}")

    @property
    def _output(self) -> str:
        return self._given.get("output", "output")

    def _names(self, name: str) -> tuple[str, ...]:
        return (self._given[name],) if name in self._given else NAMES[name]

    def _get(self, record: Mapping[str, Any], name: str) -> Any:
        return next((record[one] for one in self._names(name) if record.get(one) is not None), None)

    def _pair(self, record: Mapping[str, Any]) -> tuple[str, Group]:
        texts = [self._get(record, name) for name in ("chosen", "rejected")]
        margin = self._get(record, "margin")
        facts = {} if margin is None else {"margin": _numbers([margin], "margin", 1)[0]}
        shown, prompt, answers, tools = self._compared(record, texts)
        scored = tuple(Answer(answer, score) for answer, score in zip(answers, (GOOD, BAD)))
        return shown, Group(prompt, scored, tools, True, facts)

    def _compared(
        self, record: Mapping[str, Any], texts: Sequence[Any]
    ) -> tuple[str, Messages, list[Messages], list[Any] | None]:
        """How two answers are given, their prompt, what each adds to it, and the tools."""
        asked, tools = self._prompt(record)
        transcripts = all(isinstance(text, str) and text.lstrip().startswith("Human:") for text in texts)
        answers = [_transcript(text) if transcripts else self._answer(text) for text in texts]
        shown = "transcripts" if transcripts else "preference"
        if not all(any(message["role"] == "assistant" for message in answer) for answer in answers):
            raise BadRecord("has an answer without a turn of the assistant")
        whole = [answer[0]["role"] != "assistant" for answer in answers]
        if any(whole) != all(whole):
            raise BadRecord("has one answer that is a whole conversation, and one that begins with the assistant")
        if not any(whole):
            if not asked:
                raise BadRecord("has two answers and no prompt; give the question in 'prompt'")
            return ("sharegpt preference" if self._asked_by_turns(record) else shown), asked, answers, tools
        # Whole conversations, whose beginning both share.
        alike = common_messages(*answers)
        prompt = answers[0][:alike]
        if asked and not self._asked_by_turns(record) and prompt[len(prompt) - len(asked) :] != asked:
            raise BadRecord("has a prompt with which its answers, two whole conversations, do not begin")
        return f"{shown} of whole conversations", prompt, [answer[alike:] for answer in answers], tools

    def _label(self, record: Mapping[str, Any]) -> tuple[str, Group]:
        score = GOOD if _liked(self._get(record, "label")) else BAD
        record = self._with_prompt(record)
        conversation = self._conversations.read(record)
        messages = conversation.messages
        if self._asked_by_turns(record) or self._asked(record, "instruction"):
            users = [number for number, message in enumerate(messages) if message["role"] == "user"]
            begins = users[-1] + 1 if users else 0
        else:
            begins = len(self._conversations.prompt(record).messages)
        answer = Answer(tuple(messages[begins:]), score)
        return "answers with a label", Group(tuple(messages[:begins]), (answer,), conversation.tools, True)

    def _scores(self, record: Mapping[str, Any]) -> tuple[str, Group]:
        responses = self._get(record, "responses")
        best_first = responses is None  # LLaMA-Factory's older form, several answers in the place of one
        texts = record[self._output] if best_first else responses
        if not isinstance(texts, (list, tuple)) or len(texts) < 2:
            raise BadRecord("has fewer than two responses in a list, and an answer is compared with others")
        scores, ranks = self._get(record, "scores"), self._get(record, "ranks")
        if scores is None and ranks is None and all(isinstance(one, Mapping) for one in texts):
            scores = [_held(one, ONE_SCORE) for one in texts]
        texts = [_held(one, ONE_TEXT) if isinstance(one, Mapping) and "role" not in one else one for one in texts]
        if scores is not None:
            numbers, shown = _numbers(scores, "scores", len(texts)), "answers with scores"
        elif ranks is not None:
            numbers, shown = [-rank for rank in _numbers(ranks, "ranks", len(texts))], "answers with ranks"
        elif best_first:
            numbers, shown = [-float(place) for place in range(len(texts))], "answers, the best first"
        else:
            raise BadRecord(f"has {len(texts)} responses and neither scores nor ranks")
        prompt, tools = self._prompt(record)
        answers = tuple(Answer(self._answer(text), number) for text, number in zip(texts, numbers))
        return shown, Group(prompt, answers, tools, labelled=False)

    def _arena(self, record: Mapping[str, Any]) -> tuple[str, Group]:
        fields = next(pair for pair in ARENA if record.get(pair[0]) is not None)
        winner = str(record["winner"]).strip().lower()
        scores = (BAD, BAD) if winner.startswith("tie") else WINNERS.get(winner)
        if scores is None:
            raise BadRecord(f"has the winner {record['winner']!r}; known are model_a, model_b, tie and tie (bothbad)")
        missing = [name for name in fields if record.get(name) is None]
        if missing:
            raise BadRecord(f"has no field {missing[0]!r}; its fields are {', '.join(map(repr, record))}")
        _, prompt, texts, tools = self._compared(record, [record[name] for name in fields])
        answers = tuple(Answer(text, score) for text, score in zip(texts, scores))
        return "arena", Group(prompt, answers, tools, labelled=winner != "tie")

    def _asked(self, record: Mapping[str, Any], name: str) -> bool:
        """Whether the prompt stands in Alpaca's ``instruction``."""
        return record.get("prompt") is None and record.get(self._given.get(name, name)) is not None

    def _asked_by_turns(self, record: Mapping[str, Any]) -> bool:
        """Whether the prompt is a list of turns under the name of one, as LLaMA-Factory's ShareGPT has it."""
        names = (
            (self._given["messages"],) if "messages" in self._given else ("messages", "conversations", "conversation")
        )
        others = ("prompt", "instruction")
        asked = any(record.get(self._given.get(name, name)) is not None for name in others)
        return not asked and any(record.get(name) is not None for name in names)

    def _with_prompt(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """The record with the prompt under a name that conversations know."""
        name = self._given.get("prompt", "prompt")
        if record.get(name) is None and record.get("query") is not None and record.get("instruction") is None:
            return {**record, name: record["query"]}
        return record

    def _prompt(self, record: Mapping[str, Any]) -> tuple[Messages, list[Any] | None]:
        """The messages before the answers, and the tools."""
        record = self._with_prompt(record)
        name = self._given.get("prompt", "prompt")
        text = record.get(name)
        found = self._conversations.prompt(record)
        if isinstance(text, str) and text.lstrip().startswith("Human:"):
            return _transcript(text), found.tools
        return tuple(found.messages), found.tools

    def _answer(self, value: Any) -> Messages:
        """The messages of an answer: a text, one turn, or several."""
        value = self._conversations.turns_or_text(value)
        if isinstance(value, str):
            return ({"role": "assistant", "content": value},)
        if isinstance(value, Mapping):
            value = [value]
        return tuple(self._conversations.turns(value, "an answer"))


def was_disliked(record: Mapping[str, Any]) -> bool:
    """Whether a record of one answer says that it was not liked. A ``label`` that is a number may be anything, such as
    the class of a text, and says nothing; ``kto_tag`` has one meaning."""
    label, tag = record.get("label"), record.get("kto_tag")
    if isinstance(label, bool) or (isinstance(label, str) and label.strip().lower() in ("true", "false")):
        return not _liked(label)
    if isinstance(tag, str):
        return tag.strip().lower() in NO
    return isinstance(tag, (bool, int, float)) and not tag


def _transcript(text: str) -> Messages:
    """The turns of a transcript of HH-RLHF; an empty one at its end, where the assistant is to answer, is none."""
    marks = list(TURN.finditer(text))
    if not marks or text[: marks[0].start()].strip():
        raise BadRecord("has a transcript that does not begin with 'Human:'")
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    turns = [{"role": SPEAKERS[mark[1]], "content": text[mark.end() : end].strip()} for mark, end in zip(marks, ends)]
    while turns and turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
        turns.pop()
    return tuple(turns)


def _liked(label: Any) -> bool:
    if isinstance(label, (bool, int, float)) and label in (0, 1):
        return bool(label)
    if isinstance(label, str) and label.strip().lower() in (*YES, *NO):
        return label.strip().lower() in YES
    raise BadRecord(f"has the label {label!r}; a label is true or false")


def _held(one: Mapping[str, Any], names: Sequence[str]) -> Any:
    found = next((one[name] for name in names if one.get(name) is not None), None)
    if found is None:
        raise BadRecord(f"has a response without {' or '.join(map(repr, names[:2]))}; its fields are {list(one)}")
    return found


def _numbers(values: Any, name: str, count: int) -> list[float]:
    if not isinstance(values, (list, tuple)) or len(values) != count:
        size = f"{len(values)} in a list" if isinstance(values, (list, tuple)) else repr(values)[:40]
        raise BadRecord(f"has {count} responses and {name} that are {size}; give a list with one for each")
    found = []
    for value in values:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise BadRecord(f"has the {name.rstrip('s')} {value!r} where a number is expected")
        found.append(number)
    return found
