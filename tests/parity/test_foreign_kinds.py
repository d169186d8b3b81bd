"""Every kind of foreign folder is imported, refused in a sentence, or imported with a notice. Started as a program with
a file's name, this module writes the table of all of them there, with the sentences:

    python -m tests.parity.test_foreign_kinds benchmarks/results/foreign_folders_DATE.md
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_parallel.convert.importing import import_from_hf
from llm_parallel.errors import UserError
from llm_parallel.generate.load import describe_folder
from llm_parallel.model.hf import is_hf_folder
from tests.support.parity_models import random_folder

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Kind:
    """A folder: what is done to a random Hugging Face folder, and a part of what an import says ("" if nothing)."""

    what: str
    change: Callable[[Path], Any]
    result: str
    said: str = ""
    family: str = "llama-2"
    dtype: torch.dtype = torch.float32


def fields(**values: Any) -> Callable[[Path], None]:
    """Changes fields of config.json."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Writes the tensors again in one file, after ``edit``."""

    def change(folder: Path) -> None:
        found: dict[str, torch.Tensor] = {}
        for path in folder.glob("*.safetensors"):
            found.update(load_file(path))
            path.unlink()
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
        edit(found)
        save_file(found, folder / WEIGHTS, metadata={"format": "pt"})

    return change


def instead(*names: str, config: str | None = "config.json") -> Callable[[Path], None]:
    """Other files of weights instead of safetensors, and ``config`` as the description."""

    def change(folder: Path) -> None:
        for path in folder.glob("model*"):
            path.unlink()
        if config is None:
            (folder / "config.json").unlink()
        for name in names:
            (folder / name).write_text("{}")

    return change


def one_missing(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def pointer(folder: Path) -> None:
    next(folder.glob("model-*.safetensors")).write_text("version https://git-lfs.github.com/spec/v1\nsize 1\n")


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "params.json").write_text("{}")


def cut(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text()[:40])


