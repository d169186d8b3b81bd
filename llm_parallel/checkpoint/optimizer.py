"""The state of an engine's optimizer, and the settings that it uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch

from llm_parallel.parallel.adamw8 import AdamW8bit
from llm_parallel.parallel.engine import Engine, Models
from llm_parallel.parallel.mcore_optimizer import inner_optimizers


def engines_of(models: Models) -> dict[str, Engine]:
    """The models that have an optimizer, by name."""
    return {name: model for name, model in models.items() if isinstance(model, Engine)}


def allocate_moments(engine: Engine) -> None:
    """Gives every parameter the AdamW state that its first step would give it.

    A fresh distributed optimizer's ``state_dict`` asserts that all parameters agree on one ``step``, and a plain one
    has nothing to load into.
    """
    for inner in inner_optimizers(engine.optimizer):
        if isinstance(inner, AdamW8bit):
            inner.allocate()
            continue
        for group in inner.param_groups:
            for parameter in group["params"]:
                state = inner.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), device=parameter.device)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)


@contextmanager
def moments_in_fp32(models: Models, take: bool) -> Iterator[None]:
    """While inside, moments in 8 bits stand in the optimizers' states in fp32, where those of other optimizers always
    stand. ``take``: they are rounded to 8 bits at the end, which is collective; else they are dropped."""
    with ExitStack() as stack:
        for engine in engines_of(models).values():
            for inner in inner_optimizers(engine.optimizer):
                if isinstance(inner, AdamW8bit):
                    stack.enter_context(inner.moments_in_fp32(take))
        yield


MOMENTS_ROUNDED = "optim.moment_bits 32 → 8"


def rounding_said(engine: Engine) -> str:
    """How far moments that were taken from fp32 are from what they were. Collective over all processes."""
    sums = torch.zeros(2, 2, dtype=torch.float64)
    for inner in inner_optimizers(engine.optimizer):
        if isinstance(inner, AdamW8bit):
            sums += inner.rounded
    totals = engine.groups.sum_over_world(*sums.flatten().tolist())
    first, second = ((totals[n] / (totals[n + 1] or 1.0)) ** 0.5 for n in (0, 2))
    return f"rounded first moments by {first:.1%} and second by {second:.1%} of their size (L2)"


def settings_in_use(engine: Engine) -> dict[str, float]:
    """The settings in the optimizer's parameter groups, by the name of the configuration's field; weight decay is that
    of the groups that have one."""
    found: dict[str, float] = {}
    for inner in inner_optimizers(engine.optimizer):
        for group in inner.param_groups:
            found["optim.beta1"], found["optim.beta2"] = (float(beta) for beta in group["betas"])
            found["optim.epsilon"] = float(group["eps"])
            found["optim.moment_bits"] = float(group.get("moment_bits", 32))
            multiplier = group.get("wd_mult", 1.0)
            if multiplier:
                found["optim.weight_decay"] = float(group["weight_decay"]) / multiplier
    return found


def apply_configured_settings(engine: Engine) -> None:
    """Gives every parameter group the configured settings again, with which its optimizer was built: loading has
    replaced them by the saved ones. The learning rate is set before every step anyway."""
    for inner in inner_optimizers(engine.optimizer):
        configured = {name: value for name, value in inner.defaults.items() if name != "lr"}
        for group in inner.param_groups:
            group.update(configured)
            group["weight_decay"] = configured["weight_decay"] * group.get("wd_mult", 1.0)


def settings_changed(before: Mapping[str, float], now: Mapping[str, float]) -> list[str]:
    """``field old → new`` of each setting whose saved value is known and is not the configured one."""
    return [f"{name} {before[name]:g} → {value:g}" for name, value in now.items() if before.get(name, value) != value]


def optimizer_steps(engine: Engine) -> int:
    """Optimizer steps that were applied; skipped ones do not count."""
    for inner in inner_optimizers(engine.optimizer):
        for values in inner.state.values():
            if "step" in values:
                return int(values["step"])
    return 0


def set_optimizer_steps(engine: Engine, steps: int) -> None:
    """Inverse of ``optimizer_steps``."""
    for inner in inner_optimizers(engine.optimizer):
        for values in inner.state.values():
            if "step" in values:
                values["step"] = torch.full_like(values["step"], steps)
        for group in inner.param_groups:
            if "step" in group:  # apex has one count for all parameters of a group
                group["step"] = steps
