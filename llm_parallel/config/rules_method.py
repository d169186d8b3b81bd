"""Rules of what a run trains for: settings that would have no effect, or another than is meant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llm_parallel.config.problem import Case, Problem
from llm_parallel.config.tree_online import ONLINE
from llm_parallel.config.tree_tune import PREFERENCES


def check_method(case: Case) -> Iterator[Problem]:
    """Settings that belong to other methods."""
    config = case.config
    kind, method = config.trains, config.method
    if config.prefers:
        without: list[tuple[str, Any, Any]] = [
            ("train.label_smoothing", config.train.label_smoothing, 0.0),
            ("train.z_loss", config.train.z_loss, 0.0),
            ("chat.neftune_alpha", config.chat.neftune_alpha, 0.0),
        ]
        for name, value, none in without:
            if value != none:
                statement = f"{name} = {value} changes the likelihood that method.kind = {kind} compares"
                yield Problem((name, "method.kind"), statement, {name: none})
    if kind == "reward" and config.adapter is not None:
        statement = "adapter is given, and method.kind = reward trains a value head beside the model's weights"
        yield Problem(("adapter", "method.kind"), statement, {"adapter": None})
    if kind == "reward" and config.evaluate.tasks:
        statement = (
            f"evaluate.tasks = [{', '.join(config.evaluate.tasks)}] needs log-probabilities, of which a model of "
            "method.kind = reward has none"
        )
        yield Problem(("evaluate.tasks", "method.kind"), statement, {"evaluate.tasks": []})
    yield from _other_methods(case)
    if kind == "ppo":
        yield from _ppo(case)
    if kind == "dpo":
        yield from _pairs(case)
    reads_reference = (
        kind == "kto"
        or (kind == "grpo" and method.grpo.kl_weight > 0)
        or (kind == "ppo" and method.ppo.kl_weight > 0)
        or (kind == "dpo" and method.dpo.loss not in ("simpo", "orpo"))
    )
    if not reads_reference:
        what = f"method.kind = {kind}" + (f" with method.dpo.loss = {method.dpo.loss}" if kind == "dpo" else "")
        for name, default in (("load", None), ("keep", "file"), ("folder", None)):
            value = getattr(method.reference, name)
            if value != default:
                field = f"method.reference.{name}"
                yield Problem(
                    (field, "method.kind"), f"{field} = {value}, and {what} has no reference", {field: default}
                )
    elif method.reference.keep == "memory" and method.reference.folder is not None:
        yield Problem(
            ("method.reference.folder", "method.reference.keep"),
            f"method.reference.folder = {method.reference.folder} is for files of log-probabilities, and"
            " method.reference.keep = memory writes none",
            {"method.reference.folder": None},
        )


def _other_methods(case: Case) -> Iterator[Problem]:
    """Settings of a method that the run does not use."""
    method, kind = case.config.method, case.config.trains
    for name, owner in (*((name, name) for name in (*PREFERENCES, *ONLINE)), ("critic", "ppo")):
        section = getattr(method, name)
        given = [field for field, value in type(section)() if getattr(section, field) != value]
        if owner != kind and given:
            field = f"method.{name}.{given[0]}"
            statement = f"{field} = {getattr(section, given[0])} has no effect with method.kind = {kind}"
            yield Problem(
                (field, "method.kind"), statement, {f"method.{name}.{one}": _default(section, one) for one in given}
            )


def _default(section: Any, name: str) -> Any:
    return getattr(type(section)(), name)


def _ppo(case: Case) -> Iterator[Problem]:
    ppo, output_loss = case.config.method.ppo, case.config.kernels.output_loss
    if ppo.entropy_weight and output_loss != "separate":
        yield Problem(
            ("method.ppo.entropy_weight", "kernels.output_loss"),
            f"method.ppo.entropy_weight = {ppo.entropy_weight} needs all logits, which kernels.output_loss = "
            f"{output_loss} never holds",
            {"kernels.output_loss": "separate"},
        )
    if ppo.estimator != _default(ppo, "estimator") and (ppo.kl_in == "reward" or not ppo.kl_weight):
        where = "method.ppo.kl_in = reward" if ppo.kl_weight else "method.ppo.kl_weight = 0"
        yield Problem(
            ("method.ppo.estimator", "method.ppo.kl_in"),
            f"method.ppo.estimator = {ppo.estimator} has no effect with {where}",
            {"method.ppo.estimator": _default(ppo, "estimator")},
        )


def _pairs(case: Case) -> Iterator[Problem]:
    dpo = case.config.method.dpo
    for name, losses, none in (
        ("label_smoothing", ("sigmoid", "robust"), 0.0),
        ("length_normalised", ("sigmoid", "robust", "hinge"), False),
        ("gamma", ("simpo",), _default(dpo, "gamma")),
    ):
        value = getattr(dpo, name)
        if value != none and dpo.loss not in losses:
            yield Problem(
                (f"method.dpo.{name}", "method.dpo.loss"),
                f"method.dpo.{name} = {value} has no effect with method.dpo.loss = {dpo.loss}",
                {f"method.dpo.{name}": none},
            )