def outside(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {name: f"../{file}" for name, file in index["weight_map"].items()}
    path.write_text(json.dumps(index))


def as_cache(folder: Path) -> None:
    inside = folder.with_name("moved")
    folder.rename(inside)
    (folder / "snapshots").mkdir(parents=True)
    inside.rename(folder / "snapshots" / "0a1b")


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda found: found.pop(name)


BIAS = "model.layers.0.self_attn.q_proj.bias"
KINDS = [
    Kind("a Llama in several files", lambda _: None, "imported"),
    Kind("a Mistral in bf16", lambda _: None, "imported", family="mistral", dtype=torch.bfloat16),
    Kind("a Qwen2", lambda _: None, "imported", family="qwen2"),
    Kind("a Qwen3", lambda _: None, "imported", family="qwen3"),
    Kind("a SmolLM3", lambda _: None, "imported", family="smollm3"),
    Kind("an OLMo 2", lambda _: None, "imported", family="olmo2"),
    Kind("a Phi-3, whose files fuse matrices", lambda _: None, "imported", family="phi3"),
    Kind("weights in fp16", lambda _: None, "imported", dtype=torch.float16),
    Kind("weights in bf16 and fp32", tensors(lambda t: t.update({"model.norm.weight": t["model.norm.weight"].float()})),
         "noticed", "weights are in F32 and BF16 (F32: model.norm.weight); all are taken as float32",
         dtype=torch.bfloat16),
    Kind("a bias that config.json does not name", tensors(lambda t: t.update({BIAS: torch.ones(64)})), "noticed",
         f"that this model does not have are left out: {BIAS}"),
    Kind("an unknown field", fields(some_new_option=3), "noticed", "have no effect: some_new_option"),
    Kind("a window in a Llama", fields(sliding_window=64), "noticed", "have no effect: sliding_window"),
    Kind("code of its own", fields(auto_map={"AutoModel": "modeling.Mine"}), "noticed", "(auto_map), which is not run"),
    Kind("only pytorch_model.bin", instead("pytorch_model.bin"), "refused", "pickled and may run code"),
    Kind("Meta's files", instead("consolidated.00.pth", "params.json", config=None), "refused", "Meta's consolidated"),
    Kind("Mistral's own files", without_config, "refused", "Mistral's own format"),
    Kind("a GGUF file", instead("model-q4.gguf"), "refused", "GGUF file, which llama.cpp reads"),
    Kind("TensorFlow's file", instead("tf_model.h5"), "refused", "tf_model.h5"),
    Kind("config.json alone", instead(), "refused", "a config.json and no weights"),
    Kind("a missing shard", one_missing, "refused", "lists are missing: model-00002-of-"),
    Kind("a cut index", cut, "refused", "cannot be read"),
    Kind("an index that names files outside", outside, "refused", "which is not a file of the folder"),
    Kind("a Git LFS pointer", pointer, "refused", "fetch them with git lfs pull"),
    Kind("an entry of the hub's cache", as_cache, "refused", "snapshots/0a1b"),
    Kind("no output projection", tensors(drop("lm_head.weight")), "refused", "has no tensor lm_head.weight"),
    Kind("a missing layer", tensors(drop("model.layers.3.mlp.up_proj.weight")), "refused", "is not a complete llama"),
    Kind("weights in fp8", tensors(lambda t: t.update({"model.norm.weight": torch.ones(64).to(torch.float8_e4m3fn)})),
         "refused", "only weights in fp32, bf16 or fp16"),
    Kind("quantization_config", fields(quantization_config={"quant_method": "gptq"}), "refused", "quantization_config"),
    Kind("another family", fields(model_type="gemma2"), "refused", "only 'llama', 'mistral', 'qwen2', 'qwen3'"),
    Kind("a classifier", fields(architectures=["LlamaForSequenceClassification"]), "refused", "only language models"),
    Kind("interleaved rotary pairs", fields(rope_interleaved=True), "refused", "rope_interleaved is True"),
    Kind("a mixture of experts", fields(num_local_experts=8), "refused", "num_local_experts is 8"),
    Kind("scaled logits", fields(logits_scaling=8.0), "refused", "logits_scaling is 8.0"),
    Kind("rotation of part of a head", fields(partial_rotary_factor=0.5), "refused", "partial_rotary_factor"),
    Kind("some layers with a window", fields(layer_types=["full_attention", "sliding_attention"] * 2), "refused",
         "layer_types", family="mistral"),
    Kind("tied in config.json, not in the tensors", fields(tie_word_embeddings=True), "refused", "differs from"),
]  # fmt: skip


def outcome(kind: Kind, folder: Path) -> tuple[str, str]:
    """What an import of the folder does, and all that it says, with ``FOLDER`` for its path."""
    random_folder(kind.family, folder / "model", kind.dtype)
    kind.change(folder / "model")
    said: list[str] = []
    try:
        config = describe_folder(folder / "model")
        assert is_hf_folder(folder / "model")
        import_from_hf(folder / "model", folder / "run", config, said.append)
    except UserError as error:
        return "refused", str(error).replace(str(folder / "model"), "FOLDER")
    return "noticed" if said else "imported", "; ".join(said)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.what)
def test_a_foreign_folder(kind: Kind, tmp_path: Path) -> None:
    result, said = outcome(kind, tmp_path)
    assert (result, "\n" in said) == (kind.result, False), said
    assert kind.said in said and bool(said) == bool(kind.said)


def table() -> str:
    """All kinds with their results in Markdown."""
    lines = ["| folder | result | what is said |", "| --- | --- | --- |"]
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            result, said = outcome(kind, Path(folder))
        lines.append(f"| {kind.what} | {result} | {said.replace('|', '/')} |")
    return "\n".join(lines)


if __name__ == "__main__":
    head = (
        "# Foreign folders, and what `convert` does with each\n\nEach is a small random Hugging Face folder with one "
        "thing changed; `FOLDER` is its path. Made by `python -m tests.parity.test_foreign_kinds FILE`; the same cases "
        "are the tests of that module. PEFT folders are read as adapters (`tests/parity/test_peft.py`).\n\n"
    )
    Path(sys.argv[1]).write_text(head + table() + "\n", encoding="utf-8")
