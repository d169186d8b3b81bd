"""The model that is planned, by the name of a preset, a config.json of Hugging Face, or a run file."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_parallel.config.load import load_config
from llm_parallel.config.presets import MODEL_PRESETS
from llm_parallel.config.tree import ModelConfig
from llm_parallel.errors import UserError
from llm_parallel.model.hf_config import hf_config_to_model
from llm_parallel.model.hf_files import json_object
from llm_parallel.planner.run_file import with_model
from llm_parallel.planner.shapes import Shape, shape_of

DEFAULT_VOCAB = 32000


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

    @property
    def shape(self) -> Shape:
        """Its dimensions."""
        return shape_of(ModelConfig(**self.fields))

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
    path = Path(text)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return _of(path.stem, text, with_model(load_config(path, notice=lambda _: None)).model)
    if (path / "config.json").is_file():
        path = path / "config.json"
    if path.suffix == ".json" and path.is_file():
        model = hf_config_to_model(json_object(path, "give a config.json of Hugging Face"))
        return _of(path.resolve().parent.name if path.name == "config.json" else path.stem, text, model)
    near = difflib.get_close_matches(text.lower(), list(names), 1, 0.4)
    near_words = f"; the nearest known one is {names[near[0]]}" if near else ""
    raise UserError(
        f"--model {text} is unknown{near_words}; there are {', '.join(MODEL_PRESETS)}, or give a folder or config.json "
        "of Hugging Face, or a run file"
    )


def _of(name: str, given: str, model: ModelConfig) -> Planned:
    fields = model.model_dump(exclude_defaults=True)
    fields.pop("preset", None)
    fields.setdefault("vocab_size", DEFAULT_VOCAB)
    return Planned(name, given, fields, fields)
