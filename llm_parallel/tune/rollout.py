"""Answers of the model itself, judged: the first half of a round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist

from llm_parallel.config.tree import RunConfig
from llm_parallel.data.prompts import Prompt
from llm_parallel.data.tokenizer import Tokenizer
from llm_parallel.errors import UserError
from llm_parallel.generate.answer import Answer
from llm_parallel.generate.engine import Generator, GeneratorOptions
from llm_parallel.generate.requests import Finished, Request
from llm_parallel.generate.sampling import Sampling
from llm_parallel.jsonlines import JsonLines
from llm_parallel.metrics.rounds import expected_order_statistics
from llm_parallel.parallel.engine import Engine
from llm_parallel.tasks.base import Asked, Given
from llm_parallel.tasks.open import Sum
from llm_parallel.tune.reward_model import RewardModels, Values
from llm_parallel.tune.round_files import Answered, Key, RoundFolder

Asking = Sequence[tuple[int, Prompt]]
"""Prompts with their numbers in the run."""


AHEAD = 64
"""Answers that a judge is told of before it is asked for the first of them."""


@dataclass(frozen=True)
class Judged:
    """An answer and its score."""

    answered: Answered
    score: float


@dataclass(frozen=True)
class Collector:
    """Lets the model answer prompts and a judge judge the answers. All methods are collective."""

    config: RunConfig
    engine: Engine
    tokenizer: Tokenizer
    judge: Sum
    stops: frozenset[int]
    reward_models: RewardModels

    @property
    def _writes(self) -> bool:
        """Whether this process writes what its replica answers."""
        at = self.engine.groups.at
        return at.tp == 0 and at.pp == 0

    def round(self, folder: RoundFolder, asking: Asking) -> list[Judged]:
        """Answers of a round in the order of prompts and samples. Those that ``folder`` has already are neither made
        nor judged again. Raises UserError if the judge fails."""
        count = self.config.method.rollout.answers
        self._answer(folder, asking, count)
        self._judge(folder, asking)
        answers, scores = folder.answers(), folder.scores()
        keys = [(number, sample) for number, _ in asking for sample in range(count)]
        missing = [key for key in keys if key not in answers or key not in scores]
        if missing:
            raise UserError(
                f"{folder.path} lacks {len(missing)} of {len(keys)} answers that other processes have written; put "
                "run_dir where every node of the run sees it"
            )
        return [Judged(answers[key], scores[key]) for key in keys]

    def _answer(self, folder: RoundFolder, asking: Asking, count: int) -> None:
        groups, rollout = self.engine.groups, self.config.method.rollout
        known = folder.answers()
        left = [
            (number, prompt) for number, prompt in asking if any((number, each) not in known for each in range(count))
        ]
        groups.sum_over_world(0.0)  # nobody writes before all have looked
        sampling = Sampling(rollout.max_new_tokens, rollout.temperature, seed=self.config.seed)
        requests = [
            Request(number, prompt.tokens, sampling, self.stops, n=count, stream=number) for number, prompt in left
        ]
        generator = self._generator()
        own, replicas = generator.replica
        for request in requests[own::replicas]:
            generator.submit(request)
        out = Writer(folder, "answers", own) if self._writes else None
        for finished in generator.ticks():
            for answer in finished:
                if out is not None and (answer.number, answer.sample) not in known:
                    out.write(vars(_answered(answer)))
        self._agree(out.close() if out is not None else "")

    def _generator(self) -> Generator:
        most = self.config.method.rollout.max_running
        return Generator(self.engine, GeneratorOptions(max_running=most, pass_tokens=max(512, most)))

    def _judge(self, folder: RoundFolder, asking: Asking) -> None:
        """Every replica judges a part of the answers that have no score yet."""
        groups = self.engine.groups
        mesh, at = groups.mesh, groups.at
        own, replicas = at.dp * mesh.cp + at.cp, mesh.dp * mesh.cp
        prompts = dict(asking)
        answers, scores = folder.answers(), folder.scores()
        left = sorted(key for key in answers if key not in scores and key[0] in prompts)
        groups.sum_over_world(0.0)
        values = self._values([(prompts[key[0]], answers[key]) for key in left])
        problem = ""
        if self._writes:
            out = Writer(folder, "scores", own)
            try:
                mine = range(own, len(left), replicas)
                for begin in range(0, len(mine), AHEAD):
                    places = mine[begin : begin + AHEAD]
                    self._prepare([(prompts[left[place][0]], answers[left[place]]) for place in places])
                    for place in places:
                        number, sample = left[place]
                        score = self.score(prompts[number], answers[number, sample], values[place])
                        out.write({"prompt": number, "sample": sample, "score": score})
            except UserError as error:
                problem = f"{error}; answers that were judged are kept in {folder.path}, and the same command goes on"
            problem = out.close() or problem
        self._agree(problem)

    def _agree(self, problem: str) -> None:
        """Raises UserError on every process if one has a problem; none leaves before, since the others would wait."""
        groups = self.engine.groups
        (failures,) = groups.sum_over_world(float(bool(problem)))
        if failures:
            everybody = [problem] * groups.mesh.world_size
            if len(everybody) > 1:
                dist.all_gather_object(everybody, problem)
            raise UserError(next(filter(None, everybody)))

    def _values(self, answers: Sequence[tuple[Prompt, Answered]]) -> list[Values]:
        """What the reward models say of answers that are judged by them. Collective."""
        found: list[Values] = [{} for _ in answers]
        places = [place for place, (_, answered) in enumerate(answers) if self._is_judged(answered)]
        for place, value in zip(places, self.reward_models.values([answers[place] for place in places])):
            found[place] = value
        return found

    def _is_judged(self, answered: Answered) -> bool:
        return answered.complete or self.config.method.rollout.unfinished_score is None

    def score(self, prompt: Prompt, answered: Answered, values: Values) -> float:
        """What the judge says of an answer, given what reward models say of it; or ``unfinished_score``. Raises
        JudgeFailed."""
        unfinished = self.config.method.rollout.unfinished_score
        if unfinished is not None and not self._is_judged(answered):
            return unfinished
        return self.judge(*self._judged(prompt, answered, values))

    def _judged(self, prompt: Prompt, answered: Answered, values: Values) -> tuple[Asked, Given]:
        given = Given(self.text(prompt, answered.tokens), len(answered.tokens), answered.complete, values)
        return Asked(prompt.messages, prompt.record, prompt.where), given

    def _prepare(self, answers: Sequence[tuple[Prompt, Answered]]) -> None:
        """Lets judges begin with answers that ``score`` will ask for."""
        if self.judge.waits:
            self.judge.prepare([self._judged(*one, {}) for one in answers if self._is_judged(one[1])])

    def text(self, prompt: Prompt, tokens: Sequence[int]) -> str:
        """The text of an answer."""
        answer = Answer(self.tokenizer, prompt.tokens)
        for token in tokens:
            answer.add(token)
        return answer.text()

    def held_out(self, prompts: Sequence[Prompt]) -> tuple[float, float, list[Judged]]:
        """Mean score of greedy answers to held-out prompts, the share of these that the model ended, and the answers to
        the first prompts, as many as are shown."""
        rollout, groups = self.config.method.rollout, self.engine.groups
        sampling = Sampling(rollout.max_new_tokens)
        requests = [Request(number, prompt.tokens, sampling, self.stops) for number, prompt in enumerate(prompts)]
        sums, said = [0.0, 0.0], ""
        shown: list[Judged] = []
        finished = self._generator().run(requests)
        own = [_answered(one) for one in finished] if self._writes else []
        known = self._everybodys(own)
        values = dict(zip(known, self._values([(prompts[number], answered) for number, answered in known.items()])))
        self._prepare([(prompts[answered.prompt], answered) for answered in own])
        for answered in own:
            try:
                score = self.score(prompts[answered.prompt], answered, values[answered.prompt])
            except UserError as error:
                said = str(error)
                break
            sums[0] += score
            sums[1] += answered.complete
            if answered.prompt < rollout.show:
                shown.append(Judged(answered, score))
        self._agree(said)
        total, complete = groups.sum_over_world(*sums)
        shown = sorted(self._gathered(shown), key=lambda one: one.answered.prompt)
        return total / len(prompts), complete / len(prompts), shown

    def _everybodys(self, own: Sequence[Answered]) -> dict[int, Answered]:
        """The answers of all processes by their prompt, in one order. Collective."""
        every = self._gathered(own) if self.reward_models else own
        return {one.prompt: one for one in sorted(every, key=lambda one: one.prompt)}

    def _gathered(self, own: Sequence[Any]) -> list[Any]:
        """What all processes have. Collective."""
        everybody: list[Sequence[Any]] = [own] * self.engine.groups.mesh.world_size
        if len(everybody) > 1:
            dist.all_gather_object(everybody, own)
        return [one for each in everybody for one in each]


class Writer:
    """Writes lines of a round. A line that cannot be written is no reason to leave the other processes: ``close`` says
    why, and nothing is written after it."""

    def __init__(self, folder: RoundFolder, kind: str, replica: int) -> None:
        self._problem = ""
        self._out: JsonLines | None = None
        try:
            self._out = folder.writer(kind, replica)
        except UserError as error:
            self._problem = str(error)

    def write(self, line: dict[str, Any]) -> None:
        """Writes a line."""
        if self._out is not None and not self._problem:
            try:
                self._out.append(line)
            except UserError as error:
                self._problem = str(error)

    def close(self) -> str:
        """Closes the file; why a line could not be written, or nothing."""
        if self._out is not None:
            self._out.close()
        return self._problem


def _answered(finished: Finished) -> Answered:
    return Answered(finished.number, finished.sample, finished.tokens, finished.log_probs, finished.reason.value)


def statistics(judged: Sequence[Judged], answers: int) -> Mapping[str, float]:
    """Numbers about a round's answers, by TRL's names where it has them."""
    scores = np.array([one.score for one in judged]).reshape(-1, answers)
    lengths = np.array([len(one.answered.tokens) for one in judged])
    cut = np.array([not one.answered.complete for one in judged])
    spread = scores.std(axis=1)
    return {
        "reward": float(scores.mean()),
        "reward_std": float(spread.mean()),
        "reward_best": float(scores.max(axis=1).mean()),
        "reward_median": float(np.median(scores, axis=1).mean()),
        "frac_reward_zero_std": float((spread == 0).mean()),
        "completions/mean_length": float(lengths.mean()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(cut.mean()),
    }


def best_of_k(judged: Sequence[Judged], answers: int) -> Mapping[str, list[float]]:
    """The expected largest and median score among k of a prompt's answers, for every k; means over prompts."""
    largest, median = expected_order_statistics(np.array([one.score for one in judged]).reshape(-1, answers))
    return {"reward_max_by_k": largest.tolist(), "reward_median_by_k": median.tolist()}


