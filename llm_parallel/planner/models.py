"""The model that is planned, by the name of a preset, a config.json of Hugging Face, or a run file."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llm_parallel.config.load import load_config
from llm_parallel.config.presets import MODEL_PRESETS
from llm_parallel.config.tree import ModelConfig
from llm_parallel.errors import UserError
from llm_parallel.model.hf_config import hf_config_to_model
from llm_parallel.model.hf_files import json_object
from llm_parallel.planner.run_file import with_model
from llm_parallel.planner.shapes import Experts, Shape, shape_of

DEFAULT_VOCAB = 32000


def _mixture(layers: int, hidden: int, heads: int, groups: int, ffn: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {"num_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "num_query_groups": groups,
            "ffn_hidden_size": ffn, "vocab_size": vocab, **more}  # fmt: skip


MIXTURES: dict[str, tuple[dict[str, Any], Experts]] = {
    "mixtral-8x7b": (_mixture(32, 4096, 32, 8, 14336, 32000), Experts(8, 2, 14336)),
    "mixtral-8x22b": (_mixture(56, 6144, 48, 8, 16384, 32000), Experts(8, 2, 16384)),
    "qwen3-30b-a3b": (_mixture(48, 2048, 32, 4, 768, 151936, head_dim=128, qk_norm=True), Experts(128, 8, 768)),
    "qwen3-235b-a22b": (_mixture(94, 4096, 64, 4, 1536, 151936, head_dim=128, qk_norm=True), Experts(128, 8, 1536)),
    "grok-1": (_mixture(64, 6144, 48, 8, 32768, 131072, head_dim=128, tie_embeddings=True), Experts(8, 2, 32768)),
}
"""Models with a mixture of experts, by their authors' configuration files: the fields of their other parts, and their
experts. They are planned for other software alone."""
_MIXTURE_TYPES = {
    "mixtral": ("num_local_experts", "intermediate_size"),
    "qwen3_moe": ("num_experts", "moe_intermediate_size"),
}
"""Hugging Face's fields for the number of experts and the width of one, by ``model_type``."""


@dataclass(frozen=True)
class Planned:
    """A model to plan for."""

    name: str
    """What it is called, in file names too."""
    given: str
    """What ``--model`` was."""
    section: dict[str, Any]
    """Section ``model`` of a run file for it, with its preset if it has one."""
    fields: dict[str, Any]
    """The same without a preset."""
    experts: Experts | None = None
    """Experts of every layer in place of its dense feed-forward part."""

    @property
    def shape(self) -> Shape:
        """Its dimensions."""
        found = shape_of(ModelConfig(**self.fields))
        return found if self.experts is None else replace(found, ffn=0, experts=self.experts)

    @property
    def longest(self) -> int | None:
        """Tokens of the longest sample that it was made for; None if not known."""
        return self.fields.get("max_seq_length_tokens")


def planned(text: str | None) -> Planned:
    """The model that ``--model`` names: a preset in any case, a folder with a config.json or such a file, or a run
    file. Raises UserError for anything else."""
    if text is None:
        raise UserError("plan needs --model, as llama2-70b, --validate, or --calibrate")
    names = {name.lower(): name for name in MODEL_PRESETS}
    if text.lower() in names:
        name = names[text.lower()]
        preset = MODEL_PRESETS[name]
        own = {} if "vocab_size" in preset else {"vocab_size": DEFAULT_VOCAB}
        return Planned(name, name, {"preset": name, **own}, {**own, **preset})
    if text.lower() in MIXTURES:
        fields, experts = MIXTURES[text.lower()]
        return Planned(text.lower(), text.lower(), fields, fields, experts)
    path = Path(text)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return _of(path.stem, text, with_model(load_config(path, notice=lambda _: None)).model)
    if (path / "config.json").is_file():
        path = path / "config.json"
    if path.suffix == ".json" and path.is_file():
        found = json_object(path, "give a config.json of Hugging Face")
        name = path.resolve().parent.name if path.name == "config.json" else path.stem
        if found.get("model_type") in _MIXTURE_TYPES:
            return _mixture_of(name, text, found)
        return _of(name, text, hf_config_to_model(found))
    near = difflib.get_close_matches(text.lower(), [*names, *MIXTURES], 1, 0.4)
    near_words = f"; the nearest known one is {names.get(near[0], near[0])}" if near else ""
    raise UserError(
        f"--model {text} is unknown{near_words}; there are {', '.join([*MODEL_PRESETS, *MIXTURES])}, or give a "
        "folder or config.json of Hugging Face, or a run file"
    )


def _mixture_of(name: str, given: str, found: dict[str, Any]) -> Planned:
    """The model of a config.json with experts. Raises UserError where a field that it needs is missing or no whole
    number, or a layer is dense."""
    count, width = _MIXTURE_TYPES[found["model_type"]]
    if found.get("mlp_only_layers") or found.get("decoder_sparse_step", 1) != 1:
        raise UserError(f"--model {given}: some of its layers are dense and some have experts, which is not planned")
    needed = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", width, "vocab_size",
              count, "num_experts_per_tok")  # fmt: skip
    for field in needed:
        if not isinstance(found.get(field), int) or found[field] < 1:
            raise UserError(f"--model {given}: {field} is {found.get(field)!r} and must be a whole number over 0")
    layers, hidden, heads, groups, ffn, vocab, experts, active = (found[field] for field in needed)
    more: dict[str, Any] = {"tie_embeddings": bool(found.get("tie_word_embeddings", False))}
    if isinstance(found.get("head_dim"), int):
        more["head_dim"] = found["head_dim"]
    if found["model_type"] == "qwen3_moe":
        more["qk_norm"] = True
    fields = _mixture(layers, hidden, heads, groups, ffn, vocab, **more)
    return Planned(name, given, fields, fields, Experts(experts, active, ffn))


def _of(name: str, given: str, model: ModelConfig) -> Planned:
    fields = model.model_dump(exclude_defaults=True)
    fields.pop("preset", None)
    fields.setdefault("vocab_size", DEFAULT_VOCAB)
    return Planned(name, given, fields, fields)
