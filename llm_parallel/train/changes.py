"""Says field by field what a resumed run does differently from the run that saved its state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_parallel.config.differences import in_words
from llm_parallel.config.node import Node
from llm_parallel.config.tree import ModelConfig, RopeScaling, RunConfig
from llm_parallel.config.tree_online import ONLINE
from llm_parallel.config.tree_tune import PREFERENCES
from llm_parallel.data.tokenizer import fingerprint_of, tokenizer_file
from llm_parallel.train.step_settings import learning_rate

OTHER_MODEL = "the model computes something else than what its weights were trained for"
OTHER_HELD_OUT = (
    "held-out losses are not comparable: documents that join the held-out ones are not trained on from here on, and "
    "those that leave them are from each source's next epoch on"
)

OTHER_SCORES = "scores of tasks are not comparable with those before"
OTHER_LOSS = "steps before minimised something else"
MEANINGS = {
    "seed": "what is left of each source's epoch is shuffled anew; the same documents stay held out",
    "data.train": "every source that was read before goes on where it was",
    "data.seq_length_tokens": "what is left of each source's epoch is cut into samples of the new length",
    "data.packing": "attention and positions begin anew at other places",
    "data.eval": OTHER_HELD_OUT,
    "data.eval_fraction": OTHER_HELD_OUT,
    "chat.prepared": "other conversations, or other tokens of them: the order of samples begins anew within the epoch",
    "chat.neftune_alpha": "training losses are not comparable",
    "model.rope_base": OTHER_MODEL,
    "model.rope_scaling": OTHER_MODEL,
    "model.norm_epsilon": OTHER_MODEL,
    "model.window_tokens": OTHER_MODEL,
    "model.layers_without_rope": OTHER_MODEL,
    "model.attention_softcap": OTHER_MODEL,
    "model.output_softcap": OTHER_MODEL,
    "train.global_batch_size": "steps before took another number of samples",
    "train.rampup": "steps before took another number of samples",
    "train.precision": "losses before were rounded otherwise",
    "optim.clip_grad": "gradients are limited to another norm",
    "adapter.alpha": "what was trained counts with another factor",
    "adapter.rank_stabilized": "what was trained counts with another factor",
    "adapter.dropout": "training losses are not comparable",
    "adapter.base": "the frozen weights are rounded otherwise",
    "train.eval_samples": "held-out losses are of another number of samples",
    "train.label_smoothing": "training losses are not comparable",
    "train.z_loss": "training losses are not comparable",
    "evaluate.data_dir": OTHER_SCORES,
    "evaluate.samples": OTHER_SCORES,
    "evaluate.seed": OTHER_SCORES,
    "evaluate.shots": OTHER_SCORES,
    "evaluate.new_tokens": OTHER_SCORES,
    "evaluate.chat": OTHER_SCORES,
}
"""Fields whose change matters to a run that goes on → what the change means. A change of the model's sizes is refused;
the optimizer's betas, epsilon and weight decay are compared with its state; all other fields (layout, logging, folders)
may change freely."""

_NOT_AGAIN = "without effect, since the run goes on from its own checkpoint; for another start give another run_dir"
WITHOUT_EFFECT = {
    "checkpoint.load": _NOT_AGAIN,
    "checkpoint.load_optimizer": _NOT_AGAIN,
    "adapter.load": _NOT_AGAIN,
    "model.init_std": "without effect, since the weights are there already",
}
"""Fields that matter to a new run alone → what is said of a change of them where a run goes on in its own folder."""

RATE = (
    *("optim.lr", "optim.min_lr", "optim.schedule", "optim.warmup_steps", "optim.warmup_fraction"),
    *("optim.decay_steps", "train.steps"),
)
"""Fields that decide the learning rate of a step."""
COMPARED = 500
"""Steps of what is left at which learning rates are compared."""


def changed_fields(saved: RunConfig, now: RunConfig, step: int) -> list[str]:
    """``field old → new (meaning)`` of every field that differs, for a run that goes on after ``step``."""
    found = []
    for name, meaning in MEANINGS.items():
        old, new = _value(saved, name), _value(now, name)
        unscored = meaning == OTHER_SCORES and not (saved.evaluate.tasks and now.evaluate.tasks)
        if old != new and not unscored:
            found.append(f"{_change(name, old, new)} ({meaning})")
    for at in _some_steps(step + 1, now.train.steps):
        before = learning_rate(saved.optim, saved.train.steps, at)
        after = learning_rate(now.optim, now.train.steps, at)
        if abs(before - after) <= 1e-9 * max(before, after):
            continue
        both = [(name, _value(saved, name), _value(now, name)) for name in RATE]
        fields = [_change(*one) for one in both if one[1] != one[2]]
        rates = f"the learning rate of step {at} is {after:.3g} instead of {before:.3g}"
        found.append(f"{', '.join(fields)} ({rates})")
        break
    return found + changed_method(saved, now)


def changed_method(saved: RunConfig, now: RunConfig) -> list[str]:
    """The same for what a run trains for."""
    kinds = saved.trains, now.trains
    found = [f"{_change('method.kind', *kinds)} ({OTHER_LOSS})"] if kinds[0] != kinds[1] else []
    used = (now.trains, *(("rollout",) if now.collects else ()))
    for section in (*PREFERENCES, *ONLINE, "rollout"):
        old, new = (getattr(config.method, section).model_dump() for config in (saved, now))
        changes = [_change(f"method.{section}.{name}", old[name], new[name]) for name in old if old[name] != new[name]]
        found += [f"{change} ({OTHER_LOSS})" for change in changes] if section in used else []
    if now.trains == saved.trains == "ppo":
        for name, meaning in (("lr", "the critic learns at another rate"), ("load", _NOT_AGAIN)):
            both = getattr(saved.method.critic, name), getattr(now.method.critic, name)
            found += [f"{_change(f'method.critic.{name}', *both)} ({meaning})"] if both[0] != both[1] else []
    references = saved.method.reference.load, now.method.reference.load
    if references[0] != references[1]:
        found.append(f"{_change('method.reference.load', *references)} ({OTHER_LOSS})")
    return found


def _some_steps(first: int, last: int) -> list[int]:
    """Steps at which learning rates are compared: the first, and in equal distances up to the last."""
    distance = max(1, (last - first) // COMPARED)
    return [*range(first, last, distance), max(first, last)]


def changed_without_effect(saved: RunConfig, now: RunConfig) -> list[str]:
    """The same for fields that a run that goes on in its own folder does not follow. Where adapters are trained,
    ``checkpoint.load`` names the model under them, which other checks compare."""
    found = []
    for name, meaning in WITHOUT_EFFECT.items():
        old, new = _value(saved, name), _value(now, name)
        if old != new and not (name == "checkpoint.load" and now.adapter is not None):
            found.append(f"{_change(name, old, new)} ({meaning})")
    return found


def changed_tokenizer(saved: RunConfig, now: RunConfig) -> list[str]:
    """Whether the run's tokenizer is another than the one that lies beside its checkpoint."""
    paths = saved.data.tokenizer, now.data.tokenizer
    if None in paths or not all(Path(str(path)).exists() for path in paths):
        return []
    old, new = (fingerprint_of(tokenizer_file(str(path)).read_bytes()) for path in paths)
    return [f"data.tokenizer {old} → {new} (ids stand for other text than before)"] if old != new else []


