"""Continues a few prompts: the generator for callers that want the whole answers of one replica."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from llm_parallel.data.tokenizer import Tokenizer
from llm_parallel.generate.draw import Choice
from llm_parallel.generate.engine import Generator, GeneratorOptions
from llm_parallel.generate.requests import Reason, Request
from llm_parallel.generate.sampling import Sampling
from llm_parallel.generate.structure import Structure
from llm_parallel.parallel.engine import Engine, Network


@dataclass
class Structured:
    """The form that answers have, and the tokenizer that it is about. ``unfinished`` is filled with the numbers of the
    prompts whose answers ended before their form was complete, and why."""

    structure: Structure
    tokenizer: Tokenizer
    unfinished: dict[int, Reason] = field(default_factory=dict)


def generate(
    model: Network | Engine,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    ends: Collection[int] = (),
    on_token: Callable[[int, int], bool | None] | None = None,
    structured: Structured | None = None,
) -> list[list[int]]:
    """New tokens for each prompt, up to and without one of ``ends``.

    prompts: token ids, of any lengths. ``on_token`` is called with (prompt number, token) as they come, and an answer
    ends with the token for which it returns true. ``structured``: the form of all answers. Every rank of a replica
    calls this with the same arguments and gets the same answer. Raises UserError for an empty prompt or one that leaves
    no room in the model's context, and for a form that cannot be enforced.
    """
    ended: list[int] = []
    cut: set[int] = set()

    def take(number: int, _: int, choice: Choice) -> None:
        if on_token is not None and choice.token not in stops and on_token(number, choice.token):
            ended.append(number)

    stops = frozenset(ends)
    structure = structured.structure if structured else None
    requests = [
        Request(number, tuple(prompt), sampling, stops, structure=structure) for number, prompt in enumerate(prompts)
    ]
    room = sum(len(prompt) + sampling.max_new_tokens for prompt in prompts)
    options = GeneratorOptions()
    # No larger than these prompts can fill, each to a whole page.
    room = min(room, options.max_running * max(len(prompt) + sampling.max_new_tokens for prompt in prompts))
    room += options.page_tokens * (len(prompts) + 1)
    tokenizer = structured.tokenizer if structured else None
    generator = Generator(model, GeneratorOptions(cache_tokens=room), tokenizer, on_token=take)
    for request in requests:
        generator.submit(request)
    answers: list[list[int]] = [[] for _ in prompts]
    for finished in generator.ticks():
        cut.update(ended)
        for answer in finished:
            kept = answer.tokens[:-1] if answer.reason is Reason.STOP else answer.tokens
            answers[answer.number] = list(kept)
            if structured is not None and answer.truncated and answer.number not in cut:
                structured.unfinished[answer.number] = answer.reason
        for number in ended:
            generator.cancel(number)
        ended.clear()
    return answers
