"""The small files of a Hugging Face folder (config.json, generation_config.json, the tokenizer's): what an import keeps
of them, and what an export writes."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from llm_parallel.checkpoint.run_file import TOKENIZER_NAME
from llm_parallel.config.tree import ModelConfig, RunConfig
from llm_parallel.data.tokenizer import JSON_NAME, MODEL_NAME, Tokenizer, load_tokenizer
from llm_parallel.errors import UserError
from llm_parallel.files import atomic_write, copy_inside, read_json, refuse_outside
from llm_parallel.model.architecture import ARCHITECTURE
from llm_parallel.model.hf_config import hf_config_to_model, model_to_hf_config, unused_fields

CARRIED = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt"),
    *("chat_template*", "generation_config.json", "config.json"),
)
"""Files that an import keeps beside the weights."""
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
CODE = ("auto_map", "custom_pipelines")
"""Fields that name code files of a folder, which are never run and not kept."""


def carry(source: Path, checkpoint: Path) -> None:
    """Copies the small files of a Hugging Face folder beside a checkpoint's weights."""
    beside = checkpoint / TOKENIZER_NAME
    beside.mkdir()
    for pattern in CARRIED:
        for path in source.glob(pattern):
            if path.is_file():
                refuse_outside(path, source)
                shutil.copy2(path, beside / path.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        refuse_outside(templates, source)
        copy_inside(templates, beside / templates.name)


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none."""
    with suppress(OSError, ValueError):
        found = read_json(path)
        if isinstance(found, dict):
            return found
    return {}


def origin(checkpoint: Path, model: ModelConfig) -> dict[str, Any]:
    """The config.json from which a checkpoint's model was imported. Empty if there is none, or it describes a model of
    other tensors: a run may take its tokenizer from another model's folder."""
    values = _read(checkpoint / TOKENIZER_NAME / "config.json")
    try:
        theirs = hf_config_to_model(values) if values else None
    except UserError:
        return {}
    same = theirs is not None and all(getattr(theirs, name) == getattr(model, name) for name in ARCHITECTURE)
    return values if same else {}


def write_settings(checkpoint: Path, folder: Path, config: RunConfig, dtype: str) -> None:
    """Writes config.json, generation_config.json and the tokenizer's files. What came with an import is written as it
    came; end, begin and padding tokens are those of the tokenizer where the imported files name none."""
    beside = checkpoint / TOKENIZER_NAME
    if beside.is_dir():
        refuse_outside(beside, checkpoint)
        copy_inside(beside, folder)
    came_from, nearby = origin(checkpoint, config.model), _read(beside / "config.json")
    tokenizer = load_tokenizer(config.data.tokenizer) if config.data.tokenizer else None
    generation = _read(beside / "generation_config.json")
    special: dict[str, Any] = {}
    if tokenizer is not None:
        special = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eod}
        _write_tokenizer_config(tokenizer, folder)
    for known in (generation, nearby):
        special |= {name: known[name] for name in SPECIAL if known.get(name) is not None}
    kept = {name: came_from[name] for name in (unused_fields(came_from) if came_from else ()) if name not in CODE}
    described = model_to_hf_config(config.model, dtype, special, came_from.get("model_type"))
    _write(folder / "config.json", {**kept, **described})
    if not generation:
        _write(folder / "generation_config.json", {name: value for name, value in special.items() if value is not None})


def _write(path: Path, values: dict[str, Any]) -> None:
    with atomic_write(path) as handle:
        json.dump(values, handle, indent=1, ensure_ascii=False)


def _write_tokenizer_config(tokenizer: Tokenizer, folder: Path) -> None:
    """A tokenizer_config.json by which transformers' AutoTokenizer finds the tokenizer and its end token, unless the
    files have one that names it."""
    given = _read(folder / "tokenizer_config.json")
    if given.get("eos_token") or _read(folder / "special_tokens_map.json").get("eos_token"):
        return
    values: dict[str, Any] = {"eos_token": tokenizer.token(tokenizer.eod), "clean_up_tokenization_spaces": False}
    if tokenizer.bos is not None:
        values["bos_token"] = tokenizer.token(tokenizer.bos)
    if (folder / JSON_NAME).is_file():
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    elif (folder / MODEL_NAME).is_file():
        # Models trained here see no begin token, and the tokenizer's own space before a text.
        values |= {"tokenizer_class": "LlamaTokenizer", "unk_token": tokenizer.token(0)}
        values |= {"add_bos_token": False, "add_eos_token": False, "legacy": True}
    _write(folder / "tokenizer_config.json", {**values, **given})
