"""How the steps of a run in rounds are counted, and rules of such a run."""

from __future__ import annotations

from collections.abc import Iterator

from llm_parallel.config.problem import Case, Problem, nearest
from llm_parallel.config.tree import RunConfig
from llm_parallel.config.tree_online import OF_POLICY, ONLINE, RolloutConfig


def trained_answers(config: RunConfig) -> int:
    """Answers of a round that are trained on; with ``reject.keep`` above, at most."""
    rollout = config.method.rollout
    alone = config.trains == "reject" and config.method.reject.keep == "best"
    return rollout.prompts * (1 if alone else rollout.answers)


def steps_of_epoch(config: RunConfig) -> int:
    """Steps that go once over the answers of a round."""
    return max(1, trained_answers(config) // config.train.global_batch_size)


def steps_of_round(config: RunConfig) -> int:
    """Steps of a round."""
    return steps_of_epoch(config) * config.method.rollout.epochs


def models_beside(config: RunConfig) -> list[tuple[str, str | None]]:
    """Fields that name a critic or reward models of the run, and the folders that they name."""
    if not config.collects:
        return []
    critic = config.method.critic.load
    found: list[tuple[str, str | None]] = [
        (f"method.rollout.judges.{number}.folder", judge.folder)
        for number, judge in enumerate(config.method.rollout.judges)
        if judge.kind == "reward_model"
    ]
    if config.trains == "ppo" and critic != OF_POLICY:
        found.append(("method.critic.load", critic))
    return found


def check_rounds(case: Case) -> Iterator[Problem]:
    """Settings of rounds that do not fit together, or that the run does not have."""
    config = case.config
    kind, method, train = config.trains, config.method, config.train
    if kind not in ONLINE:
        for name, value in method.rollout:
            if value != getattr(RolloutConfig(), name):
                field = f"method.rollout.{name}"
                statement = (
                    f"{field} = {value} is for methods in rounds ({', '.join(ONLINE)}), and method.kind = {kind}"
                )
                yield Problem((field, "method.kind"), statement, {field: getattr(RolloutConfig(), name)})
        return
    answers, size = trained_answers(config), train.global_batch_size
    if answers % size:
        what = "method.rollout.prompts" + ("" if answers == method.rollout.prompts else " times method.rollout.answers")
        divisors = [number for number in range(1, answers + 1) if answers % number == 0]
        yield Problem(
            ("train.global_batch_size", "method.rollout.prompts", "method.rollout.answers"),
            f"a round trains on {answers} answers ({what}), which train.global_batch_size = {size} does not divide",
            {"train.global_batch_size": nearest(size, divisors)},
        )
    if kind == "grpo" and method.rollout.answers < 2:
        statement = "method.rollout.answers = 1, and method.kind = grpo compares the answers to one prompt"
        yield Problem(("method.rollout.answers", "method.kind"), statement, {"method.rollout.answers": 8})
    if train.eval_interval_steps is not None:
        statement = (
            f"train.eval_interval_steps = {train.eval_interval_steps} is for held-out losses; held-out prompts are "
            "answered every method.rollout.held_out_interval rounds"
        )
        yield Problem(("train.eval_interval_steps",), statement, {"train.eval_interval_steps": None})
    if train.epochs is not None:
        statement = f"train.epochs = {train.epochs:g} counts passes over conversations, and a run in rounds has steps"
        yield Problem(("train.epochs",), statement, {"train.epochs": None})
    if train.rampup is not None:
        statement = "train.rampup changes the number of answers of a step, which is the same in all rounds"
        yield Problem(("train.rampup",), statement, {"train.rampup": None})
    for name, default in (("keep", "file"), ("folder", None)):
        value = getattr(method.reference, name)
        if value != default:
            field = f"method.reference.{name}"
            statement = (
                f"{field} = {value} is for preferences in files, and a run in rounds keeps its reference in memory"
            )
            yield Problem((field, "method.kind"), statement, {field: default})
    for place, source in enumerate(config.chat.train):
        if source.weight != 1.0:
            field = f"chat.train.{place}.weight"
            statement = f"{field} = {source.weight:g}, and a run in rounds asks all prompts equally often"
            yield Problem((field,), statement, {field: 1.0})
