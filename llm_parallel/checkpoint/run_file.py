"""The configuration and the tokenizer that lie beside a checkpoint's tensors. Imports no torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from llm_parallel.config.load import dump_config, load_config
from llm_parallel.config.tree import RunConfig
from llm_parallel.data.tokenizer import DECLARING_NAMES, JSON_NAME, MODEL_NAME
from llm_parallel.errors import UserError
from llm_parallel.files import atomic_write, copy_inside, refuse_outside

CONFIG_NAME = "config.yaml"
TOKENIZER_NAME = "tokenizer"
END = "...\n"
"""YAML's end-of-document mark, the last line of the file: without it, a file that was cut short would often be read as
valid YAML, with defaults for the lost fields."""
WEIGHT_FILES = (
    "*.safetensors*",
    "*.bin*",
    "*.pt",
    "*.pth",
    "*.gguf",
    "*.h5",
    "*.msgpack",
    "*.onnx*",
    ".git",
    "*.distcp",
)


def write_config(folder: Path, config: RunConfig) -> str | None:
    """Writes configuration and tokenizer, so that the checkpoint alone suffices to generate and convert. Returns a
    sentence about what the configuration names and is no longer there, or None if nothing is missing."""
    missing = None
    if config.data.tokenizer is not None:
        missing = _write_tokenizer(folder / TOKENIZER_NAME, Path(config.data.tokenizer), config)
    with atomic_write(folder / CONFIG_NAME) as handle:
        handle.write(dump_config(config) + END)
    return missing


def _write_tokenizer(target: Path, source: Path, config: RunConfig) -> str | None:
    """Copies the tokenizer, with the chat template of a run that reads conversations; see write_config."""
    if not source.exists():
        return (
            f"it holds no tokenizer, since data.tokenizer = {source} is gone; put it back before the next checkpoint, "
            f"or copy the tokenizer's files into the folder {TOKENIZER_NAME!r} of this one"
        )
    copy_tokenizer(source, target)
    if config.reads_chat and config.chat.prepared is not None:
        prepared = Path(config.chat.prepared)
        if not (prepared / "report.json").is_file():
            return f"it holds no chat template, since {prepared} is gone, where chat.prepared was"
        _write_chat(target, prepared)
    return None


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies a tokenizer under the file names by which ``load_tokenizer`` finds it in a folder; weights beside it are
    not copied."""
    if source.is_dir():
        copy_inside(source, target, shutil.ignore_patterns(*WEIGHT_FILES))
        return
    target.mkdir(exist_ok=True)
    if source.suffix == ".json":
        shutil.copy2(source, target / JSON_NAME)
        for name in DECLARING_NAMES:
            if (source.parent / name).is_file():
                refuse_outside(source.parent / name, source.parent)
                shutil.copy2(source.parent / name, target / name)
    else:
        shutil.copy2(source, target / MODEL_NAME)


def _write_chat(target: Path, prepared: Path) -> None:
    """Writes the template by which a model was fine-tuned, and the tokens that end its answers besides those that the
    tokenizer's files name, where transformers, vLLM and ``generate`` look for them."""
    report = json.loads((prepared / "report.json").read_text(encoding="utf-8"))
    with atomic_write(target / "chat_template.jinja") as handle:
        handle.write(report["template"])
    path = target / "generation_config.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    named = values.get("eos_token_id", [])
    ends = [*report["stops"], *(named if isinstance(named, list) else [named])]
    values["eos_token_id"] = list(dict.fromkeys(end for end in ends if isinstance(end, int)))
    with atomic_write(path) as handle:
        json.dump(values, handle, indent=1)


def read_config(folder: Path) -> RunConfig:
    """Configuration of a checkpoint folder (``iter_…``), with the tokenizer that lies beside it.

    Raises UserError if there is none or it is cut short."""
    path = folder / CONFIG_NAME
    refuse_outside(path, folder)
    if not path.is_file():
        raise UserError(f"{folder} has no {CONFIG_NAME}, so it is not a checkpoint; give an iter_… folder of a run")
    if not path.read_text(errors="replace").endswith(END):
        raise UserError(f"{path} is cut short (it does not end with '...'); give another checkpoint")
    config = load_config(path, notice=lambda _: None)
    tokenizer = folder / TOKENIZER_NAME
    if (tokenizer / "tokenizer.json").is_file() or any(tokenizer.glob("*.model")):
        config = config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": str(tokenizer)})})
    return config
