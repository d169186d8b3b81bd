"""Our generation engine as a model of lm-evaluation-harness.

Everything that lm-eval decides stays its own: prompts, where a text is divided into context and continuation, metrics.
What is ours is how the requests run. The continuations of one context that differ in their last token alone are read
from one row of the output, and all other requests share the keys of what they begin with alike: the examples of a task
are computed once, a question once for all of its choices.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llm_parallel.data.chat import ChatEncoder
from llm_parallel.data.template import Refused
from llm_parallel.data.tokenizer import Tokenizer
from llm_parallel.errors import UserError
from llm_parallel.evaluate.record import Outcome
from llm_parallel.evaluate.runner import Work
from llm_parallel.generate.answer import Answer
from llm_parallel.generate.requests import Request
from llm_parallel.generate.sampling import Sampling

Pair = tuple[Any, list[int], list[int]]
"""What lm-eval calls the request, the tokens of a context, and those of its continuation."""
ONE = Sampling(max_new_tokens=1)
NEW_TOKENS = 256
"""Tokens of an answer where the task does not say, as in lm-eval's own back ends."""


@dataclass(frozen=True)
class Member:
    """A continuation that is read from a row. number: its place among the requests; first: the place of its first token
    in the whole text; last: its last token."""

    number: int
    first: int
    last: int


def rows_of(pairs: Sequence[Pair], context: int) -> dict[tuple[int, ...], list[Member]]:
    """The texts that have to be run for log-likelihoods, each without its last token, and the continuations that are
    read from it. Of a text that is longer than the model's context the last tokens are kept, as in lm-eval. Raises
    UserError for a continuation that is longer than the context."""
    rows: dict[tuple[int, ...], list[Member]] = {}
    for number, (_, before, after) in enumerate(pairs):
        if len(after) > context:
            raise UserError(
                f"a continuation has {len(after)} tokens and the model's context {context}; leave its task out"
            )
        text = [*before, *after][-(context + 1) :]
        rows.setdefault(tuple(text[:-1]), []).append(Member(number, len(text) - len(after), text[-1]))
    return rows


def request_of(row: tuple[int, ...], members: Sequence[Member]) -> Request:
    """The request for the continuations of a row."""
    first = min(member.first for member in members)
    candidates = tuple(dict.fromkeys(member.last for member in members))
    wanted = 1 if first < len(row) else None
    return Request(0, row, ONE, prompt_log_probs=wanted, scores_from=min(first, len(row)), candidates=candidates)


def read(request: Request, members: Sequence[Member], outcome: Outcome) -> Iterable[tuple[int, tuple[float, bool]]]:
    """Place, log-probability and whether it is the likeliest text, of each continuation."""
    inside = outcome.scores[: len(outcome.scores) - len(request.candidates)]
    last = dict(zip(request.candidates, outcome.scores[len(inside) :]))
    for member in members:
        own = inside[member.first - request.scores_from :] if member.first < len(request.prompt) else ()
        right = request.prompt[member.first :]
        greedy = all(best == token for (_, best), token in zip(own, right)) and outcome.tokens[0] == member.last
        yield member.number, (sum(score for score, _ in own) + last[member.last][0], greedy)


class Answers(Protocol):
    """What answers requests, on rank 0: ``Runner``, or within a training ``Together``."""

    def run(self, work: Work) -> list[Outcome]:
        """The outcomes, in the order of the requests."""
        ...


@dataclass(frozen=True)
class Texts:
    """How texts become tokens. begin: tokens before a text; ends: tokens that end an answer; encoder: what writes
    conversations, None where the model is evaluated without a template; context: tokens of the model's context."""

    tokenizer: Tokenizer
    begin: tuple[int, ...]
    ends: frozenset[int]
    context: int
    encoder: ChatEncoder | None = None


@dataclass(frozen=True)
class SpecialTokens:
    """Names and ids of special tokens, as lm-eval notes them in the results."""

    bos_token: str | None
    bos_token_id: int | None
    eos_token: str
    eos_token_id: int

    @staticmethod
    def of(tokenizer: Tokenizer) -> SpecialTokens:
        """Of a tokenizer."""
        bos = None if tokenizer.bos is None else tokenizer.token(tokenizer.bos)
        return SpecialTokens(bos, tokenizer.bos, tokenizer.token(tokenizer.eod), tokenizer.eod)

    @property
    def pad_token(self) -> str:
        """Nothing is padded here; lm-eval takes the end token where there is no other."""
        return self.eos_token

    @property
    def pad_token_id(self) -> int:
        """Of ``pad_token``."""
        return self.eos_token_id