def changed_model(saved: ModelConfig, now: ModelConfig) -> list[str]:
    """The same for a model whose weights alone are loaded: what it computes differs from what it was trained for."""
    found = []
    for name, meaning in MEANINGS.items():
        section, _, field = name.partition(".")
        if section == "model" and (old := getattr(saved, field)) != (new := getattr(now, field)):
            found.append(f"{_change(name, old, new)} ({meaning})")
    return found


def _change(name: str, old: Any, new: Any) -> str:
    return f"{name} {_shown(old)} → {_shown(new)}"


def _value(config: RunConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part, None)
    if name == "chat.prepared":  # the folder's name is a hash of all that the tokens depend on
        return None if value is None else Path(value).name
    if name in ("data.train", "data.eval"):
        return tuple((source.path, source.weight) for source in value)
    return value


def _shown(value: Any) -> str:
    if isinstance(value, tuple) and all(isinstance(one, int) for one in value):
        return str(list(value))
    if isinstance(value, tuple) and all(isinstance(one, dict) for one in value):
        return "[" + ", ".join(in_words(one) for one in value) + "]"
    if isinstance(value, tuple):
        return "[" + ", ".join(f"{path} x {weight:g}" for path, weight in value) + "]"
    if isinstance(value, Node):
        kind = {"kind": value.kind} if isinstance(value, RopeScaling) else {}
        return in_words(kind | value.model_dump(exclude_defaults=True))
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
