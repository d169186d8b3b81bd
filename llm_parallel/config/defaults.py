"""Fields that are not given: defaults that follow from another field, and those that are others in the system whose
names a run file uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any

from llm_parallel.config.fields import field_at

Key = tuple[str | int, ...]

TRAINER = frozenset({"per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs"})
"""Names by which a file of Hugging Face's trainers, or of what stands on them, is known."""
MEGATRON = frozenset({
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "train_iters", "train_samples", "lr_decay_style",
    "lr_warmup_iters",
})  # fmt: skip
"""The same of Megatron-LM's."""

_DEFAULTS: tuple[tuple[str, frozenset[str], tuple[tuple[str, str, str], ...]], ...] = (
    (
        "Hugging Face's trainers",
        TRAINER,
        (
            ("optim.weight_decay", "0", ""),
            ("optim.beta2", "0.999", ""),
            ("optim.min_lr", "0", ""),
            ("adapter.alpha", "twice lora_rank in LLaMA-Factory", "adapter.rank"),
            ("chat.packing", "none", "chat.train"),
        ),
    ),
    (
        "Megatron-LM",
        MEGATRON,
        (
            ("optim.schedule", "linear", ""),
            ("optim.weight_decay", "0.01", ""),
            ("optim.beta2", "0.999", ""),
            ("optim.min_lr", "0", ""),
            ("model.num_query_groups", "as many as heads", "model.num_attention_heads"),
            ("model.ffn_hidden_size", "4 x hidden_size, with --swiglu 8/3 of it", "model.hidden_size"),
            ("model.tie_embeddings", "true", "model.hidden_size"),
        ),
    ),
)
"""System, names that tell it, and of each field whose default differs: the default there, and a field without which it
does not matter."""


def _key(name: str) -> Key:
    return tuple(name.split("."))


def _default(name: str) -> Any:
    found = field_at(_key(name))
    assert found is not None, name
    return found.default


def followed(values: Mapping[Key, Any]) -> Iterator[tuple[Key, Any, str]]:
    """Key, value and reason of each field whose default does not fit another field's value."""
    lr, least = values.get(_key("optim.lr")), _default("optim.min_lr")
    if (
        isinstance(lr, int | float)
        and not isinstance(lr, bool)
        and 0 < lr < least
        and _key("optim.min_lr") not in values
    ):
        yield (
            _key("optim.min_lr"),
            float(f"{lr / 10:.3g}"),
            f"a tenth of optim.lr = {lr}, which is below the default, {least}",
        )


def others(values: Mapping[Key, Any], used: Set[str]) -> Iterator[str]:
    """A sentence for each system whose names are ``used``: its defaults that differ, of fields that no value is given
    for."""

    def given(name: str) -> bool:
        return any(key[: len(_key(name))] == _key(name) for key in values)

    for system, names, fields in _DEFAULTS:
        differ = [
            f"{name}={str(_default(name)).lower()} (there {there})"
            for name, there, needs in fields
            if not given(name) and (not needs or given(needs))
        ]
        if used & names and differ:
            yield f"defaults that differ from those of {system}: {', '.join(differ)}; give those that matter"
