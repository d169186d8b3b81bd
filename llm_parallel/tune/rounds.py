"""Training on the model's own answers: a round lets the model answer prompts, has the answers judged, and makes steps
on them (rejection sampling, GRPO, PPO).

Everything that a step needs of a round is on disk before the round's first step, so that a run that is interrupted goes
on in the middle of a round, in any layout, without making, judging or training anything twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llm_parallel.checkpoint.folders import complete_checkpoints, step_of
from llm_parallel.checkpoint.state import TrainState
from llm_parallel.config.rules_rounds import steps_of_epoch, steps_of_round
from llm_parallel.config.tree import RunConfig
from llm_parallel.config.tree_online import NO_MATTER
from llm_parallel.data.batch import Batch
from llm_parallel.data.epochs import derive_key
from llm_parallel.data.prompts import Prompt, Prompts
from llm_parallel.data.tokenizer import load_tokenizer
from llm_parallel.errors import UserError
from llm_parallel.metrics.record import AnswerRecord
from llm_parallel.model.adapters import adapters_off
from llm_parallel.objectives.advantage import group_advantages
from llm_parallel.objectives.base import Objective
from llm_parallel.objectives.likelihood import Likelihood
from llm_parallel.objectives.policy import ClippedPolicy
from llm_parallel.parallel.engine import POLICY, Network, network_of
from llm_parallel.parallel.groups import Groups
from llm_parallel.tasks.open import open_judge
from llm_parallel.train.beside import CRITIC
from llm_parallel.train.feed import FeedToCome, no_held_out
from llm_parallel.train.open import Method
from llm_parallel.train.run import Run
from llm_parallel.tune.ppo import also_trained, earned, new_critic, policy_and_critic, policy_objective
from llm_parallel.tune.ppo import remarks as ppo_remarks
from llm_parallel.tune.reference import REFERENCE, is_the_base, second_model
from llm_parallel.tune.reward_model import RewardModels
from llm_parallel.tune.rollout import Asking, Collector, Judged, best_keys, best_of_k, remarks, statistics
from llm_parallel.tune.round_batches import Rows, Text
from llm_parallel.tune.round_files import LOG_PROBS, VALUES, RoundFolder, forget_rounds
from llm_parallel.tune.score import describe_model, outputs_of_rows

SHUFFLE = 13
"""The use of a derived key."""


def reads_reference(config: RunConfig) -> bool:
    """Whether the run holds its model to a reference."""
    if config.trains == "ppo":
        return config.method.ppo.kl_weight > 0
    return config.trains == "grpo" and config.method.grpo.kl_weight > 0


def objective_of(config: RunConfig) -> Objective:
    """What a step of the run minimises."""
    if config.trains == "reject":
        return Likelihood()
    if config.trains == "ppo":
        return policy_objective(config.method.ppo)
    grpo = config.method.grpo
    return ClippedPolicy(
        grpo.clip_low,
        grpo.clip_high,
        kl_weight=grpo.kl_weight,
        estimator=grpo.estimator,
        importance_cap=grpo.importance_cap,
        divided_by=grpo.divided_by,
        constant=float(config.method.rollout.max_new_tokens),
    )


@dataclass(frozen=True)
class Round:
    """What the steps of a round train on: texts in the order of prompts and samples, and numbers about them."""

    number: int
    texts: tuple[Text, ...]
    numbers: Mapping[str, float]


class RoundFeed:
    """Hands out the steps of rounds, and collects a round when its first step is due. See ``Feed``."""

    notices: Sequence[str] = ()

    def __init__(self, run: Run, prompts: Prompts) -> None:
        config = run.config
        assert config.data.tokenizer is not None
        self._run, self._prompts = run, prompts
        self._tokenizer = load_tokenizer(config.data.tokenizer)
        judge = open_judge(config.method.rollout.judges)
        models = RewardModels(run, self._tokenizer.eod)
        self._collector = Collector(config, run.engine, self._tokenizer, judge, prompts.stops, models)
        self._round: Round | None = None
        self.step_tokens: int | None = 0
        self.has_whole_samples = False
        self.offers = offers(config)

    def step(self, state: TrainState) -> list[Batch]:
        """See ``Feed``."""
        number, within = divmod(state.step, steps_of_round(self._run.config))
        if self._round is None or self._round.number != number:
            # Generation and training have tensors of different sizes; neither keeps what the other has freed.
            self._run.groups.platform.return_freed_memory()
            with self._run.long():
                self._round = self._collect(number, within)
            self._run.groups.platform.return_freed_memory()
        texts = self._round.texts
        rows = self._rows(texts, self._chosen(number, len(texts), within))
        self.step_tokens = len(rows.of_row) * rows.length
        return self._batches(rows)

    def progress(self, state: TrainState) -> Mapping[str, float]:
        """The round, and with its first step what was measured of it."""
        if self._round is None:
            return {}
        number, within = divmod(state.step - 1, steps_of_round(self._run.config))
        return {"round": float(number), **(self._round.numbers if within == 0 else {})}

    def close(self) -> None:
        """Nothing runs in the background."""

    def _chosen(self, number: int, texts: int, within: int) -> list[int]:
        """Which of a round's texts one of its steps trains on."""
        config = self._run.config
        epoch, part = divmod(within, steps_of_epoch(config))
        order = np.random.default_rng(derive_key(SHUFFLE, config.seed, number, epoch)).permutation(texts)
        chosen: list[int] = np.array_split(order, steps_of_epoch(config))[part].tolist()
        return chosen

    def _rows(self, texts: Sequence[Text], chosen: Sequence[int]) -> Rows:
        return Rows.pack([texts[place] for place in chosen], self._run.config.data.seq_length_tokens)

    def _batches(self, rows: Rows) -> list[Batch]:
        run = self._run
        return rows.batches(run.layout, run.groups.at.dp, run.groups.platform.device, self._tokenizer.eod)

    def _collect(self, number: int, within: int) -> Round:
        """Completes the round's files and reads them. Collective."""
        run, config = self._run, self._run.config
        asking = self._prompts.of_round(number, config.method.rollout.prompts, config.seed)
        folder = RoundFolder(config.run_dir, number)
        self._begin(folder, within)
        numbers: dict[str, float] = {}
        interval = config.method.rollout.held_out_interval
        if within == 0 and interval and number % interval == 0 and self._prompts.held_out:
            chosen = self._prompts.held_out[: config.method.rollout.held_out_prompts]
            score, ended, shown = self._collector.held_out(chosen)
            numbers |= {"held_out/reward": score, "held_out/ended": ended}
            for one in shown:
                self._tell(chosen[one.answered.prompt], one, "held out, ")
        judged = self._collector.round(folder, asking)
        numbers |= statistics(judged, config.method.rollout.answers)
        texts = self._texts(asking, judged)
        if config.trains == "reject":
            ready = self._kept(judged, texts)
            numbers["kept"] = float(len(ready))
            if not ready:
                run.metrics.message(
                    f"round {number}: no answer has method.reject.least_score, so its steps have no gradient; only the "
                    "optimizer's momentum still moves the weights"
                )
        else:
            ready, more = self._with_columns(folder, within, judged, texts)
            numbers |= more
        if within == 0:
            self._report(number, asking, judged, numbers)
        if run.groups.is_first_rank:
            self._forget(number)
        return Round(number, tuple(ready), numbers)

    def _report(self, number: int, asking: Asking, judged: Sequence[Judged], numbers: Mapping[str, float]) -> None:
        """Says what a round has brought."""
        run, scores = self._run, [one.score for one in judged]
        self._show(asking, judged)
        said = remarks(numbers, judged, run.config)
        if run.config.trains == "ppo":
            said += ppo_remarks(numbers, scores, number, run.config)
        for text in said:
            run.metrics.message(f"round {number}: {text}")
        run.metrics.message(f"round {number}: {_described(numbers)}")
        by_k = best_of_k(judged, run.config.method.rollout.answers)
        run.metrics.event("round", number=number, step=run.state.step, **numbers, **by_k)

    def _begin(self, folder: RoundFolder, within: int) -> None:
        """Makes the round's folder, unless it is there from the same weights, prompts and draws. In the middle of a
        round it must be there, since the weights that answered are gone."""
        run, config, rollout = self._run, self._run.config, self._run.config.method.rollout
        drawn = {name: getattr(rollout, name) for name in ("prompts", "answers", "max_new_tokens", "temperature")}
        about: dict[str, Any] = {**drawn, "seed": config.seed, "data": self._prompts.folder.name}
        known = folder.about
        if within == 0:
            about |= {
                "weights" if name == POLICY else name: describe_model(network_of(engine))
                for name, engine in run.engines.items()
            }
        judges = [judge.model_dump(mode="json", exclude=set(NO_MATTER)) for judge in rollout.judges]
        judged_by = {"judges": judges, "unfinished_score": rollout.unfinished_score}
        fits = all(known.get(name) == value for name, value in about.items())
        (misfits,) = run.groups.sum_over_world(float(not fits))  # all have looked, and agree
        if misfits and within:
            raise UserError(
                f"step {run.state.step} is in the middle of round {folder.number}, whose answers are not in "
                f"{folder.path} as this run would make them; go on from a checkpoint at the start of a round (a "
                f"multiple of {steps_of_round(config)} steps), or with the settings of before"
            )
        if misfits:
            if known:
                run.metrics.message(
                    f"round {folder.number} is answered again: the answers in {folder.path} are of other weights or "
                    "settings"
                )
            if run.groups.is_first_rank:
                folder.begin({**about, **judged_by})
        elif any(known.get(name) != value for name, value in judged_by.items()):
            run.metrics.message(
                f"round {folder.number} is judged again: method.rollout.judges or unfinished_score has changed"
            )
            if run.groups.is_first_rank:
                folder.judge_again({**known, **judged_by})
        run.groups.sum_over_world(0.0)

    def _texts(self, asking: Asking, judged: Sequence[Judged]) -> list[Text]:
        prompts = dict(asking)
        return [Text(prompts[one.answered.prompt].tokens, one.answered.tokens, {}) for one in judged]

    def _kept(self, judged: Sequence[Judged], texts: Sequence[Text]) -> list[Text]:
        """The answers that rejection sampling trains on."""
        reject = self._run.config.method.reject
        best = set(best_keys(judged, self._run.config.method.rollout.answers))
        least = -np.inf if reject.least_score is None else reject.least_score
        return [
            text
            for text, one in zip(texts, judged)
            if one.score >= least and (reject.keep == "above" or one.answered.key in best)
        ]

    def _with_columns(
        self, folder: RoundFolder, within: int, judged: Sequence[Judged], texts: list[Text]
    ) -> tuple[list[Text], dict[str, float]]:
        """The texts with all that the objectives read, and numbers about that."""
        config, number = self._run.config, folder.number
        lengths = [len(text.answer) for text in texts]
        old = self._kept_numbers(folder, LOG_PROBS, within, texts)
        columns = {
            "old": old,
            "rollout": np.concatenate([np.array(one.answered.log_probs, np.float32) for one in judged]),
        }
        difference = np.abs(columns["old"] - columns["rollout"])
        numbers = {
            "sampling/sampling_logp_difference/mean": float(difference.mean()),
            "sampling/sampling_logp_difference/max": float(difference.max()),
        }
        if reads_reference(config):
            with reference_of(self._run) as network:
                columns[REFERENCE] = -self._outputs(network, number, texts)
            numbers["kl_to_reference"] = float((old - columns[REFERENCE]).mean())
        if config.trains == "ppo":
            values = self._kept_numbers(folder, VALUES, within, texts)
            scores = [one.score for one in judged]
            found, more = earned(config, scores, lengths, old, values, columns.get(REFERENCE))
            columns, numbers = columns | found, numbers | more
        else:
            columns["advantage"] = self._advantages(judged, lengths)
        ends = np.cumsum(lengths)
        ready = [
            replace(text, columns={name: values[end - size : end] for name, values in columns.items()})
            for text, end, size in zip(texts, ends.tolist(), lengths)
        ]
        return ready, numbers

    def _kept_numbers(self, folder: RoundFolder, name: str, within: int, texts: Sequence[Text]) -> NDArray[np.float32]:
        """Numbers under the weights that answered, one answer behind the other: log-probabilities or the critic's
        values. Before a round's first step they are computed and written; after it they must be there. Collective."""
        run = self._run
        found = folder.numbers(name, sum(len(text.answer) for text in texts))
        (unknown,) = run.groups.sum_over_world(float(found is None))
        if unknown and within:
            raise UserError(
                f"{folder.path / name} is not there as it was written, and the weights that answered in this round are "
                "gone; go on from a checkpoint at the start of a round (a multiple of "
                f"{steps_of_round(run.config)} steps)"
            )
        if unknown or found is None:
            # By the very micro batches of the first epoch's steps, so that the ratio in the first step is 1.
            if name == VALUES:
                found = self._outputs(network_of(run.models[CRITIC]), folder.number, texts)
            else:
                found = -self._outputs(network_of(run.engine), folder.number, texts)
            if run.groups.is_first_rank:
                folder.write_numbers(name, found)
        return found

    def _outputs(self, network: Network, number: int, texts: Sequence[Text]) -> NDArray[np.float32]:
        """What a model says of all tokens of all answers (see ``token_outputs``), one answer behind the other.
        Collective."""
        run = self._run
        found: list[NDArray[np.float32]] = [np.zeros(0, np.float32)] * len(texts)
        for part in range(steps_of_epoch(run.config)):
            chosen = self._chosen(number, len(texts), part)
            rows = self._rows(texts, chosen)
            for place, own in zip(chosen, outputs_of_rows(network, rows, run.layout, self._tokenizer.eod)):
                found[place] = own
        return np.concatenate(found)

    def _advantages(self, judged: Sequence[Judged], lengths: Sequence[int]) -> NDArray[np.float32]:
        """An advantage for each token of each answer, one answer behind the other."""
        config = self._run.config
        scores = torch.tensor([one.score for one in judged], dtype=torch.float64)
        grpo = config.method.grpo
        each = group_advantages(scores.view(-1, config.method.rollout.answers), grpo.by_std, grpo.leave_one_out)
        return np.repeat(each.flatten().numpy(), lengths).astype(np.float32)

    def _show(self, asking: Asking, judged: Sequence[Judged]) -> None:
        """Shows the best and the worst answer to some prompts."""
        run, count = self._run, self._run.config.method.rollout.answers
        shown = 0
        for place, (_, prompt) in enumerate(asking):
            own = sorted(judged[place * count : (place + 1) * count], key=lambda one: -one.score)
            for one in (own[0], own[-1]) if own[0].score > own[-1].score else (own[0],):
                if shown >= run.config.method.rollout.show:
                    return
                self._tell(prompt, one)
                shown += 1

    def _tell(self, prompt: Prompt, one: Judged, remark: str = "") -> None:
        """Shows an answer with its score."""
        text = self._collector.text(prompt, one.answered.tokens)
        asked = self._tokenizer.decode(list(prompt.tokens))
        answer = f"[{remark}score {one.score:g}] {text}"
        self._run.metrics.answer(AnswerRecord(self._run.state.step, asked, answer, one.answered.complete))

    def _forget(self, number: int) -> None:
        """Removes rounds that neither a checkpoint nor a person needs."""
        config = self._run.config
        keep = config.method.rollout.keep_rounds
        saved = complete_checkpoints(Path(config.run_dir) / "checkpoints")
        oldest = min((step_of(checkpoint) or 0 for checkpoint in saved), default=0)
        forget_rounds(config.run_dir, min(oldest // steps_of_round(config), number - keep))


def _described(numbers: Mapping[str, float]) -> str:
    """A round in one line for a person."""
    said = [
        f"mean score {numbers['reward']:.3g}, of the best answer to each prompt {numbers['reward_best']:.3g}",
        f"{numbers['completions/mean_length']:.1f} tokens an answer",
        f"{numbers['completions/clipped_ratio']:.1%} not ended",
    ]
    if "held_out/reward" in numbers:
        said.append(f"held-out prompts, greedy: {numbers['held_out/reward']:.3g}")
    return ", ".join(said)


@contextmanager
def reference_of(run: Run) -> Iterator[Network]:
    """The reference: the policy without its adapters, else a second model, which is loaded once."""
    if is_the_base(run.config):
        network = network_of(run.engine)
        with adapters_off(network):
            yield network
        return
    if REFERENCE not in run.besides:
        run.besides[REFERENCE] = second_model(run.config, run.groups)
    yield run.besides[REFERENCE]


def offers(config: RunConfig) -> tuple[str, ...]:
    """Columns of a round's batches."""
    if config.trains == "reject":
        return ("documents",)
    reference = (REFERENCE,) if reads_reference(config) else ()
    of_critic = ("value", "return") if config.trains == "ppo" else ()
    return ("documents", "old", "rollout", "advantage", *of_critic, *reference)


def promised(config: RunConfig, groups: Groups, state: TrainState) -> FeedToCome:
    """The run's feed until ``begin``."""
    return FeedToCome(offers(config))


def begin(run: Run) -> None:
    """Gives the run its prompts."""
    assert run.config.chat.prepared is not None, "prompts are prepared before processes start"
    run.feed = RoundFeed(run, Prompts.open(run.config.chat.prepared))


ROUNDS = Method(objective=objective_of, evaluation=objective_of, feed=promised, held_out=no_held_out, begin=begin)
PPO = replace(ROUNDS, models=policy_and_critic, also=also_trained, initial=new_critic)
