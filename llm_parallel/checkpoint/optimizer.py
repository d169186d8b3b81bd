"""Remedies for megatron-core's distributed optimizer with torch's AdamW, in versions up to 0.19.

Each is on the instance or on what it returns, never on the library; tests/distributed/test_checkpoint_traps.py shows
each fault without its remedy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from llm_parallel.parallel.wrap import Engine


def distributed_parts(engine: Engine) -> list[DistributedOptimizer]:
    """The distributed optimizers of an engine; empty if its optimizer is not distributed."""
    return [part for part in engine.optimizer.chained_optimizers if isinstance(part, DistributedOptimizer)]


def allocate_moments(engine: Engine) -> None:
    """Gives every parameter the AdamW state that its first step would give it.

    A fresh distributed optimizer's ``state_dict`` asserts that all parameters agree on one ``step``, and a plain one
    has nothing to load into.
    """
    for part in engine.optimizer.chained_optimizers:
        inner = part.optimizer
        for group in inner.param_groups:
            for parameter in group["params"]:
                state = inner.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), device=parameter.device)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)


@contextmanager
def padded_buckets(engine: Engine) -> Iterator[None]:
    """While inside, gathered optimizer state has each bucket's end padding again.

    megatron-core strips the padding and then slices with padded offsets, which scrambles what is saved when there are
    several buckets (mended upstream in #5077, in no release yet).
    """
    parts = distributed_parts(engine)
    for part in parts:
        part.get_parameter_state_dp_zero = _padded(part, part.get_parameter_state_dp_zero)
    try:
        yield
    finally:
        for part in parts:
            del part.get_parameter_state_dp_zero  # the class's own is back


def _padded(part: Any, gather: Callable[..., Any]) -> Callable[..., Any]:
    def gather_padded(*args: Any, **kwargs: Any) -> Any:
        state = gather(*args, **kwargs)
        if state is None:
            return None
        for number, buffer in enumerate(part.buffers):
            for tensors in state[number].values():
                for name in tensors.keys() - {"numel_unpadded"}:
                    tensors[name] = _with_padding(buffer, tensors[name])
        return state

    return gather_padded


def _with_padding(buffer: Any, stripped: torch.Tensor) -> torch.Tensor:
    whole, taken = stripped.new_zeros(buffer.numel), 0
    for bucket in buffer.buckets:
        size = bucket.numel_unpadded
        whole[bucket.offset : bucket.offset + size] = stripped[taken : taken + size]
        taken += size
    return whole


def settings_in_use(engine: Engine) -> dict[str, float]:
    """What the optimizer's parameter groups say, by the name of the configuration's field; the weight decay of those
    groups that have one."""
    found: dict[str, float] = {}
    for part in engine.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            found["optim.beta1"], found["optim.beta2"] = (float(beta) for beta in group["betas"])
            found["optim.epsilon"] = float(group["eps"])
            multiplier = group.get("wd_mult", 1.0)
            if multiplier:
                found["optim.weight_decay"] = float(group["weight_decay"]) / multiplier
    return found


def apply_configured_settings(engine: Engine) -> None:
    """Gives every parameter group the settings that its optimizer was built with, which are the configuration's, where
    loading has put those that were saved. The learning rate is set before every step anyway."""
    for part in engine.optimizer.chained_optimizers:
        configured = {name: value for name, value in part.optimizer.defaults.items() if name != "lr"}
        for group in part.optimizer.param_groups:
            group.update(configured)
            group["weight_decay"] = configured["weight_decay"] * group.get("wd_mult", 1.0)


def settings_changed(before: Mapping[str, float], now: Mapping[str, float]) -> list[str]:
    """``field old → new`` of each setting whose saved value is known and is not the configured one."""
    return [f"{name} {before[name]:g} → {value:g}" for name, value in now.items() if before.get(name, value) != value]


def load_optimizer_state(engine: Engine, state: dict[str, Any]) -> list[str]:
    """Loads what ``optimizer.sharded_state_dict`` described, every parameter with a ``step`` of its own, and returns
    which settings differ from those that the state was made with (the configured ones apply).

    megatron-core hands one ``step`` tensor to all parameters; AdamW adds 1 to it once per parameter, so training would
    go on with wrong bias corrections and no error. It also looks for ``step`` among the tensors to restore and fails.
    """
    for part in engine.optimizer.chained_optimizers:
        tensors, kind = state.pop("param_state", None), state.pop("param_state_sharding_type", None)
        part.load_state_dict(state)
        inner = part.optimizer
        steps = {
            parameter: values.pop("step").clone().to(parameter.device)
            for parameter, values in inner.state.items()
            if "step" in values
        }
        if tensors is not None:
            with torch.no_grad():
                getattr(part, f"load_parameter_state_from_{kind}")(tensors)
        for parameter, step in steps.items():
            inner.state[parameter]["step"] = step
    saved = settings_in_use(engine)
    apply_configured_settings(engine)
    return settings_changed(saved, settings_in_use(engine))
