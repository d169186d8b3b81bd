"""A model whose distributions have a closed form, in place of a generator."""

from __future__ import annotations

import numpy as np

from llm_parallel.evaluate.record import Outcome
from llm_parallel.generate.requests import Request


def log_probs(prefix: tuple[int, ...], vocabulary: int) -> np.ndarray:
    """Of the token after a text, fp64 [vocabulary]; each token of the text counts."""
    weights = np.array([1.0 + (7 * token + 3 * sum(prefix) + len(prefix)) % 11 for token in range(vocabulary)])
    return np.log(weights / weights.sum())


def answered(request: Request, vocabulary: int, writes: tuple[int, ...] = ()) -> Outcome:
    """What a generator with that model gives. writes: the answer's tokens; none: the likeliest one."""
    text, scores = request.prompt, list[tuple[float, int]]()
    for place in range(request.scores_from, len(text)) if request.prompt_log_probs is not None else ():
        found = log_probs(text[:place], vocabulary)
        scores.append((float(found[text[place]]), int(found.argmax())))
    last = log_probs(text, vocabulary)
    scores += [(float(last[token]), -1) for token in request.candidates]
    return Outcome(writes or (int(last.argmax()),), tuple(scores), "length")