def remarks(numbers: Mapping[str, float], judged: Sequence[Judged], config: RunConfig) -> list[str]:
    """Sentences about a round that teaches little, each with its remedy."""
    rollout, found = config.method.rollout, unfinished_pays(judged, config)
    if numbers["completions/clipped_ratio"] > 0.5:
        found.append(
            f"{numbers['completions/clipped_ratio']:.0%} of the answers are not ended within "
            f"method.rollout.max_new_tokens = {rollout.max_new_tokens}; raise it, or fine-tune the model to stop first"
        )
    if numbers["frac_reward_zero_std"] == 1.0 and rollout.answers > 1 and config.trains != "ppo":
        found.append(
            "the answers to each prompt all have the same score, of which nothing is learned; give prompts that the "
            "model answers well sometimes, more method.rollout.answers, or a judge that says more than right or wrong"
        )
    return found


def unfinished_pays(judged: Sequence[Judged], config: RunConfig) -> list[str]:
    """A sentence about a round in which answers that do not end have more than those that do have on average: then the
    model learns not to stop."""
    score = config.method.rollout.unfinished_score
    ended = [one.score for one in judged if one.answered.complete]
    if score is None or not ended or len(ended) == len(judged) or score <= np.mean(ended):
        return []
    return [
        f"answers that do not end have method.rollout.unfinished_score = {score:g}, and those that end "
        f"{np.mean(ended):.3g} on average, which teaches the model not to stop; set it lower than what the judges "
        "give, or to none, and they are judged like the others"
    ]


def best_keys(judged: Sequence[Judged], answers: int) -> list[Key]:
    """The best answer to each prompt, the first of several."""
    found = []
    for start in range(0, len(judged), answers):
        best = max(judged[start : start + answers], key=lambda one: (one.score, -one.answered.sample))
        found.append(best.answered.key)
    return found
