"""Rules of what a run trains for: settings that would have no effect, or another than is meant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llm_parallel.config.problem import Case, Problem
from llm_parallel.config.tree_online import ONLINE
from llm_parallel.config.tree_tune import PREFERENCES

OF_VOCABULARY = ("embed_tokens", "lm_head")
"""The names of ``adapter.targets`` that are not of a layer."""


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
    if kind == "reward" and config.evaluate.tasks:
        statement = (
            f"evaluate.tasks = [{', '.join(config.evaluate.tasks)}] needs log-probabilities, of which a model of "
            "method.kind = reward has none"
        )
        yield Problem(("evaluate.tasks", "method.kind"), statement, {"evaluate.tasks": []})
    yield from _other_methods(case)
    if kind == "ppo":
        yield from _ppo(case)
        yield from _critic_adapters(case)
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


def check_vocabulary_adapters(case: Case) -> Iterator[Problem]:
    """Adapters on the embedding and the output projection, and weights that are trained whole beside adapters."""
    adapter, model, values = case.config.adapter, case.config.model, case.config.trains == "reward"
    if adapter is None:
        return
    targets, whole = [name for name in adapter.targets if name in OF_VOCABULARY], set(adapter.modules_to_save)
    fields = ("adapter.targets", "adapter.modules_to_save")
    others = [name for name in adapter.targets if name not in targets]
    if both := sorted(whole & set(targets)):
        statement = (
            f"{both[0]} is in adapter.modules_to_save and is trained whole, so it has no place in adapter.targets"
        )
        yield Problem(fields, statement, {"adapter.targets": [x for x in adapter.targets if x not in whole] or ["q"]})
    if targets and adapter.dora:
        statement = f"adapter.dora = true has no magnitudes for {targets[0]} of adapter.targets"
        yield Problem(("adapter.targets", "adapter.dora"), statement, {"adapter.dora": False})
    if len(whole) == 1 and model.tie_embeddings and not values:
        statement = (
            f"adapter.modules_to_save has {min(whole)} alone, and the model's embeddings are tied, so that "
            "embed_tokens and lm_head are one matrix"
        )
        yield Problem((fields[1], "model.tie_embeddings"), statement, {fields[1]: list(OF_VOCABULARY)})
    if "lm_head" in targets and case.config.kernels.output_loss != "separate":
        statement = (
            "an adapter on lm_head (adapter.targets) adds to logits, which kernels.output_loss = "
            f"{case.config.kernels.output_loss} never holds"
        )
        yield Problem(("adapter.targets", "kernels.output_loss"), statement, {"kernels.output_loss": "separate"})
    if values and "lm_head" in (*targets, *whole):
        statement = "lm_head is adapted, and method.kind = reward trains a model with a value head in its place"
        fix = {"adapter.targets": [*others, *(x for x in targets if x != "lm_head")] or ["q"]}
        yield Problem(("adapter", "method.kind"), statement, fix | {fields[1]: sorted(whole - {"lm_head"})})


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


def _critic_adapters(case: Case) -> Iterator[Problem]:
    """Adapters of the critic, which stand on the policy's frozen weights."""
    adapter, critic, field = case.config.adapter, case.config.method.critic, "method.critic.adapters"
    if not critic.adapters:
        return
    if adapter is None:
        statement = f"{field} = true trains adapters of the kind of the section adapter, which is not given"
        yield Problem((field, "adapter"), statement, {field: False})
        return
    if critic.load != "policy":
        statement = (
            f"{field} = true puts adapters on the policy's frozen weights, and method.critic.load = {critic.load} has "
            "others"
        )
        yield Problem((field, "method.critic.load"), statement, {"method.critic.load": "policy"})
    if adapter.modules_to_save:
        statement = (
            f"{field} = true needs the policy's weights as they are, and adapter.modules_to_save = "
            f"{list(adapter.modules_to_save)} trains some"
        )
        yield Problem((field, "adapter.modules_to_save"), statement, {field: False})
    if set(adapter.targets) == {"lm_head"}:
        statement = f"{field} = true, and adapter.targets has lm_head alone, which a critic has not"
        yield Problem((field, "adapter.targets"), statement, {field: False})


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
