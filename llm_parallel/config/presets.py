"""Model shapes by name: published ones exactly as published, and small ones of our own.

Sources: Llama 2 (Touvron et al. 2023, arXiv 2307.09288, Table 1 and Meta's config files), Llama 3 and 3.1 (Grattafiori
et al. 2024, arXiv 2407.21783, Table 3), Mistral 7B v0.1 (Jiang et al. 2023, arXiv 2310.06825, Table 1), Qwen2.5 (Qwen
2024, arXiv 2412.15115) and Qwen3 (Qwen 2025, arXiv 2505.09388) with their config.json files, SmolLM2 (Ben Allal et al.
2025, arXiv 2502.02737, and its config.json).
Meta never released Llama 2 34B: ``llama2-34b`` has the dimensions that the released Code Llama 34B shares with it (48
layers, 8192 wide, 64 heads, 8 query groups, SwiGLU 22016), with the paper's context of 4096 and rotary base of 10,000.
"""

from __future__ import annotations

from typing import Any


def _shape(layers: int, hidden: int, ffn: int, heads: int, groups: int) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": heads,
        "num_query_groups": groups,
    }


_LLAMA2 = {"vocab_size": 32000, "max_seq_length_tokens": 4096, "norm_epsilon": 1e-5, "rope_base": 10000.0}
_LLAMA3 = {"vocab_size": 128256, "max_seq_length_tokens": 8192, "norm_epsilon": 1e-5, "rope_base": 500000.0}
_LLAMA31 = _LLAMA3 | {
    "max_seq_length_tokens": 131072,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position": 8192,
    },
}
_QWEN = {"norm_epsilon": 1e-6, "rope_base": 1000000.0}
_8B = _shape(32, 4096, 14336, 32, 8)
_70B = _shape(80, 8192, 28672, 64, 8)
_405B = _shape(126, 16384, 53248, 128, 8)

MODEL_PRESETS: dict[str, dict[str, Any]] = {
    "llama2-7b": _shape(32, 4096, 11008, 32, 32) | _LLAMA2,
    "llama2-13b": _shape(40, 5120, 13824, 40, 40) | _LLAMA2,
    "llama2-34b": _shape(48, 8192, 22016, 64, 8) | _LLAMA2,
    "llama2-70b": _70B | _LLAMA2,
    "llama3-8b": _8B | _LLAMA3,
    "llama3-70b": _70B | _LLAMA3,
    "llama3-405b": _405B | _LLAMA3,
    "llama3.1-8b": _8B | _LLAMA31,
    "llama3.1-70b": _70B | _LLAMA31,
    "llama3.1-405b": _405B | _LLAMA31,
    "smollm2-135m": _shape(30, 576, 1536, 9, 3)
    | {
        "vocab_size": 49152,
        "max_seq_length_tokens": 8192,
        "norm_epsilon": 1e-5,
        "rope_base": 100000.0,
        "tie_embeddings": True,
        "init_std": 576**-0.5,
    },
    "mistral-7b": _8B
    | {"vocab_size": 32000, "max_seq_length_tokens": 32768, "norm_epsilon": 1e-5, "window_tokens": 4096},
    "qwen2.5-7b": _shape(28, 3584, 18944, 28, 4)
    | _QWEN
    | {"vocab_size": 152064, "max_seq_length_tokens": 131072, "qkv_bias": True},
    "qwen3-8b": _shape(36, 4096, 12288, 32, 8)
    | _QWEN
    | {"vocab_size": 151936, "max_seq_length_tokens": 40960, "head_dim": 128, "qk_norm": True},
    "tiny": _shape(4, 256, 704, 8, 4) | {"max_seq_length_tokens": 2048},
    "debug": _shape(2, 64, 176, 4, 2) | {"max_seq_length_tokens": 512},
}
"""Fields of ``model`` by preset name; ``tiny`` (about 3 million parameters beside the embeddings) trains on a laptop's
CPU, ``debug`` is for tests; both take ``vocab_size`` from the tokenizer."""
