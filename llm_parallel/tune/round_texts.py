"""The answers of a run's rounds as texts, from the records that the rounds have left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_parallel.data.prompts import Prompt, Prompts
from llm_parallel.data.tokenizer import Tokenizer, load_tokenizer
from llm_parallel.errors import UserError
from llm_parallel.generate.answer import Answer
from llm_parallel.tune.round_files import RoundFolder


@dataclass(frozen=True)
class RoundAnswer:
    """One answer. score: what the judge said, or None if it is not judged; complete: whether the model ended it."""

    text: str
    score: float | None
    complete: bool
    tokens: int


@dataclass(frozen=True)
class Answers:
    """A prompt of a round with its answers in the order of their samples."""

    prompt: Prompt
    answers: tuple[RoundAnswer, ...]


def kept_rounds(run_dir: str | Path) -> list[int]:
    """Numbers of the rounds whose records a run folder still has."""
    return sorted(int(path.name) for path in (Path(run_dir) / "rounds").glob("[0-9]" * 6) if path.is_dir())


def read_round(run_dir: str | Path, number: int) -> list[Answers]:
    """The prompts of a round that have answers. Raises UserError if its records cannot be read."""
    folder = RoundFolder(run_dir, number)
    about = folder.about
    try:
        prompts = Prompts.open(Path(run_dir) / "data" / str(about["data"]))
        asking = prompts.of_round(number, int(about["prompts"]), int(about["seed"]))
        tokenizer = load_tokenizer(prompts.tokenizer)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"round {number} of {run_dir} cannot be read: its prompts are gone or damaged ({error})"
        ) from None
    answers, scores = folder.answers(), folder.scores()
    found = []
    for place, prompt in asking:
        own = [answers[key] for key in sorted(answers) if key[0] == place]
        texts = tuple(
            RoundAnswer(
                text_of(tokenizer, prompt.tokens, one.tokens), scores.get(one.key), one.complete, len(one.tokens)
            )
            for one in own
        )
        if texts:
            found.append(Answers(prompt, texts))
    return found


def text_of(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of an answer's tokens after a prompt's, without control tokens."""
    answer = Answer(tokenizer, prompt)
    for token in tokens:
        answer.add(token)
    return answer.text()