class EngineLM(TemplateLM):
    """See lm-eval's ``TemplateLM``. All processes but rank 0 follow it."""

    def __init__(self, texts: Texts, runner: Answers, info: dict[str, Any]) -> None:
        super().__init__()
        self._texts, self._runner, self._info = texts, runner, info
        self.tokenizer = SpecialTokens.of(texts.tokenizer)
        self._tasks: list[str] = []
        self.truncated: dict[str, int] = {}
        """Requests of each task that were longer than the context, whose beginning was left out."""
        self._encode = lru_cache(4096)(self._encoded)
        bos = texts.tokenizer.bos
        self._prefix_text = texts.tokenizer.decode([texts.tokenizer.eod if bos is None else bos], control=True)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._texts.tokenizer.eod

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        bos = self._texts.tokenizer.bos
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """Tokens of the model's context."""
        return self._texts.context

    @property
    def max_gen_toks(self) -> int:
        """Tokens of an answer where the task does not say."""
        return NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer."""
        return self._texts.tokenizer.name

    def get_model_info(self) -> dict[str, Any]:
        """What stands in the results about the model."""
        return self._info

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text, after those that begin texts unless ``add_special_tokens`` is false or the text begins with
        them."""
        begins = add_special_tokens is not False and not (
            add_special_tokens is None and string.startswith(self._prefix_text)
        )
        return [*(self._texts.begin if begins else ()), *self._encode(string)]

    def _encoded(self, text: str) -> tuple[int, ...]:
        if self._texts.encoder is not None:
            return tuple(map(int, self._texts.encoder.tokenizer.encode(text).ids))
        return tuple(map(int, self._texts.tokenizer.encode(text)))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, up to where the assistant answers or, without ``add_generation_prompt``, up to
        the end of the last message. Raises UserError if the template refuses it."""
        assert self._texts.encoder is not None, "the command opens it where a template is asked for"
        template = self._texts.encoder.template
        try:
            text = template.text(chat_history, generation_prompt=add_generation_prompt)
        except Refused as error:
            raise UserError(f"the chat template refuses a prompt of the tasks: {error}; leave --chat out") from None
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source."""
        return self._texts.encoder.template.source if chat_template and self._texts.encoder is not None else None

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """See lm-eval."""
        self._tasks = [request.task_name or "" for request in requests]
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **_: Any) -> list[tuple[float, bool]]:
        rows = rows_of(requests, self._texts.context)
        for task, (_, before, after) in zip(self._tasks, requests):
            self._note_length(task, len(before) + len(after) - 1)
        made = [request_of(row, members) for row, members in rows.items()]
        outcomes = self._runner.run(Work(made, [self._tasks[members[0].number] for members in rows.values()]))
        found: dict[int, tuple[float, bool]] = {}
        for request, members, outcome in zip(made, rows.values(), outcomes):
            found.update(read(request, members, outcome))
        return [found[number] for number in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """See lm-eval: the log-likelihood of whole texts, in windows of the model's context."""
        pairs: list[Pair] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            for before, after in map(make_disjoint_window, windows):
                pairs.append((None, before, after))
                owners.append(number)
        self._tasks = [requests[owner].task_name or "" for owner in owners]
        sums = [0.0] * len(requests)
        for owner, (log_prob, _) in zip(owners, self._loglikelihood_tokens(pairs)):
            sums[owner] += log_prob
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """See lm-eval. The text is that of the tokens after the prompt, as they read there; it ends before the first of
        the task's stop strings, which are also found in the names of special tokens."""
        made: list[Request] = []
        repeats: dict[Request, int] = {}
        for request in requests:
            text, how = request.args
            one = self._generation(request.task_name or "", text, dict(how))
            repeats[one] = repeats.get(one, -1) + 1
            made.append(one if one.sampling.temperature == 0.0 else replace(one, stream=repeats[one]))
        outcomes = self._runner.run(Work(made, [request.task_name or "" for request in requests]))
        return [self._text(request, outcome) for request, outcome in zip(made, outcomes)]

    def _note_length(self, task: str, tokens: int) -> None:
        if tokens > self._texts.context:
            self.truncated[task] = self.truncated.get(task, 0) + 1

    def _generation(self, task: str, text: str, how: dict[str, Any]) -> Request:
        settings = normalize_gen_kwargs(how, self.max_gen_toks)
        stops = tuple(stop for stop in handle_stop_sequences(settings.get("until"), None) if stop)
        new = settings["max_gen_toks"]
        if new >= self._texts.context:
            raise UserError(
                f"a task asks for {new} new tokens and the model's context has {self._texts.context}; give --new-tokens"
            )
        drawn = {name: settings[name] for name in ("top_k", "top_p", "min_p") if settings.get(name) is not None}
        sampling = Sampling(max_new_tokens=new, temperature=float(settings.get("temperature") or 0.0), **drawn)
        prompt = self.tok_encode(text) or [self.prefix_token_id]
        self._note_length(task, len(prompt) + new)
        return Request(0, tuple(prompt[-(self._texts.context - new) :]), sampling, self._texts.ends, stops)

    def _text(self, request: Request, outcome: Outcome) -> str:
        answer = Answer(self._texts.tokenizer, request.prompt, request.stop)
        for token in outcome.tokens:
            if token in request.ends or answer.add(token):
                break
        return answer.text()
